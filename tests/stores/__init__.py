"""Stores for tests and benchmarks: servers of blobs in processes of their own, all on 127.0.0.1."""

"""Bytes of files behind any fsspec URI: local disks, HTTP, Azure, S3, GCS, with retries, and without a secret in any text."""

from udfs.wsi.store.file import File, FileInfo, Pending, Traffic, read_bytes
from udfs.wsi.store.uris import (
    StorageOptions,
    StoreOptions,
    absolute_uri,
    options_for,
    public_uri,
    redact,
    secrets_of,
    why_not_for_tables,
)
from udfs.wsi.store.write import write_bytes

__all__ = [
    "File",
    "FileInfo",
    "Pending",
    "StorageOptions",
    "StoreOptions",
    "Traffic",
    "absolute_uri",
    "options_for",
    "public_uri",
    "read_bytes",
    "redact",
    "secrets_of",
    "why_not_for_tables",
    "write_bytes",
]

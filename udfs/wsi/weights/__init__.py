"""Weights of networks, from a URI to tensors."""

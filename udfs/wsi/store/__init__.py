"""Bytes of files behind any fsspec URI: local disks, HTTP, Azure, S3, GCS, with retries and without secrets in texts."""

from udfs.wsi.store.about import FileInfo, Traffic
from udfs.wsi.store.file import File, Pending
from udfs.wsi.store.listing import list_files
from udfs.wsi.store.uris import (
    TIMEOUT_S,
    PublicUri,
    StorageOptions,
    StoreOptions,
    StoreUri,
    absolute_uri,
    filesystem,
    options_for,
    public_uri,
    redact,
    secrets_of,
    why_not_for_tables,
)
from udfs.wsi.store.whole import content_key, copy_to, read_bytes, write_bytes

__all__ = [
    "TIMEOUT_S",
    "File",
    "FileInfo",
    "Pending",
    "PublicUri",
    "StorageOptions",
    "StoreOptions",
    "StoreUri",
    "Traffic",
    "absolute_uri",
    "content_key",
    "copy_to",
    "filesystem",
    "list_files",
    "options_for",
    "public_uri",
    "read_bytes",
    "redact",
    "secrets_of",
    "why_not_for_tables",
    "write_bytes",
]

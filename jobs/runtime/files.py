"""Small files that jobs write beside the tables, to a disk or a store, whole or not at all."""

import os
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store import StorageOptions, options_for


def write_bytes(uri: str, data: bytes, storage_options: StorageOptions) -> None:
    """Make `data` the content of a file, its folder too where there is none; nobody sees half of it."""
    fs, path = url_to_fs(uri, **options_for(uri, storage_options))
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    part = whole.with_name(f".{whole.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(whole)

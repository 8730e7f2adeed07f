"""Writing a small file behind any fsspec URI: whole or not there, whatever ends the process."""

import os
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store.filesystem import filesystem
from udfs.wsi.store.uris import StorageOptions


def write_bytes(uri: str, data: bytes, storage_options: StorageOptions | None = None) -> None:
    """Make `data` the content of a file, in place of what was there; missing folders are made.

    Who reads meanwhile finds the old content or the new: on a disk by renaming, in an object store because a put is whole.
    """
    fs, path = filesystem(uri, storage_options)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    part = whole.with_name(f".{whole.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may leave the new name with no content
    part.replace(whole)

"""A file of weights on a disk of this host: a copy that the host makes once for all its processes to map into memory.

A file on a local disk is copied too: whoever overwrites the original does not change what running workers have mapped.
"""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udfs.wsi.host_cache import cache_folder, key_of, make_once, mark_used, remove_unused
from udfs.wsi.store import StorageOptions, content_key, copy_to, public_uri

KEPT_S = 30 * 24 * 3600.0
"""Seconds for which a copy stays after its last use. Copies are removed when another one is made."""
_PREFIX = "weights-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("slidelake.weights")


class HostFileError(Exception):
    """Weights that cannot be kept on this host, or that were replaced meanwhile; the message is for users."""


@contextmanager
def on_this_host(uri: str, storage_options: StorageOptions | None = None) -> Iterator[Path]:
    """Yields a path to the content of a URI. What is mapped into memory while the path is valid stays mapped afterwards.

    The copy lies in the cache of the host, one per content of the file. If the cache cannot be written, this process makes a
    temporary copy, and logs why.

    Raises what `udfs.wsi.store.read_bytes` raises, and HostFileError if the disk of the copy is full.
    """
    key = content_key(uri, storage_options)
    if key and (path := _kept(uri, storage_options, key)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="slidelake-") as folder:
        path = Path(folder) / "weights"
        try:
            copy_to(path, uri, storage_options)
        except OSError as error:
            raise _no_room(uri, Path(folder).parent, "TMPDIR") if error.errno in _FULL else error from None
        yield path


def _kept(uri: str, storage_options: StorageOptions | None, key: tuple[object, ...]) -> Path | None:
    """Returns the copy in the cache, which is made if it is missing; None if the cache cannot be used."""
    is_of_store = False

    def copy(unfinished: Path) -> None:
        nonlocal is_of_store
        remove_unused(_PREFIX, KEPT_S)
        unfinished.touch()  # if it cannot be written, the cache is at fault; after that the store is, unless the disk is full
        is_of_store = True
        copy_to(unfinished, uri, storage_options)
        if content_key(uri, storage_options) != key:
            raise HostFileError(f"{public_uri(uri)} was replaced while it was read: run again")

    folder: Path | None = None
    try:
        folder = cache_folder()
        path = folder / f"{_PREFIX}{key_of(*key)}"
        mark_used(path)
        make_once(path, copy)
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(uri, folder, "SLIDELAKE_CACHE") from None
        if is_of_store:
            raise
        _log.warning(
            "the cache of this host cannot be used (%s): this process makes its own copy of %s; name a folder in SLIDELAKE_CACHE",
            os.strerror(error.errno) if error.errno else error,
            public_uri(uri),
        )
        return None
    return path


def _no_room(uri: str, folder: Path | None, variable: str) -> HostFileError:
    where = f" in {folder}" if folder else ""
    return HostFileError(
        f"no room for a copy of {public_uri(uri)}{where}: free some, or name a folder with room in {variable}"
    )

"""A file of weights on a disk of this host: a copy that the host makes once for all its processes to map into memory.

A file on a local disk is copied too: whoever overwrites the original does not change what running workers have mapped.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udfs.wsi.host_cache import cache_folder, key_of, make_once
from udfs.wsi.store import StorageOptions, absolute_uri, copy_to, info_of


@contextmanager
def on_this_host(uri: str, storage_options: StorageOptions | None = None) -> Iterator[Path]:
    """Yields a path to the content of a URI. What is mapped into memory while the path is valid stays mapped afterwards.

    The copy lies in the cache of the host, one per version of the file. If the cache cannot hold the copy, this process makes
    a temporary one.

    Raises what `udfs.wsi.store.read_bytes` raises, and OSError if no disk has room for the copy.
    """
    info = info_of(uri, storage_options)
    if info.version != str(info.size_bytes):  # else its store does not tell versions apart
        try:
            path = cache_folder() / f"weights-{key_of(absolute_uri(uri), info.version)}"
            make_once(path, lambda unfinished: copy_to(unfinished, uri, storage_options))
        except OSError:  # of the disk; if of the store, the next attempt raises it again
            pass
        else:
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="slidelake-") as folder:
        path = Path(folder) / "weights"
        copy_to(path, uri, storage_options)
        yield path

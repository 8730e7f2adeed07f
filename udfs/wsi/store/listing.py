"""The files below a folder of any store, at any depth; on a disk through links to folders too."""

import os
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store.about import FileInfo
from udfs.wsi.store.filesystem import filesystem
from udfs.wsi.store.uris import StorageOptions


def list_files(
    root: str, suffixes: Collection[str], storage_options: StorageOptions | None = None
) -> Iterator[tuple[str, FileInfo | None]]:
    """The files below a folder whose name ends in one of `suffixes`, in any case of letters.

    Yields:
        (URI, size and version). None in place of the latter if the listing does not have it: `File` then says what the file
        is, or why it can't be read (a link that leads nowhere).

    Raises:
        NotADirectoryError: there is no such folder.
        Exception: what fsspec and the store's client raise.
    """
    fs, path = filesystem(root, storage_options)
    if not fs.isdir(path):
        raise NotADirectoryError(root)
    if isinstance(fs, LocalFileSystem):
        for name in _walk(path):
            if PurePosixPath(name).suffix.lower() in suffixes:
                info = None
                with suppress(OSError):
                    info = FileInfo.from_stat(Path(name).stat())
                yield name, info
        return
    for name, info in fs.find(path, detail=True).items():
        if PurePosixPath(name).suffix.lower() in suffixes:
            # below the root as it was given: fsspec's own names lose the account of abfss://container@account
            uri = root.rstrip("/") + name[len(path.rstrip("/")) :]
            yield uri, None if info.get("size") is None else FileInfo.from_fsspec(info)


def _walk(root: str) -> Iterator[str]:
    """Paths of the files below a folder.

    Links come after all that lies below the folder itself, so that a file or folder which is reached in several ways is
    listed once, by its own path if that is below the root. A link to a folder that contains the link or the root is not
    followed: it would list everything again, or far more than the root.
    """
    real_root = os.path.realpath(root)
    seen = {real_root}  # files and folders, by their real path
    folders, links = deque([(root, real_root)]), deque[tuple[str, str]]()
    while folders or links:
        if not folders:
            link, parent = links.popleft()
            real = os.path.realpath(link)
            if real in seen or _contains(real, real_root) or _contains(real, parent):
                continue
            seen.add(real)
            if Path(link).is_dir():
                folders.append((link, real))
            else:
                yield link
            continue
        folder, real = folders.popleft()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if folder == root:
                raise
            continue  # as of fsspec's listing of other stores: what can't be looked into has nothing to show
        for entry in entries:
            its_real = str(PurePosixPath(real, entry.name))
            if entry.is_symlink():
                links.append((entry.path, real))
            elif its_real not in seen:
                seen.add(its_real)
                if entry.is_dir():
                    folders.append((entry.path, its_real))
                elif entry.is_file():
                    yield entry.path


def _contains(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder

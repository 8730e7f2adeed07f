"""The files below a folder of any store, at any depth; on a disk through links to folders too."""

import os
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from udfs.wsi.store.about import FileInfo
from udfs.wsi.store.uris import StorageOptions, filesystem


def list_files(
    root: str, suffixes: Collection[str], storage_options: StorageOptions | None = None
) -> Iterator[tuple[str, FileInfo | None]]:
    """Lists the files below a folder whose name ends in one of `suffixes`, in any case of letters.

    Yields each URI with the size and version; None if the listing lacks them, as for a link that leads nowhere. Raises
    NotADirectoryError if there is no such folder, and what fsspec and the store's client raise.
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
            # below the given root: fsspec's own names lose the account of abfss://container@account
            uri = root.rstrip("/") + name[len(path.rstrip("/")) :]
            yield uri, None if info.get("size") is None else FileInfo.from_fsspec(info)


def _walk(root: str) -> Iterator[str]:
    """Yields the paths of the files below a folder.

    Links come last. So a folder that is reached in several ways is listed once, by its own path if that is below the root,
    and a file once under each name: a link under another name is another slide. A link to a folder that contains the link or
    the root is not followed: it would list everything again, or far more than the root.
    """
    real_root = os.path.realpath(root)
    seen = {(real_root, "")}  # real paths of folders; those of files, with the name that they are listed under
    folders, links = deque([(root, real_root)]), deque[tuple[str, str]]()
    while folders or links:
        if folders:
            folder, parent = folders.popleft()
            entries = _entries(folder, is_root=folder == root)
            links += [(entry.path, parent) for entry in entries if entry.is_symlink()]
            kept = [entry for entry in entries if not entry.is_symlink() and (entry.is_dir() or entry.is_file())]
            found = [(entry.path, str(PurePosixPath(parent, entry.name)), entry.is_dir()) for entry in kept]
        else:
            link, parent = links.popleft()
            real, is_folder = os.path.realpath(link), Path(link).is_dir()
            is_loop = is_folder and any(Path(below).is_relative_to(real) for below in (real_root, parent))
            found = [] if is_loop else [(link, real, is_folder)]
        for path, real, is_folder in found:
            key = real, "" if is_folder else PurePosixPath(path).name
            if key in seen:
                continue
            seen.add(key)
            if is_folder:
                folders.append((path, real))
            else:
                yield path


def _entries(folder: str, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        if is_root:
            raise
        return []  # as fsspec does in other stores: a folder that cannot be listed is empty

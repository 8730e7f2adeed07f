"""Where a table lies: its log and files on a local disk, or brought there from a store by fsspec.

One set of storage options, fsspec's, for all of it. The log, which is small, is copied to a temporary folder to be opened;
data files go through the bounded folder that remote slides are staged in, and stay there for the next epoch while there
is room. Delta never changes a file under its name, so a copy is good for ever.
"""

import errno
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from jobs.training.refusals import FeedError, NoTableError
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import File, StorageOptions, filesystem, public_uri, redact, secrets_of, why_not_for_tables
from udfs.wsi.store.stream import open_stream

_AT_ONCE = 8  # small files of the log
_LOG = "_delta_log"
_COMMIT = re.compile(r"(\d{20})\.(json|checkpoint\..*parquet)")


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table."""

    uri: str
    n_bytes: int


class TableStore:
    """The files of one table."""

    def __init__(self, uri: str, storage_options: StorageOptions | None = None) -> None:
        """Of the table at a path or an fsspec URI.

        Raises:
            FeedError: the URI's store can't be had.
        """
        self.uri = public_uri(uri)
        self._uri, self._options = uri.rstrip("/"), storage_options
        try:
            self._fs, self._path = filesystem(uri, storage_options)
        except Exception as error:
            raise self._translated(error, self.uri) from None
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local and (why := why_not_for_tables(uri)):
            raise FeedError(f"{self.uri}: {why}: name the folder otherwise")

    def file(self, name: str, n_bytes: int) -> DataFile:
        """A file by the name that the log has for it."""
        root = self._path if self.is_local else self._uri
        return DataFile(name if "://" in name or name.startswith("/") else f"{root}/{name}", n_bytes)

    @contextmanager
    def log(self, version: int | None) -> Iterator[str]:
        """A local folder that holds the log of the table up to a version, the newest where None."""
        if self.is_local:
            yield self._path
            return
        with tempfile.TemporaryDirectory(prefix="slidelake-log-") as folder:
            target = Path(folder, _LOG)
            target.mkdir()

            def copy(name: str) -> None:
                file = File(f"{self._uri}/{_LOG}/{name}", self._options)
                try:
                    [data] = file.ranges([0], [file.info.size_bytes])
                finally:
                    file.close()
                (target / name).write_bytes(data)

            try:
                self._fs.invalidate_cache()
                listed = [path.rpartition("/")[2] for path in self._fs.ls(f"{self._path}/{_LOG}", detail=False)]
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(pool.map(copy, _needed(listed, version)))
            except FileNotFoundError:
                raise NoTableError(f"no Delta table at {self.uri}: run the patients job, or correct the URI") from None
            except Exception as error:
                raise self._translated(error, self.uri) from None
            yield folder

    @contextmanager
    def looked_at(self, file: DataFile) -> Iterator[Any]:
        """What pyarrow reads a footer and some small columns from: few requests, where the file is remote.

        Raises:
            FileNotFoundError: the file is gone.
        """
        if self.is_local:
            yield str(_existing(file))
            return
        try:
            remote = File(file.uri, self._options)
            try:
                yield open_stream(remote)
            finally:
                remote.close()
        except SlideError as error:
            raise self._translated(error, public_uri(file.uri)) from None

    @contextmanager
    def local(self, files: Sequence[DataFile]) -> Iterator[list[Path]]:
        """Local paths of some files, which stay there until the context ends.

        Raises:
            FeedError: the folder for copies has no room for them.
            FileNotFoundError: one is gone.
        """
        if self.is_local:
            yield [_existing(file) for file in files]
            return
        with ExitStack() as held:
            paths = []
            for file in files:
                try:
                    paths.append(held.enter_context(staged(file.uri, self._options)))
                except SlideError as error:
                    raise self._translated(error, public_uri(file.uri)) from None
            yield paths

    def _translated(self, error: Exception, where: str) -> Exception:
        if isinstance(error, SlideError) and error.code is ErrorCode.FILE_MISSING:
            return FileNotFoundError(where)
        if isinstance(error, SlideError):
            return FeedError(error.message)
        text = redact(f"{type(error).__name__}: {' '.join(str(error).split())}", secrets_of(self._uri, self._options))
        return FeedError(f"{where} can't be read ({text}): check the URI, the storage options and the network")


def _existing(file: DataFile) -> Path:
    path = Path(file.uri)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file", file.uri)
    return path


def _needed(listed: Sequence[str], version: int | None) -> list[str]:
    """Which files of the log tell what a version is: the last whole checkpoint up to it, and the commits after that."""
    found = [(int(match[1]), match[2], name) for name in listed if (match := _COMMIT.fullmatch(name))]
    found = [entry for entry in found if version is None or entry[0] <= version]
    begin = max((number for number, kind, _ in found if kind == "checkpoint.parquet"), default=0)
    return [name for number, _, name in found if number >= begin]

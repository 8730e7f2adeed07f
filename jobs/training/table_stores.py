"""Where a table lies: its log and files on a local disk, or copied there from a store by fsspec.

All of it takes one set of storage options, fsspec's. The small log is copied to a temporary folder to be opened. Data files
are copied to the bounded folder of remote slides, and stay there for the next epoch while there is room. Delta never changes a
file under its name, so a copy stays valid.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from jobs.training.refusals import FeedError, NoTableError
from udfs.wsi import ErrorCode, SlideError, store
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import File, StorageOptions, public_uri
from udfs.wsi.store.stream import open_stream

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
        """Opens the filesystem of a table; raises FeedError if its store cannot be reached, or the path is not for tables."""
        self.uri = public_uri(uri)
        self._uri, self._options = uri.rstrip("/"), storage_options
        try:
            self._fs, self._path = store.filesystem(uri, storage_options)
        except Exception as error:
            raise self._translated(error, self.uri) from None
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local and (why := store.why_not_for_tables(uri)):
            raise FeedError(f"{self.uri}: {why}: name the folder otherwise")

    def file(self, name: str, n_bytes: int) -> DataFile:
        """Returns a file by its name in the log."""
        root = self._path if self.is_local else self._uri
        return DataFile(name if "://" in name or name.startswith("/") else f"{root}/{name}", n_bytes)

    @contextmanager
    def log(self, version: int | None) -> Iterator[str]:
        """Yields a local folder with the log of the table up to a version, the newest if None."""
        if self.is_local:
            yield self._path
            return
        with tempfile.TemporaryDirectory(prefix="slidelake-log-") as folder:
            try:
                self._fs.invalidate_cache()
                listed = [path.rpartition("/")[2] for path in self._fs.ls(f"{self._path}/{_LOG}", detail=False)]
                names = _needed(listed, version)
                self._fs.get(*([f"{place}/{_LOG}/{name}" for name in names] for place in (self._path, folder)))
            except FileNotFoundError:
                raise NoTableError(f"no Delta table at {self.uri}: run the patients job, or correct the URI") from None
            except Exception as error:
                raise self._translated(error, self.uri) from None
            yield folder

    @contextmanager
    def looked_at(self, file: DataFile) -> Iterator[Any]:
        """Yields the source of a footer and some small columns for pyarrow; few requests if the file is remote.

        Raises FileNotFoundError if the file does not exist any more.
        """
        if self.is_local:
            yield str(Path(file.uri).resolve(strict=True))
            return
        try:
            with closing(File(file.uri, self._options)) as remote:
                yield open_stream(remote)
        except SlideError as error:
            raise self._translated(error, public_uri(file.uri)) from None

    @contextmanager
    def local(self, files: Sequence[DataFile]) -> Iterator[list[Path]]:
        """Yields local paths of some files, which stay until the context ends.

        Raises FeedError if the folder of copies has no room for them, FileNotFoundError if a file does not exist any more.
        """
        if self.is_local:
            yield [Path(file.uri).resolve(strict=True) for file in files]
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
        secrets = store.secrets_of(self._uri, self._options)
        text = store.redact(f"{type(error).__name__}: {' '.join(str(error).split())}", secrets)
        return FeedError(f"{where} cannot be read ({text}): check the URI, the storage options and the network")


def _needed(listed: Sequence[str], version: int | None) -> list[str]:
    """Returns the files of the log that make a version: the last whole checkpoint up to it, and the commits after that."""
    found = [(int(match[1]), match[2], name) for name in listed if (match := _COMMIT.fullmatch(name))]
    found = [entry for entry in found if version is None or entry[0] <= version]
    begin = max((number for number, kind, _ in found if kind == "checkpoint.parquet"), default=0)
    return [name for number, _, name in found if number >= begin]


_AZURE_NAMES = ("account_name", "account_key", "sas_token", "tenant_id", "client_id", "client_secret")
_AZURE = {name: name for name in _AZURE_NAMES}
_CONNECTION = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_token"}
_S3 = {"key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token"}
_S3 |= {"endpoint_url": "aws_endpoint_url", "region_name": "aws_region"}
_GCS = {"token": "google_service_account"}
_WORDS = {"az": _AZURE, "abfs": _AZURE, "abfss": _AZURE, "adl": _AZURE, "s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS}


def delta_options(uri: str, storage_options: StorageOptions | None) -> dict[str, str]:
    """Returns the options of fsspec in the words of deltalake; without a word, deltalake asks the environment, as fsspec does."""
    given = store.options_for(uri, storage_options)
    words = _WORDS.get(uri.partition("://")[0], {})
    options = _renamed(given, words)
    if words is _S3:
        options |= _renamed(given.get("client_kwargs") or {}, words)
    if words is _AZURE and "connection_string" in given:
        parts = dict(part.split("=", 1) for part in str(given["connection_string"]).split(";") if "=" in part)
        options |= _renamed(parts, _CONNECTION)
        if "BlobEndpoint" in parts:
            options["azure_storage_endpoint"] = parts["BlobEndpoint"]
    if any(value.startswith("http://") for value in options.values()):
        options["allow_http"] = "true"
    return options


def _renamed(given: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, str]:
    return {words[name]: str(value) for name, value in given.items() if name in words and value is not None}

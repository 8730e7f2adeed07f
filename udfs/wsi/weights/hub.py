"""Files of repositories on the Hugging Face hub, from its cache on this host or from its server.

HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean to huggingface_hub, whose cache and locks these are: the
processes of a host download a file once.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tenacity import retry, retry_if_exception, stop_after_attempt, stop_after_delay, wait_fixed

from udfs.wsi.host_cache import cache_folder
from udfs.wsi.store import public_uri, redact, secrets_of
from udfs.wsi.weights.checkpoint import CheckpointError

REPOSITORY, FILE = "hf-hub:", "hf://"
WEIGHTS = (  # where repositories have them, the best first
    *("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("pytorch_model.pth", "model.pth", "model.bin"),
)
_PAGES = "https://huggingface.co"  # where accounts accept terms, whatever mirror has the files
_INSTEAD = "set its weights to a path or URI of the file"
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_BUSY = (429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"{REPOSITORY}(?P<name>{_PART}/{_PART})(@(?P<revision>(?!hf_)[\w./-]+))?")
_FILE = re.compile(rf"{FILE}(?P<name>{_PART}/{_PART})(@(?P<revision>(?!hf_)[\w.-]+))?/(?P<file>[\w./-]+)")


@dataclass(frozen=True)
class HubReference:
    """A repository of a model on the hub, or a file in it."""

    repository: str  # OWNER/NAME
    revision: str | None = None  # branch, tag or commit; None: the main branch
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubReference | None":
        """The reference that ``hf-hub:OWNER/NAME[@REVISION]`` or ``hf://OWNER/NAME[@REVISION]/FILE`` is, None for other texts.

        Raises:
            ValueError: the text begins as one of them, and goes on otherwise.
        """
        if found := _REPOSITORY.fullmatch(text) or _FILE.fullmatch(text):
            parts = found.groupdict()
            return cls(parts["name"], parts["revision"], parts.get("file"))
        if text.startswith((REPOSITORY, FILE)):
            raise ValueError(
                "a model of the hub is written hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION, and a file of it "
                "hf://OWNER/NAME@REVISION/FILE"
            )
        return None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return (
            f"{FILE}{self.repository}{revision}/{self.file}"
            if self.file
            else f"{REPOSITORY}{self.repository}{revision}"
        )


def is_of_hub(text: str) -> bool:
    """Whether a text is a reference to the hub; none holds a token."""
    return bool(_REPOSITORY.fullmatch(text) or _FILE.fullmatch(text))


def cached_file(reference: HubReference, names: Sequence[str]) -> Path | None:
    """The first of some files of a repository that is in a cache of this host, as of the last look at the hub."""
    for folder in _caches():
        for name in names:
            found = try_to_load_from_cache(reference.repository, name, folder, reference.revision)
            if isinstance(found, str):
                return Path(found)
    return None


def is_in_cache(path: str) -> bool:
    """Whether a path leads to a file in a cache of the hub on this host, which never changes a file that it has."""
    if "://" in path or not Path(path).is_file():
        return False
    given = (Path(path).absolute(), Path(path).resolve())
    return any(
        each.is_relative_to(root) for folder in _caches() for root in (folder, folder.resolve()) for each in given
    )


def hub_file(reference: HubReference, names: Sequence[str]) -> Path:
    """The first of some files that a repository has, on a disk of this host.

    What the cache has serves if the revision is a commit, or if the hub does not answer or refuses.

    Raises:
        CheckpointError: one line on what the hub refused or why it cannot be reached, and the remedy.
    """
    cached = cached_file(reference, names)
    if cached and _COMMIT.fullmatch(reference.revision or ""):
        return cached
    if constants.HF_HUB_OFFLINE:
        if cached:
            return cached
        raise CheckpointError(
            f"{reference} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: run "
            f"`{_download_command(reference, names)}` on a machine with a route to the hub and copy its cache here, or "
            f"{_INSTEAD}"
        )
    try:
        name = file_on_hub(reference, names)
        with _no_secrets_logged():
            path = _download(reference, name)
    except Exception as error:  # of whichever HTTP client this version of huggingface_hub has, too
        if cached:
            return cached
        raise error if isinstance(error, CheckpointError) else _refusal(reference, names, error) from None
    return Path(path)


def file_on_hub(reference: HubReference, names: Sequence[str]) -> str:
    """The first of some files that a repository has, by one request per name; nothing is downloaded.

    Fails at once if there is no route, while a download waits for minutes.

    Raises:
        CheckpointError: see `hub_file`.
    """
    try:
        return _first_on_hub(reference, names)
    except Exception as error:
        raise _refusal(reference, names, error) from None


def _first_on_hub(reference: HubReference, names: Sequence[str]) -> str:
    for name in names[:-1]:
        try:
            _ask(reference, name)
        except EntryNotFoundError:
            continue
        return name
    _ask(reference, names[-1])
    return names[-1]


def _cause_of(error: BaseException) -> BaseException:
    """Return why a download did not begin: huggingface_hub reports each reason as a file that is not in its cache."""
    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _is_busy(error: BaseException) -> bool:
    cause = _cause_of(error)
    return isinstance(cause, HfHubHTTPError) and cause.response.status_code in _BUSY


_if_busy = retry(
    retry=retry_if_exception(_is_busy),
    stop=stop_after_attempt(3)
    | stop_after_delay(10.0),  # new versions of huggingface_hub have waited themselves by then
    wait=wait_fixed(1.0),
    reraise=True,
)


@_if_busy
def _download(reference: HubReference, name: str) -> str:
    return hf_hub_download(reference.repository, name, revision=reference.revision, cache_dir=_writable_cache())


@contextmanager
def _no_secrets_logged() -> Iterator[None]:
    """Take signatures and tokens from what huggingface_hub logs, which is the URL of a failed request as it was signed."""
    secrets = (*secrets_of(constants.ENDPOINT, None), *filter(None, [get_token()]))

    def without_secrets(record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = redact(record.getMessage(), secrets), (), None
        return True

    known = (logging.getLogger(name) for name in tuple(logging.root.manager.loggerDict))
    loggers = [each for each in known if each.name.partition(".")[0] == "huggingface_hub"]
    handlers = [handler for each in loggers for handler in each.handlers]  # of loggers that are made meanwhile, too
    for each in (*loggers, *handlers):
        each.addFilter(without_secrets)
    try:
        yield
    finally:
        for each in (*loggers, *handlers):
            each.removeFilter(without_secrets)


def _download_command(reference: HubReference, names: Sequence[str]) -> str:
    """Return what brings the same files of the same revision into the cache; all of the repository if the file is not known."""
    file = f" {names[0]}" if len(names) == 1 else ""
    revision = f" --revision {reference.revision}" if reference.revision else ""
    return f"hf download {reference.repository}{file}{revision}"


@_if_busy
def _ask(reference: HubReference, name: str) -> None:
    get_hf_file_metadata(hf_hub_url(reference.repository, name, revision=reference.revision))


def _caches() -> list[Path]:
    """The folder of huggingface_hub, and one for hosts on which that cannot be written."""
    folders = [Path(constants.HF_HUB_CACHE)]
    with suppress(OSError):
        folders.append(cache_folder() / "hub")
    return folders


def _writable_cache() -> Path:
    folders = _caches()
    with suppress(OSError):
        folders[0].mkdir(parents=True, exist_ok=True)
    return folders[0] if os.access(folders[0], os.W_OK) else folders[-1]


def _refusal(reference: HubReference, names: Sequence[str], error: Exception) -> CheckpointError:
    """One line, without the error's own text, which may hold headers."""
    endpoint = constants.ENDPOINT if "://" in constants.ENDPOINT else f"https://{constants.ENDPOINT}"
    page, hub = f"{_PAGES}/{reference.repository}", f"the hub at {public_uri(endpoint)}"
    cause = _cause_of(error)
    error = cause if isinstance(cause, Exception) else error
    if isinstance(error, GatedRepoError):
        who = "the account of HF_TOKEN has no access" if get_token() else "HF_TOKEN is not set"
        return CheckpointError(
            f"{reference} is gated, and {who}: accept its terms at {page}, and set HF_TOKEN to a token of that account, or "
            f"{_INSTEAD}"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return CheckpointError(
            f"{hub} has no {reference}, or it is private: check the name, and set HF_TOKEN to a token "
            "of an account with access"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{reference}: the repository has no such revision: see {page}/commits/main")
    if isinstance(error, FileMetadataError):
        return CheckpointError(
            f"{reference}: {hub} answers without the headers X-Repo-Commit and ETag: set HF_ENDPOINT to a complete mirror of "
            f"the hub, or {_INSTEAD}"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return CheckpointError(f"{reference} has no {' or '.join(names)}: see {page}/tree/main, or {_INSTEAD}")
    if isinstance(error, OSError) and error.errno in _OF_DISKS:
        return CheckpointError(
            f"{reference} cannot be kept in {_writable_cache()} ({os.strerror(error.errno)}): name a folder with room in HF_HOME"
        )
    if isinstance(error, HfHubHTTPError):
        return CheckpointError(
            f"{reference}: {hub} answers with HTTP status {error.response.status_code}: check "
            f"HF_TOKEN and HF_ENDPOINT, run again later, or {_INSTEAD}"
        )
    return CheckpointError(
        f"{reference}: {hub} cannot be reached ({type(error).__name__}): give this machine a route "
        f"(proxy, firewall, HF_ENDPOINT of a mirror), or {_INSTEAD}"
    )

"""The cohort: its CSV, read from where it lies, and the file of each of its rows."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from jobs.runtime.cohort.patient_csv import Image, parse_cohort
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.sections import SlidesSettings
from udfs.wording import named, printable
from udfs.wsi import ErrorCode, SlideError, store
from udfs.wsi.store import FileInfo, StorageOptions, StoreUri, public_uri

_THREADS = 32
_Listed = Sequence[tuple[StoreUri, FileInfo | None]]  # the files of one name


@dataclass(frozen=True)
class Located:
    """The file of an image, or why there is none. A listing may give neither `info` nor `error`."""

    uri: StoreUri | None
    info: FileInfo | None = None
    error: SlideError | None = None


@dataclass(frozen=True)
class Cohort:
    """The CSV: its rows, and its bytes."""

    images: Sequence[Image]
    csv: bytes


def read_cohort(config: Config) -> Cohort:
    """Returns the CSV; raises ConfigError if it cannot be read, or has faults, with one line that names the rows."""
    uri, options = config.patients, config.slides.storage_options
    name = public_uri(uri)
    try:
        data = store.read_bytes(uri, options)
        return Cohort(parse_cohort(data), data)
    except FileNotFoundError:
        raise ConfigError(f"patients: no file at {name}") from None
    except ConfigError as error:
        raise ConfigError(f"patients: {name}: {error}") from None
    except Exception as error:
        raise ConfigError(f"patients: {name} cannot be read ({_redacted(error, uri, options)})") from None


def secrets_in(config: Config, images: Iterable[Image] = ()) -> tuple[str, ...]:
    """Returns every text in settings and CSV that must not be shown, longest first: see `redact`."""
    found = set(store.secrets_of(None, config.slides.storage_options))
    for text in (*config.by_key().values(), *(image.uri for image in images)):
        found.update(store.secrets_of(text, None) if isinstance(text, str) else ())
    return tuple(sorted(found, key=len, reverse=True))


def locate(images: Sequence[Image], config: Config) -> dict[str, Located]:
    """Returns the file of each image by image_id: the CSV's uri, or the file of that name under slides.root.

    slides.root is listed once. Files named by uri, and links that lead nowhere, are looked up one by one, in threads. Raises
    ConfigError if slides.root is needed and missing, cannot be listed, or has none of the slides.
    """
    slides = config.slides
    by_name = [image.image_id for image in images if image.uri is None]
    files = _list_root(slides, by_name) if by_name else {}
    spellings = _by_spelling(files) if not all(name in files for name in by_name) else {}
    located = {
        image.image_id: Located(store.absolute_uri(image.uri))
        if image.uri is not None
        else _named_file(image.image_id, files.get(image.image_id, []), spellings, slides)
        for image in images
    }
    unknown = {name: one.uri for name, one in located.items() if one.uri and not one.info}
    with ThreadPoolExecutor(_THREADS) as pool:
        looked_up = pool.map(lambda uri: _look_up(uri, slides.storage_options), unknown.values())
        return located | dict(zip(unknown, looked_up, strict=True))


def _list_root(slides: SlidesSettings, wanted: Sequence[str]) -> Mapping[str, _Listed]:
    """Returns the files below slides.root by name, without the ending."""
    root, example = slides.root, f"({named(wanted[0])}, ...)"
    if root is None:
        raise ConfigError(f"slides.root is not set and {len(wanted)} rows of the CSV have no uri {example}", "set one")
    shown, files = public_uri(root), dict[str, list[tuple[StoreUri, FileInfo | None]]]()
    try:
        for uri, info in store.list_files(root, slides.extensions, slides.storage_options):
            name = unicodedata.normalize("NFC", PurePosixPath(uri).stem)  # macOS stores names in form NFD
            files.setdefault(name, []).append((StoreUri(uri), info))
    except NotADirectoryError:
        raise ConfigError(
            f"slides.root: no folder at {shown}", "set it to the folder or bucket of the slides, and mount the folder"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"slides.root: {shown} cannot be listed ({_redacted(error, root, slides.storage_options)})",
            "the driver needs credentials (slides.storage_options, or an identity of its own) with the right to list it, and a "
            "route to it (proxy, firewall, endpoint)",
        ) from None
    if not any(name in files for name in wanted):
        raise ConfigError(
            f"slides.root: {shown} has none of the {len(wanted)} slides of the CSV {example}",
            _similar_name(wanted[0], _by_spelling(files), slides)
            or f"is it mounted, and the right folder? slides.extensions are {', '.join(slides.extensions)}",
        )
    return files


def _redacted(error: Exception, uri: StoreUri, options: StorageOptions) -> str:
    return store.redact(f"{type(error).__name__}: {error}", store.secrets_of(uri, options))


def _by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Returns names by what is equal for names that differ only in case."""
    return {name.casefold(): name for name in names}


def _similar_name(image_id: str, spellings: Mapping[str, str], slides: SlidesSettings) -> str:
    """Returns what to do if a file has nearly the name of an image; empty if none has."""
    spelling = image_id.casefold()
    endings = [ending for ending in slides.extensions if spelling.endswith(ending)]
    for similar, how in (
        (spelling, "in case"),
        *((spelling.removesuffix(ending), "in the file's ending") for ending in endings),
        (f"{spelling}.ome", "in the .ome of its file"),
        (spelling.removesuffix(".0"), "in the .0 that pandas writes behind numbers"),
    ):
        if similar in spellings:
            return f"{named(image_id)} differs from a file only {how}: write {named(spellings[similar])} as image_id"
    return ""


def _named_file(image_id: str, files: _Listed, spellings: Mapping[str, str], slides: SlidesSettings) -> Located:
    """Returns the only file of a name, or the error that there is none or more than one."""
    if len(files) == 1:
        return Located(*files[0])
    if files:
        paths: list[str] = [public_uri(uri) for uri, _ in files[:3]]
        if len({unicodedata.normalize("NFC", path) for path in paths}) < len(paths):  # they look alike
            paths = [path.encode("ascii", "backslashreplace").decode() for path in paths]
        shown = printable(", ".join(paths))
        message = f"{len(files)} files have the name {named(image_id)} ({shown}): give its uri in the CSV"
        return Located(None, error=SlideError(ErrorCode.FILE_AMBIGUOUS, message))
    remedy = _similar_name(image_id, spellings, slides) or "upload it, or give its uri in the CSV"
    where = f"with an ending of {', '.join(slides.extensions)} under {public_uri(str(slides.root))}"
    return Located(None, error=SlideError(ErrorCode.FILE_MISSING, f"no file {named(image_id)} {where}: {remedy}"))


def _look_up(uri: StoreUri, options: StorageOptions) -> Located:
    """Returns the file at a URI, in either Unicode form: most stores take the two forms of an umlaut for two names."""
    forms = dict.fromkeys((uri, *(StoreUri(unicodedata.normalize(form, uri)) for form in ("NFC", "NFD"))))
    found = (_file_at(form, options) for form in forms)
    first = next(found)
    if first.error is None or first.error.code is not ErrorCode.FILE_MISSING:
        return first
    return next((one for one in found if one.error is None), first)


def _file_at(uri: StoreUri, options: StorageOptions) -> Located:
    try:
        return Located(uri, store.File(uri, options).info)
    except SlideError as error:
        return Located(uri, error=error)

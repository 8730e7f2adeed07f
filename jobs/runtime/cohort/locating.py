"""The cohort: its CSV, read from where it lies, and the file that each of its rows means."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from jobs.runtime.cohort.patient_csv import Image, parse_cohort
from jobs.runtime.settings.config import Config, ConfigError
from udfs.wording import named, printable
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import File, FileInfo, absolute_uri, list_files, public_uri, read_bytes, redact, secrets_of

_LISTING_THREADS = 32


@dataclass(frozen=True)
class Located:
    """The file of an image, or why there is none."""

    uri: str | None  # as it is opened: may hold secrets
    info: FileInfo | None
    error: SlideError | None


@dataclass(frozen=True)
class Cohort:
    """The CSV: its rows, and its bytes as they are."""

    images: Sequence[Image]
    csv: bytes


def read_cohort(config: Config) -> Cohort:
    """Read the CSV.

    Raises:
        ConfigError: it can't be read, or one line that gives the rows at fault.
    """
    name = public_uri(config.patients)
    try:
        data = read_bytes(config.patients, config.slides.storage_options)
        return Cohort(parse_cohort(data), data)
    except FileNotFoundError:
        raise ConfigError(f"patients: no file at {name}") from None
    except ConfigError as error:
        raise ConfigError(f"patients: {name}: {error}") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(config.patients, config.slides.storage_options))
        raise ConfigError(f"patients: {name} can't be read ({text})") from None


def secrets_in(config: Config, images: Iterable[Image] = ()) -> tuple[str, ...]:
    """Every text in settings and CSV that must not be shown, longest first: see `redact`."""
    found = set(secrets_of(None, config.slides.storage_options))
    for text in (*_texts(config.model_dump(mode="json")), *(image.uri for image in images)):
        found.update(secrets_of(text, None))
    return tuple(sorted(found, key=len, reverse=True))


def _texts(settings: Any) -> Iterator[str]:
    """All that may be URIs, however deep."""
    if isinstance(settings, Mapping):
        for value in settings.values():
            yield from _texts(value)
    elif isinstance(settings, str):
        yield settings


def locate(images: Sequence[Image], config: Config) -> dict[str, Located]:
    """The file of each image by image_id: the CSV's uri, else what bears the name under slides.root.

    One recursive listing serves slides.root; files named by uri, and links that lead nowhere, are asked for one by one, in
    threads.

    Raises:
        ConfigError: slides.root is needed and missing, can't be listed, or holds not one of the slides looked for.
    """
    by_name = [image for image in images if image.uri is None]
    if by_name and config.slides.root is None:
        raise ConfigError(
            f"slides.root is not set and {len(by_name)} rows of the CSV have no uri ({named(by_name[0].image_id)}, ...)",
            "set one",
        )
    found = _list_root(config) if by_name else {}
    if by_name and not any(image.image_id in found for image in by_name):
        raise ConfigError(
            f"slides.root: {public_uri(str(config.slides.root))} holds none of the {len(by_name)} slides of the CSV "
            f"({named(by_name[0].image_id)}, ...)",
            _nearly(by_name[0].image_id, _by_spelling(found), config)
            or f"is it mounted, and the right folder? slides.extensions are {', '.join(config.slides.extensions)}",
        )
    is_missing = any(image.image_id not in found for image in by_name)
    spellings = _by_spelling(found) if is_missing else {}
    located = {image.image_id: _choose(image, found.get(image.image_id, []), spellings, config) for image in by_name}
    located |= {
        image.image_id: Located(absolute_uri(image.uri), None, None) for image in images if image.uri is not None
    }

    def ask(uri: str) -> Located:
        given = _located_at(uri, config)
        if given.error is None or given.error.code is not ErrorCode.FILE_MISSING:
            return given
        # An ü has two forms, which are two names to most stores, and the CSV may have come by a Mac.
        others = {unicodedata.normalize(form, uri) for form in ("NFC", "NFD")} - {uri}
        return next((found for found in (_located_at(other, config) for other in others) if not found.error), given)

    unknown = {name: one.uri for name, one in located.items() if one.uri and not one.info}
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        located |= zip(unknown, pool.map(ask, unknown.values()), strict=True)
    return located


def _located_at(uri: str, config: Config) -> Located:
    try:
        return Located(uri, File(uri, config.slides.storage_options).info, None)
    except SlideError as error:
        return Located(uri, None, error)


def _list_root(config: Config) -> dict[str, list[tuple[str, FileInfo | None]]]:
    """URIs and what is known of the files below slides.root, by name without the ending."""
    root = str(config.slides.root)
    options = config.slides.storage_options
    found: dict[str, list[tuple[str, FileInfo | None]]] = {}
    try:
        for uri, info in list_files(root, config.slides.extensions, options):
            name = unicodedata.normalize("NFC", PurePosixPath(uri).stem)  # macOS stores names in form NFD
            found.setdefault(name, []).append((uri, info))
    except NotADirectoryError:
        raise ConfigError(
            f"slides.root: no folder at {public_uri(root)}",
            "set it to the folder or bucket with the slides, and mount it where it is a folder",
        ) from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(root, options))
        raise ConfigError(
            f"slides.root: {public_uri(root)} can't be listed ({text})",
            "the driver needs credentials (slides.storage_options, or an identity of its own) with the right to list it, and a "
            "route to it (proxy, firewall, endpoint)",
        ) from None
    return found


def _by_spelling(names: Iterable[str]) -> dict[str, str]:
    """The names of files by what is the same for names that differ only in case."""
    return {name.casefold(): name for name in names}


def _nearly(image_id: str, spellings: Mapping[str, str], config: Config) -> str:
    """What to do where a file bears nearly the name of an image; empty where none does."""
    spelled = image_id.casefold()
    endings = [ending for ending in config.slides.extensions if spelled.endswith(ending)]
    for spelling, how in (
        (spelled, "in case"),
        *((spelled.removesuffix(ending), "in the file's ending") for ending in endings),
        (f"{spelled}.ome", "in the .ome of its file"),
        (spelled.removesuffix(".0"), "in the .0 that pandas writes behind numbers"),
    ):
        if spelling in spellings:
            return f"{named(image_id)} differs from a file only {how}: write {named(spellings[spelling])} as image_id"
    return ""


def _choose(
    image: Image, candidates: Sequence[tuple[str, FileInfo | None]], spellings: Mapping[str, str], config: Config
) -> Located:
    """The one file that bears the name of an image; neither info nor error if the listing does not say what the file is."""
    where = public_uri(str(config.slides.root))
    if not candidates:
        endings = ", ".join(config.slides.extensions)
        remedy = _nearly(image.image_id, spellings, config) or "upload it, or give its uri in the CSV"
        message = f"no file {named(image.image_id)} with an ending of {endings} under {where}: {remedy}"
        return Located(None, None, SlideError(ErrorCode.FILE_MISSING, message))
    if len(candidates) > 1:
        paths: list[str] = [public_uri(uri) for uri, _ in candidates[:3]]
        if len({unicodedata.normalize("NFC", path) for path in paths}) < len(paths):  # they look alike
            paths = [path.encode("ascii", "backslashreplace").decode() for path in paths]
        names = ", ".join(paths)
        name = named(image.image_id)
        message = f"{len(candidates)} files bear the name {name} ({printable(names)}): give its uri in the CSV"
        return Located(None, None, SlideError(ErrorCode.FILE_AMBIGUOUS, message))
    uri, info = candidates[0]
    return Located(uri, info, None)

"""The patient CSV: what it must hold, what is wrong with it, and which file each of its rows means."""

import codecs
import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from jobs.runtime.config import Config, ConfigError
from udfs.telling import some
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import File, FileInfo, absolute_uri, list_files, public_uri, read_bytes, redact, secrets_of

REQUIRED = ("image_id", "center_id", "patient_id", "image_num")
OPTIONAL = ("label", "uri", "mpp")
_IDENTIFIERS = ("image_id", "center_id", "patient_id")
_LISTING_THREADS = 32


@dataclass(frozen=True)
class Image:
    """A row of the CSV. All identifiers are text, so leading zeros survive."""

    image_id: str
    center_id: str
    patient_id: str
    image_num: int
    label: str | None
    uri: str | None  # as the CSV gives it
    mpp: float | None  # um a level-0 pixel; wins over the header's


@dataclass(frozen=True)
class Located:
    """The file of an image, or why there is none."""

    uri: str | None  # as it is opened: may hold secrets
    info: FileInfo | None
    error: SlideError | None


def read_cohort(config: Config) -> list[Image]:
    """The rows of the CSV.

    Raises:
        ConfigError: one line that gives the rows at fault.
    """
    data = cohort_bytes(config)
    try:
        return parse_cohort(data)
    except ConfigError as error:
        raise ConfigError(f"patients: {public_uri(config.patients)}: {error}") from None


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


def cohort_bytes(config: Config) -> bytes:
    """The CSV as it is; raises ConfigError where it can't be read."""
    name = public_uri(config.patients)
    try:
        return read_bytes(config.patients, config.slides.storage_options)
    except FileNotFoundError:
        raise ConfigError(f"patients: no file at {name}") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(config.patients, config.slides.storage_options))
        raise ConfigError(f"patients: {name} can't be read ({text})") from None


def parse_cohort(data: bytes) -> list[Image]:
    """The rows of a CSV in UTF-8, with or without a byte order mark; see `read_cohort`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"line {line} is not UTF-8: save the CSV as UTF-8") from None
    if "\0" in text:
        raise ConfigError("it holds NUL bytes (UTF-16, perhaps): save the CSV as UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} is not CSV: {error}") from None
    if not rows:
        raise ConfigError("it is empty: a header and a row an image are wanted")
    header = [cell.strip() for cell in rows[0][1]]
    missing = [column for column in REQUIRED if column not in header]
    if missing:
        semicolons = (
            " (is it separated by semicolons? commas are wanted)" if len(header) == 1 and ";" in header[0] else ""
        )
        raise ConfigError(f"the header lacks {', '.join(missing)}; it has {', '.join(header)}{semicolons}")
    twice = sorted({column for column in header if column in (*REQUIRED, *OPTIONAL) and header.count(column) > 1})
    if twice:
        raise ConfigError(f"the header has {', '.join(twice)} twice")
    if len(rows) == 1:
        raise ConfigError("it has a header and no rows")
    records = [(line, _record(header, cells, line)) for line, cells in rows[1:]]
    _check_identifiers(records)
    images = [(line, _image(record, line)) for line, record in records]
    _check_unique(images)
    _check_agreement(images, "center_id", lambda image: image.center_id)
    _check_agreement(images, "label", lambda image: image.label)
    return [image for _, image in images]


def rows_as_written(data: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The text of a CSV that `parse_cohort` accepts, row by row.

    Returns:
        The header with the byte order mark, if there is one, and (patient_id, row) for each row that is not blank. Each ends
        in its own line ending; the last has the header's where it had none.
    """
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(data.decode("utf-8-sig"), newline=""):
            taken.append(line)
            yield line

    records: list[tuple[list[str], str]] = []
    for cells in csv.reader(lines(), strict=True):  # takes as many lines as a row has
        if any(cell.strip() for cell in cells):
            records.append((cells, "".join(taken)))
        taken.clear()
    (names, header), *rows = records
    column = [name.strip() for name in names].index("patient_id")
    ending = header[len(header.rstrip("\r\n")) :]
    texts = [(cells[column].strip(), text if text.endswith(("\r", "\n")) else text + ending) for cells, text in rows]
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    return mark + header.encode(), [(patient_id, text.encode()) for patient_id, text in texts]


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
            f"slides.root is not set and {len(by_name)} rows of the CSV have no uri ({by_name[0].image_id}, ...)",
            "set one",
        )
    found = _list_root(config) if by_name else {}
    if by_name and not any(image.image_id in found for image in by_name):
        raise ConfigError(
            f"slides.root: {public_uri(str(config.slides.root))} holds none of the {len(by_name)} slides of the CSV "
            f"({by_name[0].image_id}, ...)",
            f"is it mounted, and the right folder? slides.extensions are {', '.join(config.slides.extensions)}",
        )
    located = {image.image_id: _choose(image, found.get(image.image_id, []), config) for image in by_name}
    located |= {
        image.image_id: Located(absolute_uri(image.uri), None, None) for image in images if image.uri is not None
    }

    def ask(uri: str) -> Located:
        try:
            return Located(uri, File(uri, config.slides.storage_options).info, None)
        except SlideError as error:
            return Located(uri, None, error)

    unknown = {name: one.uri for name, one in located.items() if one.uri and not one.info}
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        located |= zip(unknown, pool.map(ask, unknown.values()), strict=True)
    return located


def _list_root(config: Config) -> dict[str, list[tuple[str, FileInfo | None]]]:
    """URIs and what is known of the files below slides.root, by name without the ending."""
    root = str(config.slides.root)
    options = config.slides.storage_options
    found: dict[str, list[tuple[str, FileInfo | None]]] = {}
    try:
        for uri, info in list_files(root, config.slides.extensions, options):
            found.setdefault(PurePosixPath(uri).stem, []).append((uri, info))
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


def _choose(image: Image, candidates: Sequence[tuple[str, FileInfo | None]], config: Config) -> Located:
    """The one file that bears the name of an image; neither info nor error if the listing does not say what the file is."""
    where = public_uri(str(config.slides.root))
    if not candidates:
        endings = ", ".join(config.slides.extensions)
        message = (
            f"no file {image.image_id} with an ending of {endings} under {where}: upload it, or give its uri in the CSV"
        )
        return Located(None, None, SlideError(ErrorCode.FILE_MISSING, message))
    if len(candidates) > 1:
        names = ", ".join(public_uri(uri) for uri, _ in candidates[:3])
        message = f"{len(candidates)} files bear the name {image.image_id} ({names}): give its uri in the CSV"
        return Located(None, None, SlideError(ErrorCode.FILE_AMBIGUOUS, message))
    uri, info = candidates[0]
    return Located(uri, info, None)


def _record(header: list[str], cells: list[str], line: int) -> dict[str, str]:
    if len(cells) > len(header):
        raise ConfigError(f"line {line} has {len(cells)} cells, the header {len(header)}: quote cells with commas")
    record = dict.fromkeys((*REQUIRED, *OPTIONAL), "")
    record.update((name, cell.strip()) for name, cell in zip(header, cells, strict=False) if name in record)
    return record


def _image(record: Mapping[str, str], line: int) -> Image:
    return Image(
        image_id=record["image_id"],
        center_id=record["center_id"],
        patient_id=record["patient_id"],
        image_num=_number(record, "image_num", line, int, "a whole number", lambda n: 0 <= n < 2**31),
        label=record["label"] or None,
        uri=record["uri"] or None,
        mpp=_number(record, "mpp", line, float, "micrometres a pixel, above 0", lambda n: 0 < n < math.inf)
        if record["mpp"]
        else None,
    )


N = TypeVar("N", int, float)


def _number(
    record: Mapping[str, str], column: str, line: int, kind: Callable[[str], N], wanted: str, fits: Callable[[N], bool]
) -> N:
    try:
        value = kind(record[column])
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise ConfigError(f"line {line}: {column} is {record[column]!r}, wanted is {wanted}")
    return value


def _check_identifiers(records: Iterable[tuple[int, Mapping[str, str]]]) -> None:
    empty, unsafe = [], []
    for line, record in records:
        for column in _IDENTIFIERS:
            value = record[column]
            if not value:
                empty.append(f"line {line} ({column})")
            elif any(c in "/\\" or not c.isprintable() for c in value) or value in (".", ".."):
                unsafe.append(f"line {line} ({column} {value!r})")
    if empty:
        raise ConfigError(f"empty identifiers: {some(empty, separator='; ')}")
    if unsafe:
        raise ConfigError(f"path separators or control characters in identifiers: {some(unsafe, separator='; ')}")


def _check_unique(images: Iterable[tuple[int, Image]]) -> None:
    lines: dict[str, list[int]] = {}
    for line, image in images:
        lines.setdefault(image.image_id, []).append(line)
    twice = [f"{name} (lines {', '.join(map(str, at))})" for name, at in lines.items() if len(at) > 1]
    if twice:
        raise ConfigError(f"image_id is not unique: {some(twice, separator='; ')}")


def _check_agreement(images: Iterable[tuple[int, Image]], column: str, value_of: Callable[[Image], str | None]) -> None:
    values: dict[str, dict[str, list[int]]] = {}
    for line, image in images:
        values.setdefault(image.patient_id, {}).setdefault(value_of(image) or "", []).append(line)
    differ = [
        f"patient {patient}: "
        + ", ".join(f"{value!r} (lines {', '.join(map(str, at))})" for value, at in found.items())
        for patient, found in values.items()
        if len(found) > 1
    ]
    if differ:
        raise ConfigError(f"images of one patient disagree on {column}: {some(differ, separator='; ')}")

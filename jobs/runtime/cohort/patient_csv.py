"""The patient CSV: how its text is read, what it must hold, and what is wrong with it."""

import codecs
import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.runtime.settings.config import ConfigError
from udfs.labels import is_dash, is_no_value, may_be_class, twins
from udfs.wording import named, quoted, some
from udfs.wsi.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import StoreUri, public_uri

REQUIRED = ("image_id", "center_id", "patient_id", "image_num")
OPTIONAL = ("label", "uri", "mpp")
_IDENTIFIERS = ("image_id", "center_id", "patient_id")
_LONGEST, _LONGEST_URI = 255, 8192  # characters: no file has a longer name; a signed URI has a long query
_URI_BEGINS = re.compile(r"(?<![A-Za-z0-9+.:-])(?=[A-Za-z][A-Za-z0-9+.:-]*://)")
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MOST_AMBIGUOUS = 10  # rows, or one in 20 of those that have a label: as many are a class
_WHOLE_NUMBER = re.compile(r"[0-9]{1,10}(\.0*)?")  # pandas writes 1.0 where a column has gaps
_DECIMAL = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_LARGEST_NUMBER = 2**31 - 1  # of an int column
_QUOTES = "'\"`\u2018\u2019\u201a\u201c\u201d\u201e\xab\xbb"  # the last eight are those of word processors
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
_LINES_ABOVE_HEADER = 20
_OTHER_FILES = {
    b"PK\x03\x04": "an Excel workbook or another ZIP archive: save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save the sheet as CSV UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PAR1": "a Parquet file: write the table as CSV",
    b"%PDF": "a PDF: save the table as CSV UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull`",
    b"<": "an HTML or XML page, as a server sends that wants a login: download the CSV itself",
    b"{": "JSON: write the table as CSV",
}


@dataclass(frozen=True)
class Image:
    """A row of the CSV. All identifiers are text in Unicode's form NFC, so leading zeros survive."""

    image_id: str
    center_id: str
    patient_id: str
    image_num: int
    label: str | None
    uri: StoreUri | None  # as the CSV gives it
    mpp: float | None  # um a level-0 pixel; wins over the header's
    label_cell: str = field(
        default="", compare=False
    )  # what the CSV has for label, also where this stands for no label


def parse_cohort(data: bytes) -> list[Image]:
    """The rows of a CSV in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: one line that gives the rows at fault.
    """
    text = _decoded(data)
    rows = [(line, cells) for line, cells, _ in _rows(text)]
    if not rows:
        raise ConfigError("it is empty: a header and one row per image are wanted")
    header = _columns(rows[0][1])
    missing = [column for column in REQUIRED if column not in header]
    if missing:
        has = some([_name(column) for column in header if column], 20)
        raise ConfigError(f"the header lacks {', '.join(missing)}; it has {has}", _header_remedy(text))
    twice = sorted({column for column in header if column in (*REQUIRED, *OPTIONAL) and header.count(column) > 1})
    if twice:
        raise ConfigError(f"the header has {', '.join(twice)} twice")
    if len(rows) == 1:
        raise ConfigError("it has a header and no rows")
    records = [(line, _record(header, cells, line)) for line, cells in rows[1:]]
    for columns, fault, is_at_fault in _FAULTS:
        _refuse_cells(records, columns, fault, is_at_fault)
    for column in _IDENTIFIERS:
        _refuse_floats(records, column)
    images = [(line, _image(record)) for line, record in records]
    _check_unique(images)
    _check_agreement(images, "center_id", lambda image: image.center_id)
    _check_agreement(images, "label", lambda image: image.label)
    _check_labels(images)
    return [image for _, image in images]


def unlabelled(images: Sequence[Image]) -> str:
    """One line on the rows that have no label, and on what they have instead; empty if no row has a text for one."""
    without = Counter(image.label_cell for image in images if image.label is None)
    has_column = any(image.label_cell for image in images)
    if not without or not has_column:
        return ""
    texts = [f"{_text(text)} ({count:,})" for text, count in without.most_common()]
    total = without.total()
    return f"{total:,} {'row has' if total == 1 else 'rows have'} no label: {some(texts)}"


def rows_as_written(data: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The text of a CSV that `parse_cohort` accepts, row by row.

    Returns:
        The header with the byte order mark, if there is one, and (patient_id, row) for each row that is not blank. Each ends
        in its own line ending; the last has the header's where it had none.
    """
    (_, names, header), *rows = _rows(_decoded(data))
    column = _columns(names).index("patient_id")
    ending = header[len(header.rstrip("\r\n")) :]
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    return mark + header.encode(), [
        (_value("patient_id", cells[column]), (text if text.endswith(("\r", "\n")) else text + ending).encode())
        for _, cells, text in rows
    ]


def _decoded(data: bytes) -> str:
    begins = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if begins.startswith(codecs.BOM_UTF8):
        raise ConfigError("it begins with more than one byte order mark: save it as CSV UTF-8 once more")
    for signature, what in _OTHER_FILES.items():
        if begins.startswith(signature):
            raise ConfigError(f"it is {what}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ConfigError("it holds NUL bytes, as UTF-16 does: save it as CSV UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((data[: error.start] + b" ").splitlines())
        raise ConfigError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save it as CSV UTF-8") from None


def _rows(text: str) -> Iterator[tuple[int, list[str], str]]:
    """Of each row that is not blank: the number of its last line, its cells, and its text as it is."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True, skipinitialspace=True)  # takes as many lines as a row has
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells, "".join(taken)
            taken.clear()
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} is not CSV: {error}") from None


def _columns(cells: Iterable[str]) -> list[str]:
    """The names of a header's columns; those that are read in lower case."""
    names = [cell.strip() for cell in cells]
    return [name.lower() if name.lower() in (*REQUIRED, *OPTIONAL) else name for name in names]


def _header_remedy(text: str) -> str:
    """What to do where the header is not the first line, or its columns are not separated by commas."""
    for number, line in enumerate(text.splitlines()[:_LINES_ABOVE_HEADER], 1):
        for separator, name in _SEPARATORS.items():
            if set(REQUIRED) <= set(_columns(cell.strip(' "') for cell in line.split(separator))):
                above = f"the header is in line {number}: delete the lines above it"
                return above if separator == "," else f"its columns are separated by {name}: save it with commas"
    return ""


def _record(columns: Sequence[str], cells: Sequence[str], line: int) -> dict[str, str]:
    """The values of a row by column."""
    if any(cell.strip() for cell in cells[len(columns) :]):  # Excel ends rows in commas
        raise ConfigError(f"line {line} has {len(cells)} cells, the header {len(columns)}: quote cells with commas")
    if _columns(cells) == list(columns):
        raise ConfigError(f"line {line} is the header once more, as where two CSVs were joined: delete that line")
    record = dict.fromkeys((*REQUIRED, *OPTIONAL), "")
    record.update((name, _value(name, cell)) for name, cell in zip(columns, cells, strict=False) if name in record)
    return record


def _value(column: str, cell: str) -> str:
    """What a cell holds: without blanks round it, in Unicode's form NFC if it is no URI."""
    value = cell.strip()
    return value if column == "uri" else unicodedata.normalize("NFC", value)


def _image(record: Mapping[str, str]) -> Image:
    return Image(
        image_id=record["image_id"],
        center_id=record["center_id"],
        patient_id=record["patient_id"],
        image_num=int(record["image_num"].partition(".")[0]),
        label=None if is_no_value(record["label"]) else record["label"],
        uri=None if is_no_value(record["uri"]) else StoreUri(record["uri"]),
        mpp=None if is_no_value(record["mpp"]) else float(record["mpp"]),
        label_cell=record["label"],
    )


def _is_empty(value: str) -> bool:
    return not value


def _controls(value: str) -> bool:
    """Whether it has characters that break lines or steer terminals; unusual blanks and joiners belong to many scripts."""
    return any(c in _BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value)


def _is_no_name(value: str) -> bool:
    return any(c in "/\\" for c in value) or value in (".", "..") or not value.isprintable()


def _is_in_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] in _QUOTES and value[-1] in _QUOTES


def _is_no_whole_number(value: str) -> bool:
    return not _WHOLE_NUMBER.fullmatch(value) or int(value.partition(".")[0]) > _LARGEST_NUMBER


def _is_no_mpp(value: str) -> bool:
    return not is_no_value(value) and (not _DECIMAL.fullmatch(value) or plausible_mpp(value) is None)


# (columns, what is wrong with the cells at fault, whether a cell is at fault); the first fault that any cell has is told
_FAULTS: tuple[tuple[tuple[str, ...], str, Callable[[str], bool]], ...] = (
    (_IDENTIFIERS, "empty identifiers", _is_empty),
    (("image_id", "patient_id"), "identifiers that stand for an empty cell", is_no_value),  # a centre may be called NA
    (_IDENTIFIERS, "path separators, control characters or invisible characters in identifiers", _is_no_name),
    (("label", "uri"), "line breaks or control characters, those of right-to-left text among them", _controls),
    ((*_IDENTIFIERS, "label"), f"texts of more than {_LONGEST} characters", lambda value: len(value) > _LONGEST),
    (("uri",), f"URIs of more than {_LONGEST_URI} characters", lambda value: len(value) > _LONGEST_URI),
    (
        (*_IDENTIFIERS, "label"),
        "quotes that are no straight double ones, or doubled (take them out)",
        _is_in_quotes,
    ),
    (
        _IDENTIFIERS,
        "identifiers that Excel made numbers of (format the column as text and enter them again)",
        lambda value: re.fullmatch(r"[0-9]([.,][0-9]+)?E\+[0-9]+", value) is not None,
    ),
    (("image_num",), f"image_num must be a whole number, 0 to {_LARGEST_NUMBER:,}", _is_no_whole_number),
    (("mpp",), f"mpp must be {MPP_WANTED}, with a point and no unit", _is_no_mpp),
)


def _refuse_cells(
    records: Iterable[tuple[int, Mapping[str, str]]],
    columns: Sequence[str],
    fault: str,
    is_at_fault: Callable[[str], bool],
) -> None:
    found = [
        f"line {line} ({column}{f' {_text(record[column])}' if record[column] else ''})"
        for line, record in records
        for column in columns
        if is_at_fault(record[column])
    ]
    if found:
        raise ConfigError(f"{fault}: {some(found, separator='; ')}")


def _refuse_floats(records: Sequence[tuple[int, Mapping[str, str]]], column: str) -> None:
    """Refuse 55.0 beside 55, and a column of nothing else: pandas makes such of 55 where a cell of the column is empty."""
    values = {record[column] for _, record in records}
    floats = {value for value in values if re.fullmatch(r"[0-9]+\.0", value)}
    if floats == values or any(value.removesuffix(".0") in values for value in floats):
        what = "identifiers that pandas made numbers of (read the column with dtype=str)"
        _refuse_cells(records, (column,), what, floats.__contains__)


def _lines(values: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """The lines of each value."""
    found: dict[str, list[int]] = {}
    for line, value in values:
        found.setdefault(value, []).append(line)
    return found


def _at(lines: Sequence[int]) -> str:
    return f"(line{'s' if len(lines) > 1 else ''} {some([str(line) for line in lines], 10)})"


def _public(text: str) -> str:
    """A text of the CSV without credentials of the URIs in it."""
    return "".join(public_uri(part) for part in _URI_BEGINS.split(text))


def _text(text: str) -> str:
    return quoted(_public(text))


def _name(text: str) -> str:
    """A name as it is if it is one word, else in quotes."""
    return text if re.fullmatch(r"[\w.-]+", text) and named(text) == text else _text(text)


def _check_unique(images: Iterable[tuple[int, Image]]) -> None:
    lines = _lines((line, image.image_id) for line, image in images)
    twice = [f"{named(_public(name))} {_at(at)}" for name, at in lines.items() if len(at) > 1]
    if twice:
        raise ConfigError(f"image_id is not unique: {some(twice, separator='; ')}")


def _check_agreement(images: Iterable[tuple[int, Image]], column: str, value_of: Callable[[Image], str | None]) -> None:
    values: dict[str, list[tuple[int, str]]] = {}
    for line, image in images:
        values.setdefault(image.patient_id, []).append((line, value_of(image) or ""))
    differ = [
        f"patient {named(_public(patient))}: "
        + ", ".join(f"{_text(value)} {_at(at)}" for value, at in _lines(found).items())
        for patient, found in values.items()
        if len({value for _, value in found}) > 1
    ]
    if differ:
        raise ConfigError(f"images of one patient disagree on {column}: {some(differ, separator='; ')}")


def _check_labels(images: Iterable[tuple[int, Image]]) -> None:
    lines = _lines((line, image.label) for line, image in images if image.label is not None)
    missing = _lines((line, image.label_cell) for line, image in images if image.label is None)
    n_labelled = sum(map(len, lines.values()))
    for text, at in missing.items():
        if may_be_class(text) and (len(at) >= _MOST_AMBIGUOUS or 20 * len(at) > n_labelled):
            raise ConfigError(
                f"label {quoted(text)} {_at(at)} stands for no label, and is the name of a class in many cohorts",
                "leave the cell empty if that is meant, else give the class another name",
            )
    groups = [", ".join(f"{_text(label)} {_at(lines[label])}" for label in group) for group in twins(lines)]
    if groups:
        raise ConfigError(
            f"labels differ only in case, blanks or as numbers: {some(groups, separator='; ')}: write each class in one way"
        )
    dashes = {text: at for text, at in missing.items() if is_dash(text)}
    if "+" in lines and dashes:
        found = ", ".join(f"{quoted(text)} {_at(at)}" for text, at in {"+": lines["+"], **dashes}.items())
        raise ConfigError(f"labels are {found}, and a dash stands for no label: write positive and negative")

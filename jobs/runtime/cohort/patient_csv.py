"""The patient CSV: how its text is read, what its rows must have, and what is wrong with them."""

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

_REQUIRED = ("image_id", "center_id", "patient_id", "image_num")
_COLUMNS = (*_REQUIRED, "label", "uri", "mpp")
_IDENTIFIERS = ("image_id", "center_id", "patient_id")
_LONGEST, _LONGEST_URI = 255, 8192  # characters: no file has a longer name; a signed URI has a long query
_URI_BEGINS = re.compile(r"(?<![A-Za-z0-9+.:-])(?=[A-Za-z][A-Za-z0-9+.:-]*://)")
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MOST_AMBIGUOUS = 10  # rows, or one in 20 of those that have a label: as many are a class
_WHOLE_NUMBER = re.compile(r"[0-9]{1,10}(\.0*)?")  # pandas writes 1.0 if a column has gaps
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
    b"<": "an HTML or XML page, such as a login page: download the CSV itself",
    b"{": "JSON: write the table as CSV",
}
_Record = Mapping[str, str]  # the value of each column
_Numbered = Sequence[tuple[int, _Record]]  # each with its line


@dataclass(frozen=True)
class Image:
    """A row of the CSV. All identifiers are text in Unicode's form NFC, so leading zeros stay."""

    image_id: str
    center_id: str
    patient_id: str
    image_num: int
    label: str | None
    uri: StoreUri | None  # as the CSV gives it
    mpp: float | None  # um per level-0 pixel; wins over the header's
    label_cell: str = field(default="", compare=False)  # what the CSV has for label, also if that stands for no label


def parse_cohort(data: bytes) -> list[Image]:
    """Returns the rows of a CSV in UTF-8; raises ConfigError, one line that names the rows with faults."""
    text = _decoded(data)
    rows = [(line, cells) for line, cells, _ in _rows(text)]
    if not rows:
        raise ConfigError("it is empty: it needs a header and one row per image")
    header = _column_names(rows[0][1])
    if missing := [column for column in _REQUIRED if column not in header]:
        present = [name if re.fullmatch(r"[\w.-]{1,80}", name) else _shown(name) for name in header if name]
        raise ConfigError(f"the header lacks {', '.join(missing)}; it has {some(present, 20)}", _header_remedy(text))
    if repeated := [column for column in sorted(_COLUMNS) if header.count(column) > 1]:
        raise ConfigError(f"the header has {', '.join(repeated)} twice")
    if len(rows) == 1:
        raise ConfigError("it has a header and no rows")
    records = [(line, _record(header, cells, line)) for line, cells in rows[1:]]
    for columns, fault, is_at_fault in _FAULTS:
        _refuse_cells(records, columns, fault, is_at_fault)
    for column in _IDENTIFIERS:
        _refuse_floats(records, column)
    images = [(line, _image(record)) for line, record in records]
    _refuse_repeated_ids(images)
    _refuse_disagreement(images, "center_id", lambda image: image.center_id)
    _refuse_disagreement(images, "label", lambda image: image.label or "")
    _refuse_unclear_labels(images)
    return [image for _, image in images]


def unlabelled(images: Sequence[Image]) -> str:
    """Returns one line on the rows that have no label and on their texts; empty if no row has a text for a label."""
    without = Counter(image.label_cell for image in images if image.label is None)
    if not without or not any(image.label_cell for image in images):
        return ""
    texts = [f"{_shown(text)} ({count:,})" for text, count in without.most_common()]
    total = without.total()
    return f"{total:,} {'row has' if total == 1 else 'rows have'} no label: {some(texts)}"


def rows_as_written(data: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Returns the header of a CSV that `parse_cohort` accepts, and (patient_id, text) for each row that is not blank.

    The header keeps a byte order mark, and each row its own line ending; a last row without one gets the header's.
    """
    (_, names, header), *rows = _rows(_decoded(data))
    column = _column_names(names).index("patient_id")
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
        raise ConfigError("it has NUL bytes, as UTF-16 does: save it as CSV UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((data[: error.start] + b" ").splitlines())
        raise ConfigError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save it as CSV UTF-8") from None


def _rows(text: str) -> Iterator[tuple[int, list[str], str]]:
    """Yields the number of the last line, the cells and the text of each row that is not blank."""
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


def _column_names(cells: Iterable[str]) -> list[str]:
    """Returns the names of a header; in lower case if they are columns of ours."""
    names = [cell.strip() for cell in cells]
    return [name.lower() if name.lower() in _COLUMNS else name for name in names]


def _header_remedy(text: str) -> str:
    """Returns what to do if the header is not the first line, or its columns are not separated by commas."""
    for number, line in enumerate(text.splitlines()[:_LINES_ABOVE_HEADER], 1):
        for separator, name in _SEPARATORS.items():
            if set(_REQUIRED) <= set(_column_names(cell.strip(' "') for cell in line.split(separator))):
                above = f"the header is in line {number}: delete the lines above it"
                return above if separator == "," else f"its columns are separated by {name}: save it with commas"
    return ""


def _record(header: Sequence[str], cells: Sequence[str], line: int) -> _Record:
    if any(cell.strip() for cell in cells[len(header) :]):  # Excel ends rows in commas
        raise ConfigError(f"line {line} has {len(cells)} cells, the header {len(header)}: quote cells with commas")
    if _column_names(cells) == list(header):
        raise ConfigError(f"line {line} repeats the header, as in joined CSVs: delete that line")
    values = {name: _value(name, cell) for name, cell in zip(header, cells, strict=False) if name in _COLUMNS}
    return dict.fromkeys(_COLUMNS, "") | values


def _value(column: str, cell: str) -> str:
    value = cell.strip()
    return value if column == "uri" else unicodedata.normalize("NFC", value)


def _image(record: _Record) -> Image:
    label, uri, mpp = (None if is_no_value(record[name]) else record[name] for name in ("label", "uri", "mpp"))
    return Image(
        image_id=record["image_id"],
        center_id=record["center_id"],
        patient_id=record["patient_id"],
        image_num=int(record["image_num"].partition(".")[0]),
        label=label,
        uri=None if uri is None else StoreUri(uri),
        mpp=None if mpp is None else float(mpp),
        label_cell=record["label"],
    )


def _has_controls(value: str) -> bool:
    """Returns whether a text can break lines or steer terminals; unusual blanks and joiners, which many scripts need, cannot."""
    return any(c in _BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value)


def _is_no_name(value: str) -> bool:
    return any(c in "/\\" for c in value) or value in (".", "..") or not value.isprintable()


def _is_no_whole_number(value: str) -> bool:
    return not _WHOLE_NUMBER.fullmatch(value) or int(value.partition(".")[0]) > _LARGEST_NUMBER


def _is_no_mpp(value: str) -> bool:
    return not is_no_value(value) and (not _DECIMAL.fullmatch(value) or plausible_mpp(value) is None)


# (columns, what is wrong with the cells at fault, whether a cell is at fault); the first fault of any cell is reported
_FAULTS: tuple[tuple[tuple[str, ...], str, Callable[[str], bool]], ...] = (
    (_IDENTIFIERS, "empty identifiers", lambda value: not value),
    (("image_id", "patient_id"), "identifiers that stand for an empty cell", is_no_value),  # a centre may be called NA
    (_IDENTIFIERS, "path separators, control characters or invisible characters in identifiers", _is_no_name),
    (("label", "uri"), "line breaks or control characters, such as those of right-to-left text", _has_controls),
    ((*_IDENTIFIERS, "label"), f"texts of more than {_LONGEST} characters", lambda value: len(value) > _LONGEST),
    (("uri",), f"URIs of more than {_LONGEST_URI} characters", lambda value: len(value) > _LONGEST_URI),
    (
        (*_IDENTIFIERS, "label"),
        "texts in quotes that are doubled, or not straight double quotes (remove them)",
        lambda value: len(value) > 1 and value[0] in _QUOTES and value[-1] in _QUOTES,
    ),
    (
        _IDENTIFIERS,
        "identifiers that Excel changed to numbers (format the column as text and enter them again)",
        lambda value: re.fullmatch(r"[0-9]([.,][0-9]+)?E\+[0-9]+", value) is not None,
    ),
    (("image_num",), f"image_num must be a whole number, 0 to {_LARGEST_NUMBER:,}", _is_no_whole_number),
    (("mpp",), f"mpp must be {MPP_WANTED}, with a point and no unit", _is_no_mpp),
)


def _refuse_cells(records: _Numbered, columns: Sequence[str], fault: str, is_at_fault: Callable[[str], bool]) -> None:
    found = [
        f"line {line} ({column}{f' {_shown(record[column])}' if record[column] else ''})"
        for line, record in records
        for column in columns
        if is_at_fault(record[column])
    ]
    if found:
        raise ConfigError(f"{fault}: {some(found, separator='; ')}")


def _refuse_floats(records: _Numbered, column: str) -> None:
    """Refuses 55.0 beside 55, and a column of such numbers alone: pandas writes 55.0 if a cell of the column is empty."""
    values = {record[column] for _, record in records}
    floats = {value for value in values if re.fullmatch(r"[0-9]+\.0", value)}
    if floats == values or any(value.removesuffix(".0") in values for value in floats):
        fault = "identifiers that pandas changed to numbers (read the column with dtype=str)"
        _refuse_cells(records, (column,), fault, floats.__contains__)


def _refuse_repeated_ids(images: Sequence[tuple[int, Image]]) -> None:
    lines = _lines_by_value((line, image.image_id) for line, image in images)
    repeated = [f"{named(_public(name))} {_at(at)}" for name, at in lines.items() if len(at) > 1]
    if repeated:
        raise ConfigError(f"image_id is not unique: {some(repeated, separator='; ')}")


def _refuse_disagreement(images: Sequence[tuple[int, Image]], column: str, value_of: Callable[[Image], str]) -> None:
    of_patient: dict[str, list[tuple[int, str]]] = {}
    for line, image in images:
        of_patient.setdefault(image.patient_id, []).append((line, value_of(image)))
    differ = [
        f"patient {named(_public(patient))}: " + _with_lines(lines)
        for patient, values in of_patient.items()
        if len(lines := _lines_by_value(values)) > 1
    ]
    if differ:
        raise ConfigError(f"images of one patient disagree on {column}: {some(differ, separator='; ')}")


def _refuse_unclear_labels(images: Sequence[tuple[int, Image]]) -> None:
    labels = _lines_by_value((line, image.label) for line, image in images if image.label is not None)
    missing = _lines_by_value((line, image.label_cell) for line, image in images if image.label is None)
    n_labelled = sum(map(len, labels.values()))
    for text, at in missing.items():
        if may_be_class(text) and (len(at) >= _MOST_AMBIGUOUS or 20 * len(at) > n_labelled):
            raise ConfigError(
                f"label {quoted(text)} {_at(at)} stands for no label, and is the name of a class in many cohorts",
                "leave the cell empty if there is no label, else give the class another name",
            )
    if groups := [_with_lines({label: labels[label] for label in group}) for group in twins(labels)]:
        raise ConfigError(
            f"labels differ only in case, blanks or as numbers: {some(groups, separator='; ')}: write each class in one way"
        )
    dashes = {text: at for text, at in missing.items() if is_dash(text)}
    if "+" in labels and dashes:
        found = _with_lines({"+": labels["+"], **dashes})
        raise ConfigError(f"labels are {found}, and a dash stands for no label: write positive and negative")


def _lines_by_value(values: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line, value in values:
        found.setdefault(value, []).append(line)
    return found


def _with_lines(lines: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{_shown(value)} {_at(at)}" for value, at in lines.items())


def _at(lines: Sequence[int]) -> str:
    return f"(line{'s' if len(lines) > 1 else ''} {some([str(line) for line in lines], 10)})"


def _public(text: str) -> str:
    """Returns a text of the CSV without the credentials of URIs in it."""
    return "".join(public_uri(part) for part in _URI_BEGINS.split(text))


def _shown(text: str) -> str:
    return quoted(_public(text))

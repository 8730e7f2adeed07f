"""The gate before splits are written and before a model is trained: no patient in two splits, no slide under two names.

The same comparison finds slides to be predicted that the model learned from (`jobs.training.seen`).

Two images are the same slide if they have the same URI, or the same size and either the same etag or the same content. Equal
etags prove that two files are equal; different etags prove nothing (uploads in other parts, Azure), nor do times of
modification. So if files of several splits have equal sizes and no equal etags, they are opened: 16 blocks of 64 KiB, the
first and the last among them, and if these are equal, all bytes. Slides of different sizes are never the same here: a slide
that was compressed anew, or saved with another label image, passes.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass

from jobs.training.table_versions import read_columns
from udfs.wording import some
from udfs.wsi import SlideError
from udfs.wsi.store import File, FileInfo, StorageOptions, public_uri

_BLOCK_BYTES = 64 << 10
_BLOCKS = 16
_CHUNK_BYTES = 8 << 20  # of a whole file, at a time
_READERS = 8


class LeakageError(Exception):
    """Splits that share a patient or a slide: one line with names and remedy."""


@dataclass(frozen=True)
class SlideFile:
    """An image and its file, as table slides has them."""

    image_id: str
    patient_id: str
    uri: str  # as it is opened
    size_bytes: int
    file_version: str  # FileInfo.version


@dataclass(frozen=True)
class Compared:
    """Numbers of images, of files of equal size that were opened, and of files that could not be opened, which pass."""

    images: int
    opened: int
    unreadable: int


def refuse_leaks(
    assignments: Iterable[tuple[str, str]], slides: Iterable[SlideFile], storage_options: StorageOptions | None = None
) -> Compared:
    """Raises LeakageError if a patient or a slide is in two splits; else returns what was compared.

    `assignments` has one (patient_id, split) per row, so that a patient in two splits shows. Slides of patients without a
    split are ignored.
    """
    splits: dict[str, set[str]] = defaultdict(set)
    for patient_id, split in assignments:
        splits[patient_id].add(split)
    double = [f"{patient} ({' and '.join(sorted(of))})" for patient, of in sorted(splits.items()) if len(of) > 1]
    if double:
        raise LeakageError(
            f"{len(double)} patients are in two splits: {some(double, separator='; ')}: let each have one row in table "
            "splits, and run the splits job again"
        )
    split_of = {patient: next(iter(of)) for patient, of in splits.items()}
    files = sorted((slide for slide in slides if slide.patient_id in split_of), key=lambda slide: slide.image_id)
    leaks, compared = shared_slides([(file, split_of[file.patient_id]) for file in files], storage_options)
    if leaks:
        raise LeakageError(
            f"{len(leaks)} slides are in two splits under two names: {some(leaks, separator='; ')}: take one of each "
            "out of the CSV and tables splits and patients, or give both rows one patient_id, and split again"
        )
    return compared


def slide_files(table_uri: str, storage_options: StorageOptions | None = None) -> list[SlideFile]:
    """Returns the files of table slides as it is now, read without Spark.

    The table's URIs have no secrets: a file that only a signed URL opens cannot be compared by content.
    """
    columns = ["image_id", "patient_id", "uri", "size_bytes", "file_version"]
    _, rows = read_columns(table_uri, columns, storage_options=storage_options)
    return [SlideFile(**row) for row in rows.to_pylist() if row["size_bytes"] and row["uri"]]


@dataclass(frozen=True, eq=False)
class _Placed:
    """An image in its part. Two are equal only if they are the same object, since tables may share names."""

    file: SlideFile
    part: str


_Key = Callable[[_Placed], Hashable]


def shared_slides(
    slides: Sequence[tuple[SlideFile, str]], storage_options: StorageOptions | None = None
) -> tuple[list[str], Compared]:
    """Returns one text per file that images of several parts share, and what was compared. Each slide comes with its part."""
    placed = [_Placed(file, part) for file, part in slides]
    known: set[_Placed] = set()
    texts: list[str] = []
    opened = unreadable = 0

    def note(of: Iterable[_Placed], key: _Key, how: Callable[[SlideFile], str]) -> None:
        for group in _groups(of, key):
            if not known.issuperset(group):
                known.update(group)
                names = (f"{each.file.image_id} (patient {each.file.patient_id}, {each.part})" for each in group)
                texts.append(f"{' is '.join(names)} by {how(group[0].file)}")

    # Size and version beside the URI: the table has one URI for two that differ only in their query.
    note(
        placed,
        lambda each: (each.file.uri, each.file.size_bytes, each.file.file_version),
        lambda file: f"its URI {public_uri(file.uri)}",
    )
    note(
        [each for each in placed if _is_etag(each.file.file_version)],
        lambda each: (each.file.size_bytes, each.file.file_version),
        lambda file: f"size and etag {file.file_version}",
    )
    for of_size in _groups((each for each in placed if each not in known), lambda each: each.file.size_bytes):
        sampled = _hashes(of_size, storage_options, whole=False)
        opened += len(sampled)
        unreadable += len(of_size) - len(sampled)
        for alike in _groups(sampled, sampled.get):
            whole = _hashes(alike, storage_options, whole=True)
            note(whole, whole.get, lambda file: f"content ({file.size_bytes:,} bytes)")
    return texts, Compared(len(placed), opened, unreadable)


def _groups(of: Iterable[_Placed], key: _Key) -> list[list[_Placed]]:
    """Returns the images of equal keys that are in several parts."""
    found: dict[Hashable, list[_Placed]] = defaultdict(list)
    for each in of:
        found[key(each)].append(each)
    return [group for group in found.values() if len({each.part for each in group}) > 1]


def _is_etag(version: str) -> bool:
    """Returns whether a `FileInfo.version` ends in a store's etag, not in a time, which is a float or a date."""
    end = version.partition("-")[2]
    if not re.fullmatch(r"[\w+/=.-]+", end):  # dates have spaces or colons; weak etags have a quote, and promise less
        return False
    try:
        float(end)
    except ValueError:
        return True
    return False


def _hashes(files: Sequence[_Placed], storage_options: StorageOptions | None, *, whole: bool) -> dict[_Placed, bytes]:
    """Returns hashes of all bytes of some files, or of some blocks; files that cannot be read have none."""

    def hashed(each: _Placed) -> bytes | None:
        file, digest = each.file, hashlib.sha256()
        with (
            suppress(SlideError),
            closing(File(file.uri, storage_options, FileInfo(file.size_bytes, file.file_version))) as opened,
        ):
            starts, most = list(range(0, file.size_bytes, _CHUNK_BYTES)), _CHUNK_BYTES
            if not whole and file.size_bytes > _BLOCKS * _BLOCK_BYTES:
                last = file.size_bytes - _BLOCK_BYTES
                starts, most = [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)], _BLOCK_BYTES
            for start in starts:
                digest.update(opened.request(start, min(most, file.size_bytes - start)).result())
            return digest.digest()
        return None

    with ThreadPoolExecutor(_READERS) as pool:  # an error or a signal cancels the reads that wait, as `map` does
        found = zip(files, pool.map(hashed, files), strict=True)
        return {each: value for each, value in found if value is not None}

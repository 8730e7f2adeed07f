"""The gate before splits are written and before a model is trained: no patient in two splits, no slide under two names.

The same comparison tells slides to be predicted that the model learned from (`jobs.training.seen`).

Two images are the same slide where they have the same URI, or the same size and either the same etag or the same content.
A store's etag says so by itself when two are equal; when they differ it says nothing (uploads in other parts, Azure), and
times of modification say nothing either way. So where sizes are equal across splits to the byte, and no etag decides, the
files are opened: 16 blocks of 64 KiB, the first and the last among them, and where those are equal all bytes. Slides of
different sizes are never the same here: a slide that was compressed anew, or saved with another label image, passes.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.training.tables.table_columns import read_columns
from udfs.wording import some
from udfs.wsi import SlideError
from udfs.wsi.store import File, FileInfo, StorageOptions, public_uri

_BLOCK_BYTES = 64 << 10
_BLOCKS = 16
_CHUNK_BYTES = 8 << 20  # of a whole file, at a time
_READERS = 8


class LeakageError(Exception):
    """What a model is to be tested on would be trained on: one line that names who and where."""


@dataclass(frozen=True)
class SlideFile:
    """An image and the file that it is, as table slides has them."""

    image_id: str
    patient_id: str
    uri: str  # as it is opened
    size_bytes: int
    file_version: str  # FileInfo.version


@dataclass(frozen=True)
class Compared:
    """What the gate looked at: images, files of equal size that were opened, and those of them that could not be, which pass."""

    images: int
    opened: int
    unreadable: int


def refuse_leaks(
    assignments: Iterable[tuple[str, str]],
    slides: Iterable[SlideFile],
    storage_options: StorageOptions | None = None,
) -> Compared:
    """Let pass what does not leak.

    Args:
        assignments: (patient_id, split), a row each, so that a patient in two splits shows.
        slides: their slides; those of patients without a split are not looked at.
        storage_options: for fsspec.

    Raises:
        LeakageError: one line.
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


def shared_slides(
    slides: Sequence[tuple[SlideFile, str]], storage_options: StorageOptions | None = None
) -> tuple[list[str], Compared]:
    """Return a text for each file that images of several parts are, and what was looked at.

    Args:
        slides: each with the part that it is in, such as a split.
        storage_options: for fsspec.
    """
    placed = [_Placed(file, part) for file, part in slides]
    content = _Content(storage_options)
    shared = [
        f"{' is '.join(f'{each.file.image_id} (patient {each.file.patient_id}, {each.part})' for each in same)} by {how}"
        for same, how in _same_files(placed, content)
    ]
    return shared, Compared(len(placed), content.opened, content.unreadable)


def slide_files(table_uri: str, storage_options: StorageOptions | None = None) -> list[SlideFile]:
    """The files of table slides as it is now, read without Spark.

    URIs are as the table has them, without secrets: what only a signed URL opens can't be compared by content.
    """
    columns = ["image_id", "patient_id", "uri", "size_bytes", "file_version"]
    _, rows = read_columns(table_uri, columns, storage_options=storage_options)
    return [SlideFile(**row) for row in rows.to_pylist() if row["size_bytes"] and row["uri"]]


@dataclass(frozen=True, eq=False)
class _Placed:
    """An image in its part; two are one only if they are the same object, for tables may share names."""

    file: SlideFile
    part: str


def _same_files(files: Sequence[_Placed], content: "_Content") -> Iterator[tuple[list[_Placed], str]]:
    """Groups of images of several parts that are one file, and by what that is known; each image in one group at most."""

    def groups(of: Iterable[_Placed], key: Callable[[_Placed], Hashable | None]) -> list[list[_Placed]]:
        found: dict[Hashable, list[_Placed]] = defaultdict(list)
        for each in of:
            if (value := key(each)) is not None:
                found[value].append(each)
        return [group for group in found.values() if len({each.part for each in group}) > 1]

    told: set[_Placed] = set()

    def new(group: list[_Placed]) -> bool:
        unknown = not told.issuperset(group)
        told.update(group)
        return unknown

    # Size and version beside it: of URIs that differ in their query alone, the table has one and the same.
    for group in groups(files, lambda each: (each.file.uri, each.file.size_bytes, each.file.file_version)):
        if new(group):
            yield group, f"its URI {public_uri(group[0].file.uri)}"
    for of_size in groups(files, lambda each: each.file.size_bytes):
        for group in groups(of_size, lambda each: each.file.file_version if _is_etag(each.file.file_version) else None):
            if new(group):
                yield group, f"size and etag {group[0].file.file_version}"
        left = [each for each in of_size if each not in told]
        if len({each.part for each in left}) < 2:
            continue
        for alike in groups(left, content.sampled(left)):
            for group in groups(alike, content.whole(alike)):
                if new(group):
                    yield group, f"content ({group[0].file.size_bytes:,} bytes)"


def _is_etag(version: str) -> bool:
    """Whether a `FileInfo.version` ends in a store's etag, not in a time: a float or a date."""
    _, _, told = version.partition("-")
    if not re.fullmatch(r"[\w+/=.-]+", told):  # dates have spaces or colons; weak etags a quote, and promise less
        return False
    try:
        float(told)
    except ValueError:
        return True
    return False


class _Content:
    """Hashes of files; those that can't be read have none."""

    def __init__(self, storage_options: StorageOptions | None) -> None:
        self.opened = self.unreadable = 0
        self._options = storage_options

    def sampled(self, files: Sequence[_Placed]) -> Callable[[_Placed], bytes | None]:
        """The hash of some blocks of each of these files."""
        hashes = self._hashes(files, whole=False)
        self.opened += len(hashes)
        self.unreadable += len(files) - len(hashes)
        return hashes.get

    def whole(self, files: Sequence[_Placed]) -> Callable[[_Placed], bytes | None]:
        """The hash of all bytes of each of these files."""
        return self._hashes(files, whole=True).get

    def _hashes(self, files: Sequence[_Placed], *, whole: bool) -> dict[_Placed, bytes]:
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda each: self._hash(each.file, whole=whole), files)
            return {each: value for each, value in zip(files, found, strict=True) if value is not None}

    def _hash(self, file: SlideFile, *, whole: bool) -> bytes | None:
        digest = hashlib.sha256()
        try:
            opened = File(file.uri, self._options, FileInfo(file.size_bytes, file.file_version))
            try:
                for start, count in _parts(file.size_bytes, whole=whole):
                    digest.update(opened.request(start, count).result())
            finally:
                opened.close()
        except SlideError:
            return None
        return digest.digest()


def _parts(size_bytes: int, *, whole: bool) -> list[tuple[int, int]]:
    """(start, count) of what is read of a file."""
    if whole or size_bytes <= _BLOCKS * _BLOCK_BYTES:
        return [(start, min(_CHUNK_BYTES, size_bytes - start)) for start in range(0, size_bytes, _CHUNK_BYTES)]
    last = size_bytes - _BLOCK_BYTES
    return [(last * i // (_BLOCKS - 1), _BLOCK_BYTES) for i in range(_BLOCKS)]

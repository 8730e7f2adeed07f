"""The gate before splits are written and before a model is trained: no patient in two splits, no slide under two names.

Two images are the same slide where they have the same URI, or the same size and either the same etag or the same content.
A store's etag says so by itself when two are equal; when they differ it says nothing (uploads in other parts, Azure), and
times of modification say nothing either way. So where sizes are equal across splits to the byte, and no etag decides, the
files are opened: 16 blocks of 64 KiB, the first and the last among them, and where those are equal all bytes. Slides of
different sizes are never the same here: a slide that was compressed anew, or saved with another label image, passes.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.training.tables.columns import read_columns
from udfs.telling import some
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
    content = _Content(storage_options)
    leaks = [
        f"{' is '.join(f'{file.image_id} (patient {file.patient_id}, {split_of[file.patient_id]})' for file in same)} by {how}"
        for same, how in _same_files(files, split_of, content)
    ]
    if leaks:
        raise LeakageError(
            f"{len(leaks)} slides are in two splits under two names: {some(leaks, separator='; ')}: take one of each "
            "out of the CSV and tables splits and patients, or give both rows one patient_id, and split again"
        )
    return Compared(len(files), content.opened, content.unreadable)


def slide_files(table_uri: str, storage_options: StorageOptions | None = None) -> list[SlideFile]:
    """The files of table slides as it is now, read without Spark.

    URIs are as the table has them, without secrets: what only a signed URL opens can't be compared by content.
    """
    columns = ["image_id", "patient_id", "uri", "size_bytes", "file_version"]
    _, rows = read_columns(table_uri, columns, storage_options=storage_options)
    return [SlideFile(**row) for row in rows.to_pylist() if row["size_bytes"] and row["uri"]]


def _same_files(
    files: Sequence[SlideFile], split_of: Mapping[str, str], content: "_Content"
) -> Iterator[tuple[list[SlideFile], str]]:
    """Groups of images of several splits that are one file, and by what that is known; each image in one group at most."""

    def groups(of: Iterable[SlideFile], key: Callable[[SlideFile], Hashable | None]) -> list[list[SlideFile]]:
        found: dict[Hashable, list[SlideFile]] = defaultdict(list)
        for file in of:
            if (value := key(file)) is not None:
                found[value].append(file)
        return [group for group in found.values() if len({split_of[file.patient_id] for file in group}) > 1]

    told: set[str] = set()

    def new(group: list[SlideFile]) -> bool:
        unknown = not told.issuperset(file.image_id for file in group)
        told.update(file.image_id for file in group)
        return unknown

    # Size and version beside it: of URIs that differ in their query alone, the table has one and the same.
    for group in groups(files, lambda file: (file.uri, file.size_bytes, file.file_version)):
        if new(group):
            yield group, f"its URI {public_uri(group[0].uri)}"
    for of_size in groups(files, lambda file: file.size_bytes):
        for group in groups(of_size, lambda file: file.file_version if _is_etag(file.file_version) else None):
            if new(group):
                yield group, f"size and etag {group[0].file_version}"
        left = [file for file in of_size if file.image_id not in told]
        if len({split_of[file.patient_id] for file in left}) < 2:
            continue
        for alike in groups(left, content.sampled(left)):
            for group in groups(alike, content.whole(alike)):
                if new(group):
                    yield group, f"content ({group[0].size_bytes:,} bytes)"


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

    def sampled(self, files: Sequence[SlideFile]) -> Callable[[SlideFile], bytes | None]:
        """The hash of some blocks of each of these files."""
        hashes = self._hashes(files, whole=False)
        self.opened += len(hashes)
        self.unreadable += len(files) - len(hashes)
        return lambda file: hashes.get(file.image_id)

    def whole(self, files: Sequence[SlideFile]) -> Callable[[SlideFile], bytes | None]:
        """The hash of all bytes of each of these files."""
        hashes = self._hashes(files, whole=True)
        return lambda file: hashes.get(file.image_id)

    def _hashes(self, files: Sequence[SlideFile], *, whole: bool) -> dict[str, bytes]:
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda file: self._hash(file, whole=whole), files)
            return {file.image_id: value for file, value in zip(files, found, strict=True) if value is not None}

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

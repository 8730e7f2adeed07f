"""The feed: bags of the patients of one version of a table, every patient exactly once an epoch."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.training.bags import Bag, Bags, pack
from jobs.training.decoding import COLUMNS, EMBEDDINGS, Decoder
from jobs.training.epochs import Patient, Turn, n_steps, plan_epoch
from jobs.training.errors import FeedError
from jobs.training.pinned import PinnedTable, chosen_rows, pin_table
from jobs.training.reading import OPENERS, Gate, Reader, Wanted

Backend = Literal["auto", "petastorm", "pyarrow"]


def make_feed(
    table_uri: str,
    version: int | None = None,
    *,
    split: str | Sequence[str] | None = None,
    patients: Collection[str] | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 1,
    bag_size: int | None = None,
    seed: int = 0,
    columns: Sequence[str] = ("embeddings_avg",),
    classes: Sequence[str] | None = None,
    backend: Backend = "auto",
    storage_options: Mapping[str, Any] | None = None,
    threads: int = 2,
    shuffle: bool = True,
) -> "Feed":
    """Open one version of a table patients to train on.

    Args:
        table_uri: of the Delta table: a path or an fsspec URI.
        version: of the table; None: the newest, which `Feed.version` then tells.
        split: only patients whose column `split` is this, or one of these.
        patients: only these patient_ids; not together with `split`.
        shard: (rank, number of shards). Each patient is fed by one shard. All shards have equally many steps; one that runs
            out of patients gets a step with a patient that it had, marked in `Bags.repeated`.
        batch_size: patients a step.
        bag_size: tiles sampled of each patient, anew each epoch: without replacement; where a patient has fewer, all of
            them and random ones again. None: all tiles as they are.
        seed: of the order and of the samples.
        columns: of embeddings_avg, embeddings_max (at least one of the two), color_histogram, tile_index.
        classes: labels in the order of their numbers; None: all labels of this version, sorted.
        backend: what reads the rows. auto: petastorm where it can be imported, else pyarrow alone; both feed the same.
        storage_options: for fsspec.
        threads: that read and decode. The order does not depend on them.
        shuffle: another order each epoch; else the table's.

    Raises:
        FeedError: the table, the version or the patients can't be fed; says why and the remedy.
        ValueError: an argument that can't be.
    """
    _check(split, patients, shard, batch_size, bag_size, columns, threads)
    table = pin_table(table_uri, version)
    named = [split] if isinstance(split, str) else split
    rows = chosen_rows(table, named, None if patients is None else list(patients))
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise FeedError(
            f"version {table.version} of {table.uri} has no column {', '.join(missing)}: run the patients job"
        )
    return Feed(
        table,
        rows,
        shard,
        batch_size,
        bag_size,
        seed,
        columns,
        classes,
        *_reader(backend),
        threads=threads,
        shuffle=shuffle,
    )


class Feed:
    """One version of a table, some of its patients, one shard of them. Made by `make_feed`."""

    def __init__(
        self,
        table: PinnedTable,
        rows: Sequence[int],
        shard: tuple[int, int],
        batch_size: int,
        bag_size: int | None,
        seed: int,
        columns: Sequence[str],
        classes: Sequence[str] | None,
        backend: str,
        reader: Reader,
        *,
        threads: int,
        shuffle: bool,
    ) -> None:
        self._table, self._reader = table, reader
        self._shard, self._batch_size, self._bag_size = shard, batch_size, bag_size
        self._seed, self._threads, self._shuffle = seed, threads, shuffle
        self.backend = backend
        """What reads the rows: petastorm or pyarrow."""
        self.version = table.version
        """The Delta version that is fed, whatever is written meanwhile."""
        self.columns = tuple(name for name in COLUMNS if name in columns)
        chosen = table.rows.take(rows).to_pydict()
        present = sorted({label for label in table.rows["label"].to_pylist() if label is not None})
        self.classes: tuple[str, ...] = tuple(present if classes is None else classes)
        """Labels; the index is what `Bags.label` holds."""
        dtypes = {dtype or "float32" for dtype in chosen["embedding_dtype"]}
        self.dtype = "float16" if dtypes == {"float16"} else "float32"
        """Of the embeddings fed: float16 where all patients' are, else float32."""
        dims = sorted(set(chosen["embedding_dim"]))
        if len(dims) > 1:
            raise FeedError(f"{table.uri} has embeddings of {dims} columns: run the patients job with one encoder")
        n_bags = sum(name in EMBEDDINGS for name in self.columns)
        self.dim = dims[0] * n_bags
        """Columns of `Bags.embeddings`."""
        self.patients: list[Patient] = self._patients(rows, chosen)
        """Of all shards, in the order of the table."""
        self.n_steps = n_steps(len(rows), shard[1], batch_size)
        """Steps an epoch, equal on all shards."""
        rank, world = shard
        self.n_patients = len(rows) * (rank + 1) // world - len(rows) * rank // world
        """Of this shard."""

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Bags]:
        """The steps of an epoch, from `first_step` on: the same patients, tiles and order each time it is asked for.

        Bags wait in memory for their turn: at most 512 MiB (`reading.AHEAD_BYTES`) or one row group if that has more,
        beside the row group that each thread is at.

        Raises:
            FeedError: a patient came not at all or twice, a row is not the one that was planned, a file is gone.
        """
        steps = self._steps(number)[first_step:]
        due = Counter(turn.patient.patient_id for step in steps for turn in step)
        wanted, place = self._wanted(steps)
        gate = Gate(wanted)
        decoder = Decoder(self.columns, self.dtype, self._bag_size, self._seed, number)
        parts = self._reader(wanted, decoder, gate, self._threads)
        here: dict[str, Bag] = {}
        came: set[str] = set()
        try:
            for step in steps:
                bags = []
                for turn in step:
                    patient = turn.patient.patient_id
                    while patient not in here:
                        gate.need(place[turn.patient.group])
                        self._add(next(parts, None), here, came, due)
                    bags.append(here[patient])
                    due[patient] -= 1
                    if not due[patient]:
                        gate.use(here.pop(patient).n_bytes)
                yield _packed(bags, step)
                del bags
            if next(parts, None) is not None:
                raise FeedError(
                    f"epoch {number}: a row group came twice: this is a fault of the feed, please report it"
                )
        finally:
            gate.close()
            parts.close()
        self._check_whole(number, steps, came, due)

    def _steps(self, number: int) -> list[list[Turn]]:
        return plan_epoch(self.patients, self._shard, self._batch_size, self._seed, number, self._shuffle)

    def _add(self, part: dict[str, Bag] | None, here: dict[str, Bag], came: set[str], due: Mapping[str, int]) -> None:
        if part is None:
            short = sorted(set(due) - came)
            raise FeedError(
                f"{len(short)} patients did not come, {', '.join(short[:5])} among them: this is a fault of the feed, please "
                "report it"
            )
        twice = came & part.keys()
        if twice:
            raise FeedError(
                f"patients {', '.join(sorted(twice)[:5])} came twice: this is a fault of the feed, please report it"
            )
        came.update(part)
        here.update(part)

    def _check_whole(self, number: int, steps: Sequence[Sequence[Turn]], came: set[str], due: Counter[str]) -> None:
        """Every patient of the shard once, by count and by name."""
        planned = [turn.patient.patient_id for step in steps for turn in step if not turn.repeated]
        missing = sorted(patient for patient, count in due.items() if count)
        if missing or not came >= set(planned) or len(set(planned)) != len(planned):
            raise FeedError(
                f"epoch {number}: {len(planned)} patients planned, {len(came)} came, not fed: {missing[:5]}: this is a fault "
                "of the feed, please report it"
            )

    def _wanted(self, steps: Sequence[Sequence[Turn]]) -> tuple[list[Wanted], dict[int, int]]:
        """Row groups in the order that the steps need them, and each one's place in it."""
        patients: dict[int, dict[str, Patient]] = {}
        for step in steps:
            for turn in step:
                patients.setdefault(turn.patient.group, {})[turn.patient.patient_id] = turn.patient
        wanted = []
        for number, those in patients.items():
            group = self._table.groups[number]
            wanted.append(Wanted(Path(self._table.files[group.file].uri), group.index, list(those.values())))
        return wanted, {number: i for i, number in enumerate(patients)}

    def _patients(self, rows: Sequence[int], chosen: Mapping[str, list[Any]]) -> list[Patient]:
        number = {label: i for i, label in enumerate(self.classes)}
        unknown = sorted({label for label in chosen["label"] if label is not None and label not in number})
        if unknown:
            raise FeedError(
                f"{self._table.uri} has patients of {', '.join(unknown)}, the classes are {', '.join(self.classes)}: correct "
                "the labels, or train on all of them"
            )
        ends = np.cumsum([group.n_rows for group in self._table.groups])
        n_bags = sum(name in EMBEDDINGS for name in self.columns)
        patients = []
        for i, row in enumerate(rows):
            group = int(np.searchsorted(ends, row, side="right"))
            n_tiles, dim = chosen["n_tiles"][i], chosen["embedding_dim"][i]
            size = (self._bag_size or n_tiles) * dim * n_bags * np.dtype(self.dtype).itemsize
            patients.append(
                Patient(
                    patient_id=chosen["patient_id"][i],
                    center_id=chosen["center_id"][i] or "",
                    label=-1 if chosen["label"][i] is None else number[chosen["label"][i]],
                    n_tiles=n_tiles,
                    dim=dim,
                    dtype=chosen["embedding_dtype"][i] or "float32",
                    params_hash=chosen["params_hash"][i] or "",
                    file=self._table.groups[group].file,
                    group=group,
                    row=row - int(ends[group]) + self._table.groups[group].n_rows,
                    n_bytes=size,
                )
            )
        return patients


def _packed(bags: Sequence[Bag], step: Sequence[Turn]) -> Bags:
    patients = [turn.patient for turn in step]
    return pack(
        bags,
        [patient.patient_id for patient in patients],
        [patient.center_id for patient in patients],
        [patient.label for patient in patients],
        [turn.repeated for turn in step],
    )


def _reader(backend: Backend) -> tuple[str, Reader]:
    name = "pyarrow" if backend == "auto" else backend
    return name, OPENERS[name]()


def _check(
    split: str | Sequence[str] | None,
    patients: Collection[str] | None,
    shard: tuple[int, int],
    batch_size: int,
    bag_size: int | None,
    columns: Sequence[str],
    threads: int,
) -> None:
    if split is not None and patients is not None:
        raise ValueError("both split and patients say who is fed: give one")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard {shard}: the rank must be from 0 to {shard[1] - 1}")
    for name, value in (("batch_size", batch_size), ("bag_size", bag_size), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be 1 or more")
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or not set(columns) & set(EMBEDDINGS):
        raise ValueError(f"columns {', '.join(columns)}: choose of {', '.join(COLUMNS)}, at least one of the first two")

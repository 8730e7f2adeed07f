"""The feed: bags of the patients of one version of a table, every patient exactly once an epoch; and the feed as a Dataset."""

import logging
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset

from jobs.training.feed.bags import COLUMNS, EMBEDDINGS, Bag, Bags, Decoder, pack
from jobs.training.feed.choosing import choose
from jobs.training.feed.delivery import delivered, groups_of, reader_of
from jobs.training.feed.epochs import FedPatient, Turn, n_steps, part_of, plan_epoch
from jobs.training.feed.row_groups import Gate, Part, RowGroupReader
from jobs.training.refusals import FeedError, refuse_workers, worker_share
from jobs.training.table_versions import PinnedTable, pin_table, version_lost
from udfs.wsi.prefetch import prefetch

_log = logging.getLogger("slidelake.training")
_FAULT = "this is a fault of the feed, please report it"

Backend = Literal["auto", "petastorm", "pyarrow"]


def make_feed(
    table_uri: str,
    version: int | None = None,
    *,
    encoder: str | None = None,
    split: str | Sequence[str] | None = None,
    patients: Collection[str] | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 1,
    bag_size: int | None = None,
    seed: int = 0,
    columns: Sequence[str] = ("embeddings",),
    classes: Sequence[str] | None = None,
    backend: Backend = "auto",
    storage_options: Mapping[str, Any] | None = None,
    threads: int = 2,
    shuffle: bool = True,
) -> "Feed":
    """Opens one version of a table patients to train on.

    Args:
        table_uri: path or fsspec URI of the Delta table.
        version: of the table; None: the newest, see `Feed.version`.
        encoder: whose bags are fed; None: the only one in this version.
        split: only patients whose column `split` is this, or one of these.
        patients: only these patient_ids; not together with `split`.
        shard: (rank, number of shards). Each patient is fed by one shard. All shards have equally many steps; one that runs
            out of patients gets a step with a patient that it had, marked in `Bags.repeated`. Workers of a DataLoader are no
            shards: `FeedDataset` shares the steps of a shard among them.
        batch_size: patients per step.
        bag_size: tiles sampled of each patient, anew each epoch, without replacement. A patient with fewer gives all of them
            and random ones again. None: all tiles.
        seed: of the order and of the samples.
        columns: of embeddings, embeddings_max (at least one of the two), color_histogram, tile_index.
        classes: labels in the order of their numbers; None: all labels of this version, sorted; empty: labels are ignored,
            and all are -1.
        backend: reader of the rows. auto: petastorm if it is installed, pyarrow is old enough for it and it knows the types
            of the files, else pyarrow alone; both feed the same.
        storage_options: for fsspec.
        threads: that read and decode. The order does not depend on them.
        shuffle: another order each epoch; else the table's.

    Raises:
        FeedError: the table, the version or the patients cannot be fed; says why and the remedy.
        ValueError: an argument is wrong.
    """
    if split is not None and patients is not None:
        raise ValueError("split and patients are both given: give one")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard {shard}: the rank must be from 0 to {shard[1] - 1}")
    if shard[1] > 1 and worker_share()[1] > 1:
        raise ValueError(
            f"shard {shard} in a worker of a DataLoader may be a rank's or this worker's: make the feed before the DataLoader "
            "with shard=(rank, world), and FeedDataset shares the steps among its workers"
        )
    for name, value in (("batch_size", batch_size), ("bag_size", bag_size), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be from 0 to {2**32 - 1}")
    if not set(columns) <= set(COLUMNS) or not set(columns) & set(EMBEDDINGS):
        raise ValueError(f"columns {', '.join(columns)}: choose of {', '.join(COLUMNS)}, at least one of the first two")
    ordered = tuple(name for name in COLUMNS if name in columns)
    table = pin_table(table_uri, version, storage_options)
    reader_name, reader = reader_of(backend, bool(table.large & {"patient_id", *ordered}))
    splits = [split] if isinstance(split, str) else split
    encoder = table.encoder_of_bags(encoder)
    fed, fed_classes, dtype, dim = choose(table, encoder, splits, patients, ordered, classes, bag_size)
    _log.info("feed of %d patients of %s, encoder %s, read by %s", len(fed), table.name, encoder, reader_name)
    how = (shard, batch_size, bag_size, seed, threads, shuffle)
    return Feed(table, encoder, fed, fed_classes, dtype, dim, ordered, reader_name, reader, *how)


@dataclass
class Feed:
    """One version of a table, one encoder, some of its patients, one shard of them. Made by `make_feed`."""

    table: PinnedTable
    encoder: str  # whose bags are fed
    patients: list[FedPatient]  # of all shards, in the order of the table
    classes: tuple[str, ...]  # labels; `Bags.label` holds indices into them
    dtype: str  # of `Bags.embeddings`: float16 if the bags of all patients are, else float32
    dim: int  # columns of `Bags.embeddings`
    columns: tuple[str, ...]  # as requested, in the order in which they stand side by side
    backend: str  # the reader of the rows: petastorm or pyarrow
    reader: RowGroupReader
    shard: tuple[int, int]
    batch_size: int
    bag_size: int | None
    seed: int
    threads: int
    shuffle: bool

    def __post_init__(self) -> None:
        """Counts what a trainer asks for."""
        self.version = self.table.version  # that is fed, whatever is written later
        self.n_steps = n_steps(len(self.patients), self.shard[1], self.batch_size)  # per epoch, equal on all shards
        self.n_patients = len(part_of(self.patients, self.shard))  # of this shard

    def epoch(self, number: int, first_step: int = 0) -> Generator[Bags]:
        """Yields the steps of an epoch, from `first_step` on: the same patients, tiles and order each time.

        Bags wait in memory for their turn: at most 512 MiB (`row_groups.AHEAD_BYTES`), or one row group if it has more,
        beside the row group that each thread is at, and the step after the one that is in use.

        Raises:
            FeedError: a patient did not come or came twice, a row is not the planned one, a file is gone; or this is one of
                several workers of a DataLoader, which `FeedDataset` is for.
            RuntimeError: the process was forked since the epoch began.
        """
        refuse_workers("Feed.epoch", "use FeedDataset, whose workers share the steps, or num_workers=0")
        yield from self.epoch_share(number, first_step, 0, 1)

    def epoch_share(self, number: int, first_step: int, worker: int, n_workers: int) -> Generator[Bags]:
        """Yields every n-th step of `epoch` from the w-th on, for worker w of n: a DataLoader takes turns with its workers."""
        plan = plan_epoch(self.patients, self.shard, self.batch_size, self.seed, number, self.shuffle)
        if not 0 <= first_step <= len(plan):
            raise ValueError(f"first_step is {first_step}: an epoch has {len(plan)} steps")
        steps = plan[first_step:][worker::n_workers]
        groups = groups_of(steps)
        gate = Gate([sum(patient.n_bytes for patient in patients) for patients in groups.values()])
        decoder = Decoder(self.columns, self.dtype, self.bag_size, self.seed, number)
        parts = delivered(self.table, groups, decoder, gate, self.reader, self.threads)
        place = {group: i for i, group in enumerate(groups)}
        try:
            yield from prefetch(_batches(steps, parts, gate, place), 1, gate.close)
        except FileNotFoundError as error:
            raise version_lost(self.version, self.table.uri, error) from None


class FeedDataset(IterableDataset[Bags]):
    """The steps of a feed's epochs: `DataLoader(FeedDataset(feed), batch_size=None, num_workers=2)`.

    Batches and their order are the feed's own, whatever the number of workers and however these are started.
    """

    def __init__(self, feed: Feed) -> None:
        """Begins with epoch 0. `feed`: made in the trainer's process, so that all workers read one version of the table."""
        super().__init__()
        self._feed = feed
        # Epoch and first step; persistent workers see what `set_epoch` writes.
        self._begin = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy. Its memory is not shared yet, unless the copy is a DataLoader's own for a worker."""
        self.__dict__.update(state)
        self._begin.share_memory_()

    def set_epoch(self, number: int, first_step: int = 0) -> None:
        """Chooses the epoch, and its first step, that the next loop over the DataLoader yields."""
        self._begin.copy_(torch.tensor([number, first_step]))

    def __len__(self) -> int:
        """Returns the number of steps of an epoch."""
        return self._feed.n_steps

    def __iter__(self) -> Iterator[Bags]:
        """Yields the steps of the epoch; in a worker of a DataLoader, this worker's share of them."""
        number, first_step = self._begin.tolist()
        return self._feed.epoch_share(number, first_step, *worker_share())


def _batches(
    steps: Sequence[Sequence[Turn]], parts: Generator[Part], gate: Gate, place: Mapping[int, int]
) -> Generator[Bags]:
    """Yields the steps, as their patients come. `place`: of each row group in the order of reading.

    Raises:
        FeedError: a patient did not come, came twice, or was not planned.
    """
    due = Counter(turn.patient.patient_id for step in steps for turn in step)
    missing = set(due)
    waiting: dict[str, Bag] = {}
    with closing(parts):
        for step in steps:
            bags = []
            for patient in (turn.patient for turn in step):
                while patient.patient_id not in waiting:
                    gate.need(place[patient.group])
                    waiting |= _expected(next(parts, {}), missing)
                bags.append(waiting[patient.patient_id])
                due[patient.patient_id] -= 1
                if not due[patient.patient_id]:
                    gate.use(waiting.pop(patient.patient_id).n_bytes)
            batch = pack(bags, step)
            del bags
            yield batch
            del batch
        for part in parts:
            _expected(part, missing)


def _expected(part: Part, missing: set[str]) -> Part:
    """Returns a part, and removes its patients from those that are missing."""
    if not part:
        some_of = ", ".join(sorted(missing)[:5])
        raise FeedError(f"{len(missing)} patients did not come, {some_of} among them: {_FAULT}")
    if twice := sorted(part.keys() - missing):
        raise FeedError(f"patients {', '.join(twice[:5])} came twice: {_FAULT}")
    missing.difference_update(part)
    return part

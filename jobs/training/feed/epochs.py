"""Which patient comes when: the order of an epoch, cut into the parts of shards and their steps. Nothing here reads.

The order depends only on where each patient lies, which is known before anything is read. So it is the same for every number
of threads and every speed of disks, and an epoch can begin at any step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import TypeVar

import numpy as np

# Patients are mixed with those of the neighbouring row groups, as many as hold this much.
MIX_BYTES = 256 * 2**20

Item = TypeVar("Item")


@dataclass(frozen=True)
class FedPatient:
    """A patient of the feed, and where its row lies."""

    patient_id: str
    center_id: str  # "" if the table has none
    label: int  # index into Feed.classes; -1 if the table has none
    n_tiles: int
    dim: int  # columns of its bag, as stored
    dtype: str  # of the numbers in it, as stored: float32 or float16
    file: int  # index into PinnedTable.files
    group: int  # number of its row group among the table's, ascending with `file`
    row: int  # in the row group
    n_bytes: int  # of what is fed of it


@dataclass(frozen=True)
class Turn:
    """A patient's turn in a step. `repeated`: it only fills a step that would be empty."""

    patient: FedPatient
    repeated: bool = False


def n_steps(n_patients: int, world: int, batch_size: int) -> int:
    """Returns the number of steps of an epoch, the same on every shard."""
    return ceil(ceil(n_patients / world) / batch_size)


def part_of(items: Sequence[Item], shard: tuple[int, int]) -> Sequence[Item]:
    """Returns a shard's part of all items."""
    first, last = (len(items) * i // shard[1] for i in (shard[0], shard[0] + 1))
    return items[first:last]


def plan_epoch(
    patients: Sequence[FedPatient], shard: tuple[int, int], batch_size: int, seed: int, epoch: int, shuffle: bool
) -> list[list[Turn]]:
    """Returns the steps of one shard in one epoch.

    Files are put in a random order, the same for all shards; so are the row groups of a file and the patients of a row
    group. The whole is cut into one part per shard. So each patient is in exactly one part, parts differ by one patient at
    most, and each shard reads its own files and at most two that it shares. In a part, patients are mixed with those of
    neighbouring row groups (`MIX_BYTES`). Without `shuffle` they come in the order of the table.

    A shard whose part has fewer batches than another's gets one step of a repeated patient.

    `patients` are those of all shards, in the order of the table; `shard` is (rank, number of shards). The last step of a shard
    may have fewer patients than `batch_size`.
    """
    order = _shuffled(patients, np.random.RandomState([seed, epoch])) if shuffle else list(patients)
    part = part_of(order, shard)
    if shuffle:
        part = _mixed(part, np.random.RandomState([seed, epoch, shard[0]]))
    turns = [Turn(patient) for patient in part]
    steps = [turns[i : i + batch_size] for i in range(0, len(turns), batch_size)]
    spare = Turn(part[-1] if part else order[0], repeated=True)
    return steps + [[spare]] * (n_steps(len(order), shard[1], batch_size) - len(steps))


def _shuffled(patients: Sequence[FedPatient], random: np.random.RandomState) -> list[FedPatient]:
    files = _permuted(_runs(patients, lambda patient: patient.file), random)
    groups = [group for file in files for group in _permuted(_runs(file, lambda patient: patient.group), random)]
    return [patient for group in groups for patient in _permuted(group, random)]


def _mixed(patients: Sequence[FedPatient], random: np.random.RandomState) -> list[FedPatient]:
    mixed: list[FedPatient] = []
    together: list[FedPatient] = []
    size, most = 0, MIX_BYTES // 8  # fewer at first, so that the first step starts early
    for group in _runs(patients, lambda patient: patient.group):
        n_bytes = sum(patient.n_bytes for patient in group)
        if together and size + n_bytes > most:
            mixed += _permuted(together, random)
            together, size, most = [], 0, min(2 * most, MIX_BYTES)
        together += group
        size += n_bytes
    return mixed + _permuted(together, random)


def _runs(patients: Sequence[FedPatient], key: Callable[[FedPatient], int]) -> list[list[FedPatient]]:
    return [list(run) for _, run in groupby(patients, key)]


def _permuted(items: Sequence[Item], random: np.random.RandomState) -> list[Item]:
    # RandomState has the same streams in all versions of numpy, so an order that was trained on can be repeated.
    return [items[i] for i in random.permutation(len(items))]

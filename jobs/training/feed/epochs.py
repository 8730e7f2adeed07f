"""Which patient comes when: the order of an epoch, cut into the parts of shards and their steps. Nothing here reads.

The order follows from what is known before anything is read (where each patient lies), so it is the same whatever the
number of threads and the speed of disks, and any step of it can be begun at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import TypeVar

import numpy as np

# Patients are mixed with those of row groups that come together, as many as hold this much.
MIX_BYTES = 256 * 2**20

Item = TypeVar("Item")


@dataclass(frozen=True)
class Patient:
    """A patient of the feed, and where its row lies."""

    patient_id: str
    center_id: str  # "" where the table has none
    label: int  # index into Feed.classes; -1 where the table has none
    n_tiles: int
    dim: int  # columns of its bag, as stored
    dtype: str  # of the numbers in it, as stored: float32 or float16
    params_hash: str  # of the preprocessing that gave this row
    file: int  # index into PinnedTable.files
    group: int  # number of its row group among the table's, ascending with `file`
    row: int  # in the row group
    n_bytes: int  # of what is fed of it


@dataclass(frozen=True)
class Turn:
    """A patient's turn in a step. `repeated` where it only fills a step that would be empty."""

    patient: Patient
    repeated: bool = False


def n_steps(n_patients: int, world: int, batch_size: int) -> int:
    """Steps of an epoch, the same on every shard."""
    return ceil(ceil(n_patients / world) / batch_size)


def part_of(items: Sequence[Item], shard: tuple[int, int]) -> Sequence[Item]:
    """A shard's part of the whole."""
    first, last = (len(items) * i // shard[1] for i in (shard[0], shard[0] + 1))
    return items[first:last]


def plan_epoch(
    patients: Sequence[Patient], shard: tuple[int, int], batch_size: int, seed: int, epoch: int, shuffle: bool
) -> list[list[Turn]]:
    """The steps of one shard in one epoch.

    Files are put in a random order, the same for all shards, so are the row groups of a file and the patients of a row
    group, and the whole is cut into one part a shard. So each patient is in exactly one part, parts differ by one patient
    at most, and each shard reads its own files and at most two that it shares. In a part, patients are mixed with those of
    neighbouring row groups (`MIX_BYTES`). Without `shuffle` they come as they lie in the table.

    A shard whose part has fewer batches than another's gets one step of a repeated patient.

    Args:
        patients: of all shards, in the order of the table.
        shard: rank and number of shards.
        batch_size: patients a step; the last of a shard may have fewer.
        seed: of the order; with `epoch`, all that it depends on.
        epoch: number of the epoch, from 0.
        shuffle: whether to.
    """
    order = _shuffled(patients, np.random.RandomState([seed, epoch])) if shuffle else list(patients)
    part = part_of(order, shard)
    if shuffle:
        part = _mixed(part, np.random.RandomState([seed, epoch, shard[0]]))
    turns = [Turn(patient) for patient in part]
    steps = [turns[i : i + batch_size] for i in range(0, len(turns), batch_size)]
    spare = Turn(part[-1] if part else order[0], repeated=True)
    return steps + [[spare]] * (n_steps(len(order), shard[1], batch_size) - len(steps))


def _shuffled(patients: Sequence[Patient], random: np.random.RandomState) -> list[Patient]:
    files = _permuted(_runs(patients, lambda patient: patient.file), random)
    groups = [group for file in files for group in _permuted(_runs(file, lambda patient: patient.group), random)]
    return [patient for group in groups for patient in _permuted(group, random)]


def _mixed(patients: Sequence[Patient], random: np.random.RandomState) -> list[Patient]:
    mixed: list[Patient] = []
    together: list[Patient] = []
    size, most = 0, MIX_BYTES // 8  # first fewer, so that the first step need not wait for all of them
    for group in _runs(patients, lambda patient: patient.group):
        n_bytes = sum(patient.n_bytes for patient in group)
        if together and size + n_bytes > most:
            mixed += _permuted(together, random)
            together, size, most = [], 0, min(2 * most, MIX_BYTES)
        together += group
        size += n_bytes
    return mixed + _permuted(together, random)


def _runs(patients: Sequence[Patient], key: Callable[[Patient], int]) -> list[list[Patient]]:
    return [list(run) for _, run in groupby(patients, key)]


def _permuted(items: Sequence[Item], random: np.random.RandomState) -> list[Item]:
    # RandomState, since its streams are the same in all versions of numpy: an order that was trained on comes back.
    return [items[i] for i in random.permutation(len(items))]

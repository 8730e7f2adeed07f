"""Whether every patient comes once an epoch: full passes of all shards, by threads, shards and row groups.

``python -m benchmarks.feed_passes --passes 300`` is the run in full, with petastorm; `make test` runs a small one.
"""

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import show
from jobs.training.feed.feed import Backend, Feed, make_feed
from tests.feed.tables import Made, cohort, write

ROWS_A_GROUP = 4
PATIENTS_A_FILE = 100


@dataclass
class Count:
    """What went wrong in how many passes."""

    passes: int = 0
    rows: int = 0
    short: int = 0  # patients that a pass had not
    doubled: int = 0  # times that one came again
    wrong: int = 0  # bags that were not the patient's
    same_order: int = 0  # passes in the order of the one before


def count_passes(
    table: Path, patients: Sequence[Made], backend: Backend, threads: int, shards: int, passes: int
) -> Count:
    """Passes over a table, an epoch each."""
    count = Count()
    feeds = [
        make_feed(str(table), shard=(rank, shards), batch_size=3, threads=threads, backend=backend)
        for rank in range(shards)
    ]
    before: list[str] = []
    for number in range(passes):
        came = [name for feed in feeds for name in _pass(feed, number, patients, count)]
        times = Counter(came)
        count.passes += 1
        count.rows += len(came)
        count.short += sum(times[patient.patient_id] == 0 for patient in patients)
        count.doubled += sum(n - 1 for n in times.values())
        count.same_order += came == before
        before = came
    return count


def _pass(feed: Feed, number: int, patients: Sequence[Made], count: Count) -> list[str]:
    names = []
    for bags in feed.epoch(number):
        for name, bag, repeated in zip(bags.patient_id, bags.split(), bags.repeated.tolist(), strict=True):
            count.wrong += not torch.equal(bag, torch.from_numpy(patients[int(name[1:])].bag()))
            if not repeated:
                names.append(name)
    return names


def main() -> int:
    """All combinations, a line each; 1 where a patient was lost, doubled or another's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feed_passes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--backend", default="petastorm", choices=("petastorm", "pyarrow"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 10])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[12, 200])
    asked, bad = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        for groups in asked.groups:
            patients = cohort(groups * ROWS_A_GROUP)
            files = max(3, len(patients) // PATIENTS_A_FILE)
            table = write(Path(folder, str(groups)), patients, files=files, rows_a_group=ROWS_A_GROUP)
            for threads, shards in itertools.product(asked.threads, asked.shards):
                count = count_passes(table, patients, asked.backend, threads, shards, asked.passes)
                line = {"backend": asked.backend, "groups": groups, "threads": threads, "shards": shards}
                print(show("feed_passes", {**line, **vars(count)}), flush=True)
                bad += count.short + count.doubled + count.wrong
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""One measurement of the feed in a process of its own: `rate TABLE` or `wait TABLE`; prints JSON."""

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter

import pyarrow as pa
import pyarrow.dataset
import torch

from benchmarks.measure import Line, median_seconds, peak_bytes
from jobs.training.feed.feed import Backend, Feed, make_feed
from jobs.training.feed.row_groups import AHEAD_BYTES
from jobs.training.model.mil import AttentionMIL, ModelSpec

_BATCH, _EPOCHS = 8, 2
_READERS: tuple[Backend, ...] = ("petastorm", "pyarrow")


def rate(table: str) -> list[Line]:
    """Whole epochs, nothing done with what comes."""
    feeds = {name: make_feed(table, backend=name) for name in _READERS}
    feed = feeds["petastorm"]
    paths = [file.uri for file in feed.table.files]
    n_patients, n_tiles = len(feed.patients), sum(patient.n_tiles for patient in feed.patients)
    actions: dict[str, Callable[[], object]] = {name: _epochs(each) for name, each in feeds.items()}
    taken = median_seconds({"scan": partial(_scan, paths, n_patients), **actions})
    return [
        {
            "reader": name,
            "patients": n_patients,
            "tiles": n_tiles,
            "gigabytes": n_tiles * feed.dim * 4 / 1e9,
            "patients_per_s": n_patients / taken[name],
            "tiles_per_s": n_tiles / taken[name],
            "scan_tiles_per_s": n_tiles / taken["scan"],
            "of_scan": taken["scan"] / taken[name],
        }
        for name in _READERS
    ]


def _scan(paths: list[str], patients: int) -> None:
    batches = pyarrow.dataset.dataset(paths).to_batches(columns=["patient_id", "embeddings"])
    assert sum(batch.num_rows for batch in batches) == patients


def _epochs(feed: Feed) -> Callable[[], None]:
    numbers = itertools.count()

    def epoch() -> None:
        assert sum(len(bags) for bags in feed.epoch(next(numbers))) == feed.n_patients

    return epoch


def wait(table: str) -> list[Line]:
    """Epochs of training, the clock stopped between what the trainer does and what it waits for."""
    feed = make_feed(table, batch_size=_BATCH)
    model = AttentionMIL(ModelSpec("attention", feed.dim, feed.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    steps, waits = [], []
    for number in range(_EPOCHS):
        epoch = feed.epoch(number)
        while True:
            begun = perf_counter()
            bags = next(epoch, None)
            came = perf_counter()
            waits.append(came - begun)
            if bags is None:
                break
            logits, _ = model(bags)
            loss = torch.nn.functional.cross_entropy(logits, bags.label)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            steps.append(perf_counter() - came)
    line: Line = {
        "reader": feed.backend,
        "batch": _BATCH,
        "steps": len(steps),
        "step_seconds": statistics.median(steps),
        "first_wait_seconds": waits[0],
        "median_wait_seconds": statistics.median(waits),
        "waited_share": sum(waits) / (sum(waits) + sum(steps)),
        "ahead_gigabytes": AHEAD_BYTES / 1e9,
        "peak_gigabytes": peak_bytes() / 1e9,
    }
    return [line]


if __name__ == "__main__":
    pa.set_cpu_count(2)
    torch.set_num_threads(1)
    measured = {"rate": rate, "wait": wait}[sys.argv[1]](sys.argv[2])
    print(json.dumps({"lines": measured}))

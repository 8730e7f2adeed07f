"""What feeds hand out, as plain values: `python -m tests.feed.fed TABLE` prints that, and what petastorm comes to there."""

import hashlib
import json
import sys
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.training.feed import make_feed
from jobs.training.feed.bags import COLUMNS, Bags
from jobs.training.refusals import FeedError


def fed(table: str, backend: Any) -> list[Any]:
    """Two epochs of both shards of split train, once with all tiles and once with a sample: a list a step, in order."""
    return [
        _plain(bags)
        for bag_size in (None, 4)
        for rank in (0, 1)
        for epoch in (0, 1)
        for bags in make_feed(
            table,
            split="train",
            shard=(rank, 2),
            batch_size=3,
            bag_size=bag_size,
            seed=5,
            columns=COLUMNS,
            backend=backend,
        ).epoch(epoch)
    ]


def _plain(bags: Bags) -> list[Any]:
    assert bags.color_histogram is not None and bags.tile_index is not None
    numbers = (bags.embeddings, bags.color_histogram)
    return [
        *(bags.patient_id, bags.center_id, bags.label.tolist(), bags.repeated.tolist(), bags.offsets.tolist()),
        *([str(each.dtype), hashlib.sha256(each.numpy().tobytes()).hexdigest()] for each in numbers),
        [[list(tile) for tile in index.tolist()] for index in bags.tile_index],
    ]


def main(table: str) -> None:
    """Print it as JSON."""
    said = {"pyarrow": pa.__version__, "numpy": np.__version__, "imported": "", "refused": ""}
    try:
        import_module("jobs.training.feed.petastorm_rows")
    except Exception as error:
        said["imported"] = f"{type(error).__name__}: {error}"
    try:
        make_feed(table, backend="petastorm")
    except FeedError as error:
        said["refused"] = str(error)
    auto = make_feed(table).backend
    print(json.dumps(said | {"auto": auto, "fed": {backend: fed(table, backend) for backend in ("auto", "pyarrow")}}))


if __name__ == "__main__":
    main(sys.argv[1])

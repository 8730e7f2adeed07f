"""feed: bags of 100 to 5,000 tiles of 1,280 float32 through the feed, beside a raw scan of the same columns of the same files.

Two cores for each. A line a reader for how fast patients come, and one for how long the trainer waits for them: attention
MIL as `conf/cohort.yaml` has it, in one thread, eight patients a step, whole epochs from their first moment on.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import ColumnProperties, WriterProperties, write_deltalake

from benchmarks import inputs
from benchmarks.machine import on_cores
from benchmarks.measure import Line, in_fresh_process
from udfs.schemas import PATIENTS

_PATIENTS, _DIM = 96, 1280
_FEWEST, _MOST = 100, 5000  # tiles
_A_FILE, _A_GROUP = 8, 4  # patients; Spark's row groups of 128 MiB hold about as many


def run() -> Iterator[Line]:
    """Three lines."""
    table = str(_table())
    with on_cores(2):
        yield from in_fresh_process("benchmarks.feed_process", "rate", table)["lines"]
        yield from in_fresh_process("benchmarks.feed_process", "wait", table)["lines"]


def _table() -> Path:
    """Made once: table patients, its bags of random numbers, which do not compress, as embeddings hardly do."""
    table = inputs.FOLDER / f"patients-{_PATIENTS}"
    if (table / "_delta_log" / f"{_PATIENTS // _A_FILE - 1:020}.json").exists():
        return table
    shutil.rmtree(table, ignore_errors=True)
    random = np.random.default_rng(0)
    sizes = random.permutation(np.linspace(_FEWEST, _MOST, _PATIENTS).astype(int)).tolist()
    # as Spark writes them: no minimum and maximum of bags in the footer, which would be bags again
    properties = WriterProperties(
        compression="SNAPPY",
        max_row_group_size=_A_GROUP,
        write_batch_size=_A_GROUP,
        statistics_truncate_length=64,
        default_column_properties=ColumnProperties(dictionary_enabled=False),
    )
    for first in range(0, _PATIENTS, _A_FILE):
        rows = []
        for number in range(first, first + _A_FILE):
            bag = random.standard_normal((sizes[number], _DIM), np.float32).tobytes()
            rows.append(
                {
                    "patient_id": f"p{number:04d}",
                    "encoder": "benchmark",
                    "center_id": "centre",
                    "label": ("CE", "LAA")[number % 2],
                    "n_tiles": sizes[number],
                    "embedding_dim": _DIM,
                    "embedding_dtype": "float32",
                    "embeddings": bag,
                    "embeddings_max": bag,
                }
            )
        write_deltalake(str(table), pa.Table.from_pylist(rows, PATIENTS), mode="append", writer_properties=properties)
    return table

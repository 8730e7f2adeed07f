"""One worker's memory, `python -m benchmarks.memory_process WHAT RUNTIME PRECISION`: peaks in bytes as JSON.

WHAT is `encode`, tiles to embeddings and nothing else, or `features`, a work unit through the features pass.
"""
# ruff: noqa: PLC0415

import json
import sys
from typing import cast

from benchmarks.measure import peak_bytes
from udfs.wsi.encoder.encoder_spec import Precision, Runtime


def encode(runtime: Runtime, precision: Precision) -> dict[str, int]:
    """The tiles of a batch or more, by the encoder alone."""
    import torch

    from benchmarks import inputs
    from benchmarks.work import encoder_spec
    from udfs.wsi.encoder import Encoder

    torch.set_num_threads(1)
    tiles = inputs.kept_pixels(inputs.section(), 64)
    imported = peak_bytes()
    Encoder(encoder_spec(runtime, precision)).embed(tiles)
    return {"imported_bytes": imported, "peak_bytes": peak_bytes()}


def features(runtime: Runtime, precision: Precision) -> dict[str, int]:
    """A work unit with StainNet's table and the histogram; its rows are handed on and forgotten."""
    import pyarrow as pa

    from benchmarks import inputs
    from benchmarks.work import feature_spec, planned_units
    from udfs.encode_tiles import encode_tiles
    from udfs.schemas import UNITS

    unit = planned_units([inputs.section()])[0]
    imported = peak_bytes()
    for _ in encode_tiles(feature_spec(runtime, precision), "benchmark", tiles_ahead=10**6)(
        [pa.RecordBatch.from_pylist([unit], UNITS)]
    ):
        pass
    return {"imported_bytes": imported, "peak_bytes": peak_bytes(), "tiles": unit["n_tiles"]}


if __name__ == "__main__":
    what, runtime, precision = sys.argv[1:]
    measured = {"encode": encode, "features": features}[what](cast(Runtime, runtime), cast(Precision, precision))
    print(json.dumps(measured))

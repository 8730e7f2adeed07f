"""What the features pass is given in benchmarks: its settings and its work units, as the jobs plan them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from tests.slides.weights import LITE0
from udfs.encode_tiles import FeatureSpec
from udfs.plan_units import plan_units
from udfs.wsi import open_slide
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision, Runtime

BINS, INPUT_PX = 16, 224
_UNIT_TILES = 256  # the default of the jobs

Unit = dict[str, Any]  # a row of `udfs.schemas.UNITS`


def encoder_spec(runtime: Runtime, precision: Precision) -> EncoderSpec:
    """The encoder with real weights."""
    return EncoderSpec(LITE0, str(inputs.lite0_weights()), INPUT_PX, runtime=runtime, precision=precision, device="cpu")


def feature_spec(runtime: Runtime, precision: Precision) -> FeatureSpec:
    """That, StainNet and a histogram."""
    return FeatureSpec({LITE0: encoder_spec(runtime, precision)}, str(inputs.stainnet()), BINS)


def planned_units(paths: Sequence[Path]) -> list[Unit]:
    """The work units of the kept tiles of slides, the costliest first."""
    slides = []
    for path in paths:
        xy_px = inputs.kept_tiles(path)
        with open_slide(str(path)) as slide:
            index = slide.index.to_bytes() if slide.index else None
        row = {"encoder": LITE0, "params_hash": ""}
        constant = {"image_id": path.stem, "patient_id": path.stem, "uri": str(path), "encoders": [row], "index": index}
        reading = {"tile_px": TILE_PX, "level_read": 0, "downsample": 1.0}
        slides.append(constant | reading | {"x_px": xy_px[:, 0].tolist(), "y_px": xy_px[:, 1].tolist()})
    planned = plan_units(_UNIT_TILES)([pa.RecordBatch.from_pylist(slides)])
    units: list[Unit] = [unit for batch in planned for unit in batch.to_pylist()]
    return sorted(units, key=lambda unit: -unit["cost"])


def n_tiles(units: Sequence[Unit]) -> int:
    """Of all of them."""
    return sum(unit["n_tiles"] for unit in units)

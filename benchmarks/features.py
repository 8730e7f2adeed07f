"""features: the features pass by Spark on two cores, beside the same functions in two plain processes; and what takes how long.

Both are warm and take the same work units of two slides, with StainNet, the fastest encoder and the histogram. The steps are
measured alone on one core; `emit` is what remains of the pass there: rows in Arrow's form, and the loop itself.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks import inputs, loop, stage
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line, median_seconds
from benchmarks.processes import CORES, processes
from benchmarks.work import feature_spec, n_tiles, planned_units
from tests.slides.weights import LITE0
from udfs.encode_tiles import encode_tiles
from udfs.schemas import UNITS
from udfs.wsi import open_slide
from udfs.wsi.encoder import Encoder
from udfs.wsi.encoder.resize import resize
from udfs.wsi.quality.histogram import color_histograms
from udfs.wsi.stain.colour_table import StainNormaliser
from udfs.wsi.stain.stain_network import load_stainnet

_ROUNDS, _TILES_OF_STEPS = 3, 128


def run() -> Iterator[Line]:
    """A line for both cores, and one for the steps on one."""
    spec = feature_spec("openvino", "bf16")
    units = planned_units([inputs.section(), inputs.section_flat()])
    with processes(1, stage.prepare, spec, units) as driver, processes(CORES, loop.prepare, spec) as workers:
        taken = median_seconds(
            {"spark": lambda: driver.submit(stage.encode).result(), "loop": partial(loop.encode_all, workers, units)},
            _ROUNDS,
        )
    yield {
        "encoder": "openvino_bf16",
        "cores": CORES,
        "tiles": n_tiles(units),
        "units": len(units),
        "tiles_per_s": n_tiles(units) / taken["spark"],
        "loop_tiles_per_s": n_tiles(units) / taken["loop"],
        "of_loop": taken["loop"] / taken["spark"],
    }
    ms = measured_steps()
    whole = sum(ms.values())
    yield {
        "encoder": "openvino_bf16",
        "cores": 1,
        "tiles": _TILES_OF_STEPS,
        "tiles_per_s": 1000 / whole,
        "ms_per_tile": whole,
        **{f"{name}_ms": spent for name, spent in ms.items()},
        **{f"{name}_share": spent / whole for name, spent in ms.items()},
    }


def measured_steps() -> dict[str, float]:
    """Milliseconds a tile of each step on one core."""
    torch.set_num_threads(1)
    spec = feature_spec("openvino", "bf16")
    unit = loop.cut(planned_units([inputs.section()])[0], _TILES_OF_STEPS)
    xy_px = np.stack([unit["x_px"], unit["y_px"]], axis=1)
    waited: list[float] = []

    def read() -> Iterator[NDArray[np.uint8]]:
        with open_slide(unit["uri"]) as slide:
            yield from (tile for _, tile in slide.read_tiles(xy_px, TILE_PX))
            waited.append(slide.traffic.waited_s)

    encoder = Encoder(spec.encoders[LITE0])
    size = encoder.batch_size
    tiles = np.stack(list(read()))
    batches = [tiles[i : i + size] for i in range(0, len(tiles), size)]
    images = [resize(batch, encoder.input_px, encoder.interpolation) for batch in batches]
    stain = StainNormaliser(load_stainnet(str(spec.stain_weights)), tiles_ahead=10**6)
    steps: dict[str, Callable[[], object]] = {
        "read": lambda: deque(read(), 0),  # keeps none, as the pass does
        "stain": lambda: [stain.normalise(batch) for batch in batches],
        "resize": lambda: [resize(batch, encoder.input_px, encoder.interpolation) for batch in batches],
        "encode": lambda: [encoder.runtime(batch, size) for batch in images],
        "histogram": lambda: [color_histograms(batch, spec.bins) for batch in batches],
    }
    rows = pa.RecordBatch.from_pylist([unit], UNITS)
    encode = encode_tiles(spec, "benchmark", tiles_ahead=10**6)
    ms = {
        name: 1000 * spent / len(tiles)
        for name, spent in median_seconds(steps | {"all": lambda: list(encode([rows]))}).items()
    }
    fetch = 1000 * median(waited) / len(tiles)
    emit = ms.pop("all") - sum(ms.values())
    return {"fetch": fetch, "decode": ms.pop("read") - fetch, **ms, "emit": emit}

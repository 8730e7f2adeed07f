"""`python -m benchmarks.sizing` prints the tables of docs/sizing.md: what each encoder costs in bytes, hours and dollars.

GFLOP are counted by PyTorch's counter over the whole model on its meta device, which calculates nothing: two operations per
multiplication and addition, attention included. What was measured is in `PER_CORE` and `PER_GPU`; the rest is calculated.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.slides.weights import LITE0
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.timm_network import TimmNetwork, random_network
from udfs.wsi.weights.filling import NoInitialValues

TILES = 10_000_000
CORES, CORES_PER_GPU = 64, 16
DOLLARS_PER_CORE_HOUR, DOLLARS_PER_GPU_HOUR = 0.06, 4.00
PEAK_TFLOPS: dict[Precision, float] = {"fp32": 67, "bf16": 989, "fp16": 989}  # of an H200, dense
OF_PEAK = 0.5
MS_BESIDE = 3.6  # per tile of 448 px on a core: reading, StainNet, histogram, rows; benchmark `features`
GPU_US_BESIDE = 39  # per tile on an H200: bus, StainNet's table, histogram, resizing; see `benchmarks.scale`
DECODED_PER_CORE = 550  # tiles/s that a core reads for a GPU; benchmark `scale`

PER_CORE: dict[str, tuple[float, float]] = {
    LITE0: (97.3, 165),
    "efficientnet_b0": (82.3, 109),
    "kaiko-vits16": (10.7, 20.4),
    "h0-mini": (2.08, 3.94),
}
"""Tiles/s of a core in fp32 and bf16 by OpenVINO, from decoded tiles to vectors; benchmark `encode`."""
PER_GPU = {"efficientnet_b0": 9_700.0}
"""Tiles/s of an H200 in bf16, from decoded tiles to vectors; see `benchmarks.scale`."""
_LIKE = {LITE0: "efficientnet_b0"}  # on a GPU: depthwise convolutions are far from half of the peak
ENCODERS = (LITE0, "efficientnet_b0", *(name for name, preset in PRESETS.items() if preset.unavailable is None))
_OF_SPEED = "h0-mini"  # the encoder whose measured operations per second give the speed of those that were not measured

_STORAGE = ("encoder", "dim", "vectors", "float32, kB per tile", "float16, kB per tile", "float32, GB", "float16, GB")
_TIME = (
    "encoder",
    "GFLOP",
    "precision",
    "core fp32, tiles/s",
    "core bf16, tiles/s",
    f"{CORES} cores, h",
    "$",
    "H200, tiles/s",
    "H200, h",
    "$",
)


@cache
def gflop_per_tile(name: str) -> float:
    """Billions of operations of a preset or timm model on one tile."""
    network = _network(name)
    images = torch.zeros(1, network.input_px, network.input_px, 3, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(images)
    return float(counter.get_total_flops()) / 1e9


def stage_per_core(name: str, precision: Precision) -> tuple[float, bool]:
    """Tiles/s of the features stage on a core, and whether the encoder's part was measured. fp16 counts as bf16."""
    like = name if name in PER_CORE else _OF_SPEED
    measured = PER_CORE[like][0 if precision == "fp32" else 1]
    encoded = measured * gflop_per_tile(like) / gflop_per_tile(name)
    return 1 / (1 / encoded + MS_BESIDE / 1000), name in PER_CORE


def per_gpu(name: str) -> tuple[float, bool]:
    """Tiles/s of an H200 in the recommended precision if it never waits for tiles, and whether that was measured."""
    like = _LIKE.get(name, name)
    if like in PER_GPU:
        return PER_GPU[like], name in PER_GPU
    encode_s = gflop_per_tile(name) / (OF_PEAK * 1000 * PEAK_TFLOPS[_precision(name)])
    return 1 / (encode_s + GPU_US_BESIDE / 1e6), False


def tables() -> Iterator[str]:
    """The lines of both tables, in Markdown. Figures that were measured are bold."""
    yield from _table(_STORAGE, [_storage(name) for name in ENCODERS])
    yield ""
    yield from _table(_TIME, [_time(name) for name in ENCODERS])


def _storage(name: str) -> list[str]:
    outputs = _network(name).outputs
    numbers = sum(dim for _, dim in outputs)
    kb = [numbers * size / 1000 for size in (4, 2)]
    gb = [each * TILES / 1e6 for each in kb]
    return [
        f"`{name}`",
        str(outputs[0][1]),
        str(len(outputs)),
        *(f"{each:.1f}" for each in kb),
        *(f"{each:.0f}" for each in gb),
    ]


def _time(name: str) -> list[str]:
    precision = _precision(name)
    cores = [_shown(*stage_per_core(name, each)) for each in ("fp32", "bf16")]
    core_hours = TILES / stage_per_core(name, precision)[0] / 3600
    rate, is_measured = per_gpu(name)
    gpu_hours = TILES / min(rate, CORES_PER_GPU * DECODED_PER_CORE) / 3600
    on_cores = [_digits(core_hours / CORES), _digits(core_hours * DOLLARS_PER_CORE_HOUR)]
    on_gpu = [_digits(gpu_hours), _digits(gpu_hours * DOLLARS_PER_GPU_HOUR)]
    return [
        f"`{name}`",
        _digits(gflop_per_tile(name)),
        precision,
        *cores,
        *on_cores,
        _shown(rate, is_measured),
        *on_gpu,
    ]


def _precision(name: str) -> Precision:
    """The recommended one; of models without a preset bf16."""
    return PRESETS[name].precision if name in PRESETS else "bf16"


@cache
def _network(name: str) -> TimmNetwork:
    with torch.device("meta"), NoInitialValues():
        return random_network(EncoderSpec(name, None))


def _shown(figure: float, is_measured: bool) -> str:
    return f"**{_digits(figure)}**" if is_measured else _digits(figure)


def _digits(figure: float) -> str:
    """Two digits that mean something, and no exponent."""
    return f"{float(f'{figure:.2g}'):,.{2 if figure < 1 else 1 if figure < 10 else 0}f}"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print("\n".join(tables()))

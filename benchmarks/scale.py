"""scale: no measurement but a calculation: how many slides an hour large machines could encode, and what limits them.

From the milliseconds of each step on a core of this machine, measured in the same run, and from these facts:

- An H200 takes 9,700 tiles/s from bytes in the host's memory to vectors and counts, with efficientnet_b0 at 224 px in bf16 by
  PyTorch 2.11: `udfs.wsi.inference.DeviceInference`, measured once on such a card. The network alone does 17,500 there, 22,300
  compiled (which takes 20 s and is not done); a tile takes it 57 us, crossing the bus 11, counting 18, stain 6, resizing 4.
- A node of 8 H100 has 192 virtual processors (AWS p5.48xlarge), counted here as the 96 cores that they are, each as fast as
  this machine's; a bus of 55 GB/s a GPU (PCIe 5, 16 lanes), and 12.5 GB/s from the blob store (100 Gbit/s).
- A slide has 5,000 kept tiles.

With a GPU a core reads, decodes and emits; without it does all steps. Spark's own cost is not in it: see `features`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.features import measured_steps
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line

_TILES_A_SLIDE = 5000
_GPU_TILES_PER_S = 9_700
_BUS_BYTES_PER_S = 55e9
_STORE_BYTES_PER_S = 12.5e9
_BYTES_A_TILE = 37_000  # compressed: what `udfs.plan_units` counts with
_HOST_STEPS = ("fetch", "decode", "emit")


@dataclass(frozen=True)
class Place:
    """Machines that work on one cohort."""

    name: str
    cores: int
    gpus: int = 0
    gpu_tiles_per_s: int = 0
    nodes: int = 1  # each with a link of its own to the store


PLACES = (
    Place("8_GPUs_of_96_cores", 96, 8, _GPU_TILES_PER_S),
    Place("100_executors_of_4_cores", 400, nodes=100),
)


def run() -> Iterator[Line]:
    """A line for each place."""
    ms = measured_steps()
    for place in PLACES:
        yield {"place": place.name, **simulated(place, ms)}


def simulated(place: Place, ms: Mapping[str, float]) -> Line:
    """Tiles a second that each part could do, the part that does the fewest, and what follows from it."""
    a_core = 1000 / sum(ms[step] for step in (_HOST_STEPS if place.gpus else ms))
    rates = {"cores": place.cores * a_core, "store": place.nodes * _STORE_BYTES_PER_S / _BYTES_A_TILE}
    line: Line = {"cores": place.cores, "tiles_per_s_a_core": a_core}
    if place.gpus:
        rates["gpus"] = float(place.gpus * place.gpu_tiles_per_s)
        rates["bus"] = place.gpus * _BUS_BYTES_PER_S / (TILE_PX * TILE_PX * 3)
        line |= {"gpus": place.gpus, "cores_to_keep_a_gpu_busy": place.gpu_tiles_per_s / a_core}
    limit = min(rates, key=lambda part: rates[part])
    line |= {f"{part}_tiles_per_s": rate for part, rate in rates.items()}
    return line | {"limit": limit, "slides_per_h": 3600 * rates[limit] / _TILES_A_SLIDE}

"""mask_flat: a slide without lower levels at 1/16, beside libvips and beside 400 MB of memory.

Each look has a process of its own (see `mask_process`), on one core and one thread; memory is the greatest that the
process held, its imports included.
"""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.measure import Line, in_fresh_process, in_turns

_LIMIT_BYTES = 400_000_000
_PEERS = ("pyvips_resize", "pyvips_shrink")


def run() -> Iterator[Line]:
    """A line for each size of slide."""
    flat = _looks(inputs.flat(), ("slidelake", *_PEERS))
    tissue = {name: look["tissue"] for name, look in flat.items()}
    if abs(tissue["slidelake"] - tissue["pyvips_shrink"]) > 1e-3:
        raise AssertionError(f"tissue: {tissue}")
    line: Line = {"slide": "flat", **_ours(flat["slidelake"])}
    for peer in _PEERS:
        line |= {f"{peer}_seconds": flat[peer]["seconds"], f"{peer}_peak_mb": flat[peer]["peak_bytes"] / 1e6}
    yield line | {f"vs_{peer}": flat[peer]["seconds"] / flat["slidelake"]["seconds"] for peer in _PEERS}
    yield {"slide": "huge", **_ours(_looks(inputs.huge(), ["slidelake"])["slidelake"])}


def _ours(look: dict[str, Any]) -> Line:
    peak = look["peak_bytes"]
    return {"seconds": look["seconds"], "peak_mb": peak / 1e6, "of_400mb": peak / _LIMIT_BYTES}


def _looks(path: Path, readers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each reader's processes, the median of the seconds and the greatest peak."""
    looks = in_turns({name: partial(in_fresh_process, "benchmarks.mask_process", name, str(path)) for name in readers})
    return {
        name: ours[0]
        | {
            "seconds": statistics.median(look["seconds"] for look in ours),
            "peak_bytes": max(look["peak_bytes"] for look in ours),
        }
        for name, ours in looks.items()
    }

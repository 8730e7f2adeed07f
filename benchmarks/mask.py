"""mask: what the slides pass does for one slide, beside libvips and beside 2 GB of memory.

Each look at a slide has a process of its own (see `mask_process`), on one thread; memory is the greatest that the process
held, its imports included.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.measure import Line, in_fresh_process

_LIMIT_BYTES = 2_000_000_000
_PROCESSES = 2  # of each reader a slide; the first brings the file into the page cache


def run() -> Iterator[Line]:
    """A line for each kind of slide."""
    for name, path in {"pyramid": inputs.pyramid(), "flat": inputs.flat(), "strips": inputs.strips()}.items():
        ours, vips = _best("slidelake", path), _best("libvips", path)
        if abs(ours["tissue"] - vips["tissue"]) > 1e-3:
            raise AssertionError(f"{name}: tissue is {ours['tissue']} here and {vips['tissue']} in libvips")
        yield {
            "slide": name,
            "px": ours["px"],
            "seconds": ours["seconds"],
            "peak_mb": ours["peak_bytes"] / 1e6,
            "libvips_seconds": vips["seconds"],
            "libvips_peak_mb": vips["peak_bytes"] / 1e6,
            "vs_libvips": vips["seconds"] / ours["seconds"],
            "of_2GB": ours["peak_bytes"] / _LIMIT_BYTES,
        }


def _best(reader: str, path: Path) -> dict[str, Any]:
    """Of fresh processes, the least seconds and the greatest peak."""
    runs = [in_fresh_process("benchmarks.mask_process", reader, str(path)) for _ in range(_PROCESSES)]
    peak = max(run["peak_bytes"] for run in runs)
    return runs[0] | {"seconds": min(run["seconds"] for run in runs), "peak_bytes": peak}

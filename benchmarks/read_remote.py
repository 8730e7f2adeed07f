"""read_remote: kept tiles over HTTP with latency, beside tiffslide over fsspec with its default and its best cache.

Once as a features task reads, a band of the slide; once as a training feed does, tiles here and there. Every round opens the
slide anew.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from benchmarks import inputs, peers
from benchmarks.measure import ROUNDS, Line
from benchmarks.remote import LATENCY_S, MB_PER_S, cost, median_costs, served
from tests.stores.http import Server

_TILES = 256
_MIB = 1024 * 1024
_CACHES: tuple[dict[str, Any], ...] = tuple(  # smaller blocks are slower by far; so is the kind `mmap`
    {"cache_type": kind, "block_size": mib * _MIB} for kind in ("blockcache", "background") for mib in (4, 16)
)


def run() -> Iterator[Line]:
    """A line for each choice of tiles."""
    path = inputs.huge()  # default caches bring whole slides where these are small
    kept = inputs.kept_tiles(path)
    middle = len(kept) // 2
    choices = {
        "band": kept[middle : middle + _TILES],
        "scattered": kept[np.sort(np.random.default_rng(0).choice(len(kept), _TILES, replace=False))],
    }
    with served(inputs.FOLDER) as server:
        for name, tiles in choices.items():
            yield {"choice": name, **_compared(server, path, tiles)}


def _compared(server: Server, path: Path, tiles: peers.Tiles) -> Line:
    url = f"{server.url}/{path.name}"

    needed = sum(map(len, inputs.blocks(path, tiles)))

    def tiffslide(**cache: Any) -> Callable[[], None]:
        return lambda: peers.tiffslide_tiles(fsspec.open(url, **cache), tiles)

    best = min(_CACHES, key=lambda cache: cost(server, tiffslide(**cache)).seconds)
    theirs = {"tiffslide_default": tiffslide(), "tiffslide_best": tiffslide(**best)}
    costs = median_costs(server, {"ours": partial(peers.slidelake_tiles, url, tiles), **theirs})
    ours = costs.pop("ours")
    line = {"tiles": len(tiles), "latency_ms": 1000 * LATENCY_S, "mb_per_s": MB_PER_S, "rounds": ROUNDS} | ours.line()
    for name, their in costs.items():
        line |= their.line(f"{name}_")
    line["best_cache"] = f"{best['cache_type']}:{best['block_size'] // _MIB}MiB"
    line |= {f"vs_{name}": their.seconds / ours.seconds for name, their in costs.items()}
    return line | {"bytes_over_needed": ours.bytes_moved / needed}

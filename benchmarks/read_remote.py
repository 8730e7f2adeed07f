"""read_remote: kept tiles over HTTP with latency, beside tiffslide over fsspec with its default and its best cache.

Every round opens the slide anew. A store on the same machine has no limit of bandwidth: `mb` tells what that hides.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import fsspec

from benchmarks import inputs, peers
from benchmarks.measure import ROUNDS, Line
from benchmarks.remote import LATENCY_S, cost, median_costs, served

_TILES = 256
_MIB = 1024 * 1024
_CACHES: tuple[dict[str, Any], ...] = tuple(  # smaller blocks are slower by far; `bytes` of 5 MiB is the default
    {"cache_type": kind, "block_size": mib * _MIB}
    for kind in ("blockcache", "background", "mmap")
    for mib in (1, 4, 16)
)


def run() -> Iterator[Line]:
    """One line."""
    path = inputs.huge()  # default caches bring whole slides where these are small
    kept = inputs.kept_tiles(path)
    tiles = kept[len(kept) // 2 :][:_TILES]
    needed = sum(map(len, inputs.blocks(path, tiles)))
    with served(inputs.FOLDER) as server:
        url = f"{server.url}/{path.name}"

        def tiffslide(**cache: Any) -> Callable[[], None]:
            return lambda: peers.tiffslide_tiles(fsspec.open(url, **cache), tiles)

        best = min(_CACHES, key=lambda cache: cost(server, tiffslide(**cache)).seconds)
        theirs = {"tiffslide_default": tiffslide(), "tiffslide_best": tiffslide(**best)}
        costs = median_costs(server, {"ours": partial(peers.slidelake_tiles, url, tiles), **theirs})
    ours = costs.pop("ours")
    line = {"tiles": len(tiles), "latency_ms": 1000 * LATENCY_S, "rounds": ROUNDS} | ours.line()
    for name, their in costs.items():
        line |= their.line(f"{name}_")
    line["best_cache"] = f"{best['cache_type']}:{best['block_size'] // _MIB}MiB"
    line |= {f"vs_{name}": their.seconds / ours.seconds for name, their in costs.items()}
    yield line | {"bytes_over_needed": ours.bytes_moved / needed}

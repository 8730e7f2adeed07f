"""A store that answers late: a folder over HTTP from another core, and what readers cost there. No clock of its own."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.machine import on_another_core
from benchmarks.measure import Line, in_turns, seconds
from tests.stores.http import Server, serve

LATENCY_S = 0.03
_SETTLED_S = 0.5  # a cache that reads ahead still has a block on its way when its reader is done
MB_PER_S = 85.0  # of one connection: the lower figure of 85 to 90 that AWS tells for S3


@dataclass(frozen=True)
class Cost:
    """Of one action of a reader."""

    seconds: float
    requests: int
    bytes_moved: int

    def line(self, prefix: str = "") -> Line:
        """As keys of a line."""
        moved = self.bytes_moved / 1e6
        return {f"{prefix}seconds": self.seconds, f"{prefix}requests": self.requests, f"{prefix}mb": moved}


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The folder at server.url; each request waits LATENCY_S and brings MB_PER_S."""
    with ExitStack() as stack:
        with on_another_core():
            server = stack.enter_context(serve(folder, latency_s=LATENCY_S, mb_per_s=MB_PER_S))
        yield server


def cost(server: Server, action: Callable[[], object]) -> Cost:
    """Of one run."""
    time.sleep(_SETTLED_S)
    server.reset()
    taken = seconds(action)
    return Cost(taken, *server.traffic())


def median_costs(server: Server, actions: Mapping[str, Callable[[], object]]) -> dict[str, Cost]:
    """Of each action, the medians of the rounds."""
    rounds = in_turns({name: partial(cost, server, action) for name, action in actions.items()})
    return {
        name: Cost(
            statistics.median(one.seconds for one in costs),
            statistics.median_low(one.requests for one in costs),
            statistics.median_low(one.bytes_moved for one in costs),
        )
        for name, costs in rounds.items()
    }

"""Processes that are prepared once and then take work, on two cores: what is measured there is warm. No clock here."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks.machine import on_cores

CORES = 2


@contextmanager
def processes(count: int, prepare: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that share the two cores; each calls `prepare` first."""
    spawn = multiprocessing.get_context("spawn")
    with on_cores(CORES), ProcessPoolExecutor(count, spawn, prepare, arguments) as pool:
        yield pool

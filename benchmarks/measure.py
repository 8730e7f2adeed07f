"""The clock and the memory gauge. What is measured is the benchmarks'."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

ROUNDS = 5
Line = dict[str, str | int | float]
"""What one measurement prints, key=value. `vs_PEER`: how many times as fast; `of_LIMIT`: which part of the limit."""

Result = TypeVar("Result")


def in_turns(actions: Mapping[str, Callable[[], Result]], rounds: int = ROUNDS) -> dict[str, list[Result]]:
    """What each action returns in each of the rounds, after one that does not count.

    They take turns, so that a busy spell of the machine meets them all and leaves their ratios alone.
    """
    for action in actions.values():
        action()
    done = [{name: action() for name, action in actions.items()} for _ in range(rounds)]
    return {name: [results[name] for results in done] for name in actions}


def median_seconds(actions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds that each takes: the median of the rounds."""
    taken = in_turns({name: partial(seconds, action) for name, action in actions.items()}, rounds)
    return {name: statistics.median(times) for name, times in taken.items()}


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` prints as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_bytes() -> int:
    """The most memory that this process has held since it began (getrusage would count what its parent held, too)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def show(name: str, line: Line) -> str:
    """One line of output."""
    return " ".join([f"bench={name}", *(f"{key}={shown(value)}" for key, value in line.items())])


def shown(value: str | float) -> str:
    """Three digits are what a measurement is good for."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

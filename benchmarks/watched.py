"""A command and the memory of all its processes while it runs: proportional set sizes, in which a page that processes share
counts once, however many they are.
"""

import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.measure import seconds

_EVERY_S = 0.25
_DAEMON = "pyspark.daemon"


@dataclass
class Watched:
    """What one run took. Bytes are the most that was seen at any one time."""

    seconds: float = 0
    peak: int = 0  # of all processes together
    jvm: int = 0
    driver: int = 0  # the Python process that runs the job
    workers: int = 0  # those that Spark forks for tasks, together, and what they are forked from
    largest_worker: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)  # of each kind, when all together had the most


def watch(command: Sequence[str], folder: Path) -> Watched:
    """Run it to its end; what it says goes to a file in the folder.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    found, log = Watched(), folder / "watched.log"
    is_over = threading.Event()
    with log.open("wb") as said, ThreadPoolExecutor(1) as beside:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        looking = beside.submit(_look, psutil.Process(process.pid), found, is_over)
        try:
            found.seconds = seconds(process.wait)
        finally:
            is_over.set()
    looking.result()  # raises what made it stop looking
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {log.read_text()[-2000:]}")
    return found


def _look(first: psutil.Process, found: Watched, is_over: threading.Event) -> None:
    while not is_over.wait(_EVERY_S):
        sizes: dict[str, list[int]] = {"jvm": [], "driver": [], "workers": []}
        for process in [first, *_children(first)]:
            try:
                sizes[_kind(process)].append(process.memory_full_info().pss)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        together = {kind: sum(of_kind) for kind, of_kind in sizes.items()}
        if sum(together.values()) > found.peak:
            found.peak, found.at_peak = sum(together.values()), together
        found.jvm, found.driver = max(found.jvm, together["jvm"]), max(found.driver, together["driver"])
        found.workers = max(found.workers, together["workers"])
        found.largest_worker = max(found.largest_worker, *sizes["workers"], 0)


def _children(first: psutil.Process) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = first.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return children


def _kind(process: psutil.Process) -> str:
    command = process.cmdline()
    if command and Path(command[0]).name == "java":
        return "jvm"
    return "workers" if _DAEMON in command else "driver"

"""Executors that read patches ahead of a trainer: one that is killed costs time and no patch."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from jobs.training.patches.window_feed import WindowFeed
from tests.cluster.clusters import submit
from tests.faults.commands import wait_until
from tests.feed.patch_slides import write_slides

_EPOCHS = 12


def test_an_executor_killed_while_it_reads_costs_no_patch(tmp_path: Path) -> None:
    slides, windows = write_slides(tmp_path), tmp_path / "a folder of 100% windows"
    killed: list[int] = []
    ended = threading.Event()

    def hunt() -> None:
        while not killed and not ended.is_set():
            killed.extend(_kill_an_executor_that_writes(windows))

    arguments = ("tests/cluster/windows.py", str(slides), str(windows), str(_EPOCHS))
    conf = {"spark.executor.memory": "1g"}
    with ThreadPoolExecutor(2) as threads:
        job = threads.submit(submit, tmp_path, "local-cluster[2,1,1024]", conf, *arguments)
        try:
            wait_until(lambda: job.done() or (windows / "windows.json").exists(), 120, "the job has planned")
            threads.submit(hunt)
            feed = WindowFeed(windows, 10, patience_s=60, say=lambda _: None)
            came = [sorted(int(i) for batch in feed.epoch(n) for i in batch.patch) for n in range(_EPOCHS)]
        finally:
            ended.set()
        done = job.result()
    assert done.returncode == 0, done.stderr
    assert killed, "no executor was met while it wrote a window"
    assert came == [list(range(100))] * _EPOCHS
    assert not list(windows.glob("epoch-*/*.unfinished")), "swept at the end"


def _kill_an_executor_that_writes(windows: Path) -> list[int]:
    """Kill -9 the JVM over a Python worker that has a window open and unfinished; its process id, or nothing."""
    for worker in psutil.process_iter():
        with suppress(psutil.Error):
            if worker.pid == os.getpid() or not _writes(worker, windows):
                continue
            worker.suspend()
            if _writes(worker, windows):
                [executor] = [one for one in worker.parents() if any("Coarse" in part for part in one.cmdline())]
                executor.kill()
                worker.kill()
                return [executor.pid]
            worker.resume()
    return []


def _writes(process: psutil.Process, windows: Path) -> bool:
    files = [file.path for file in process.open_files()]
    return any(path.startswith(str(windows)) and path.endswith(".unfinished") for path in files)

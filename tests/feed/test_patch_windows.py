"""Windows: what executors wrote comes to the trainer once, in order, whatever dead attempts left; and is deleted as it goes."""

import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from petastorm.workers_pool import EmptyResultError
from petastorm.workers_pool.thread_pool import ThreadPool

from jobs.training.patches.patch_units import Unit, cut_units
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.window_feed import WindowFeed
from jobs.training.patches.windows import WindowFolder, WindowPlan, windows_of_epoch, write_window
from tests.feed.patch_slides import IDS, PATCH_PX, pixels_of, spec_of, write_slides

WINDOW_PATCHES, UNIT_PATCHES, SEED = 30, 5, 1


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PatchSpec:
    return spec_of(write_slides(tmp_path_factory.mktemp("windows")))


def windows_in(spec: PatchSpec, epoch: int) -> list[list[Unit]]:
    return windows_of_epoch(cut_units(spec, UNIT_PATCHES, None, "raise")[0], WINDOW_PATCHES, SEED, epoch)


def plan_in(folder: WindowFolder, spec: PatchSpec, most_unread: int = 8) -> None:
    """What the job writes first."""
    sizes = [[sum(len(unit.patches) for unit in window) for window in windows_in(spec, epoch)] for epoch in range(2)]
    plan = WindowPlan(
        fingerprint=spec.fingerprint,
        window_sizes=sizes,
        window_patches=WINDOW_PATCHES,
        unit_patches=UNIT_PATCHES,
        most_unread=most_unread,
        n_parallel=2,
        seed=SEED,
    )
    folder.write_plan(plan, spec)


def produce(folder: WindowFolder, spec: PatchSpec, epoch: int, only: range | None = None) -> None:
    """What the tasks of the job and its driver do."""
    folder.epoch(epoch).mkdir(exist_ok=True)
    for window, units in enumerate(windows_in(spec, epoch)):
        if only is None or window in only:
            file = write_window(folder.epoch(epoch), units, (SEED, epoch, window), None, "raise")
            file.rename(folder.window(epoch, window))


def test_patches_come_once_in_the_same_batches_each_time_and_windows_are_deleted(
    spec: PatchSpec, tmp_path: Path
) -> None:
    orders = []
    for run in ("a", "b"):
        folder = WindowFolder(tmp_path / run)
        folder.root.mkdir()
        plan_in(folder, spec)
        produce(folder, spec, 0)
        write_window(folder.epoch(0), windows_in(spec, 0)[1], (SEED, 0, 1), None, "raise")  # a doubled attempt
        (folder.epoch(0) / "window-00002-dead.unfinished").write_bytes(b"half a fi")
        feed = WindowFeed(folder.root, 16, patience_s=10, say=lambda _: None)
        batches = list(feed.epoch(0))
        assert [len(batch) for batch in batches] == [16] * 6 + [4]
        for batch in batches:
            for i, image_id in enumerate(batch.image_id):
                x, y, whole = int(batch.x_px[i]), int(batch.y_px[i]), pixels_of(IDS.index(image_id))
                np.testing.assert_array_equal(batch.pixels[i], whole[y : y + PATCH_PX, x : x + PATCH_PX])
        orders.append([int(patch) for batch in batches for patch in batch.patch])
        assert folder.unread([0]) == 0
        left = {path.name for path in folder.epoch(0).iterdir() if path.suffix != ".done"}
        folder.sweep()
        assert len(left) == 2  # what has no window's name: the job sweeps it
        assert {path.suffix for path in folder.epoch(0).iterdir()} == {".done"}
        reading = feed.readings[0]
        assert (reading.n_patches, reading.n_parallel, reading.n_batch) == (100, 2, 16)
        assert reading.t_load > 0
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(100))


def test_a_trainer_waits_for_windows_and_a_second_one_goes_on_where_the_first_was_killed(
    spec: PatchSpec, tmp_path: Path
) -> None:
    root = tmp_path / "a folder of 100% windows"
    root.mkdir()
    folder = WindowFolder(root.as_uri())
    plan_in(folder, spec)
    produce(folder, spec, 0, range(2))
    feed = WindowFeed(root, 10, patience_s=30, say=lambda _: None)
    epoch = feed.epoch(0)
    first = [next(epoch) for _ in range(4)]
    epoch.close()  # type: ignore[attr-defined]
    assert folder.done(0, 0).exists() and folder.window(0, 1).exists()  # done with window 0, in the midst of window 1

    late = threading.Timer(0.5, produce, (folder, spec, 0, range(2, 9)))
    late.start()
    begun = time.monotonic()
    second = list(WindowFeed(root, 10, patience_s=30, say=lambda _: None).epoch(0))
    late.join()
    assert time.monotonic() - begun > 0.5
    came = [int(patch) for batch in (*first[:3], *second) for patch in batch.patch]  # the fourth was of window 1
    assert sorted(came) == list(range(100))


def test_a_batch_fits_the_windows_that_may_be_there_and_nobody_waits_for_the_other(
    spec: PatchSpec, tmp_path: Path
) -> None:
    folder = WindowFolder(tmp_path)
    plan_in(folder, spec, most_unread=2)

    def within_the_bound() -> None:
        for window in range(4):
            while folder.unread([0]) >= 2:
                time.sleep(0.01)
            produce(folder, spec, 0, range(window, window + 1))

    producer = threading.Thread(target=within_the_bound, daemon=True)
    producer.start()
    batches = list(WindowFeed(tmp_path, 15, patience_s=10, say=lambda _: None).epoch(0))
    producer.join()
    assert [len(batch) for batch in batches] == [15] * 6 + [10]
    with pytest.raises(
        ValueError,
        match=r"batch_size = 16: at least 1 and at most 15, which is half of \(patches.most_unread - 1\) \* ",
    ):
        WindowFeed(tmp_path, 16)


def test_a_window_that_petastorm_ends_too_early_is_read_on(
    spec: PatchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WindowFolder(tmp_path)
    plan_in(folder, spec)
    produce(folder, spec, 0)
    calls, read = count(), ThreadPool.get_results

    def early(pool: ThreadPool) -> Any:
        if next(calls) == 0:
            raise EmptyResultError
        return read(pool)

    monkeypatch.setattr(ThreadPool, "get_results", early)
    batches = list(WindowFeed(tmp_path, 16, patience_s=10, say=lambda _: None).epoch(0))
    assert sorted(int(patch) for batch in batches for patch in batch.patch) == list(range(100))


def test_a_trainer_is_told_why_nothing_comes(spec: PatchSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="windows#1: petastorm reads no path with #"):
        WindowFolder(tmp_path / "windows#1")
    with pytest.raises(TimeoutError, match=r"windows\.json did not come in 0\.1 s: is the job patches running"):
        WindowFeed(tmp_path, patience_s=0.1)
    folder = WindowFolder(tmp_path)
    plan_in(folder, spec)
    folder.put(folder.failed, "SlideError: file_missing: s1: nothing at s1.tif")
    with pytest.raises(RuntimeError, match="gave up: SlideError: file_missing: s1"):
        next(iter(WindowFeed(tmp_path, patience_s=5).epoch(0)))
    with pytest.raises(ValueError, match="reads 2 epochs ahead"):
        next(iter(WindowFeed(tmp_path).epoch(2)))
    with pytest.raises(ValueError, match="windows go through a disk"):
        WindowFeed("s3://bucket/windows")

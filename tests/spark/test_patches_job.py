"""Patches from real tables, and executors that read them ahead: never too far, and a worker that dies costs no patch."""

import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from pyspark.sql import SparkSession

from jobs.patches import JOB, read_ahead, read_cohort_ahead
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.job_sections import PatchesSettings
from jobs.training.patches.from_tables import patches_of_tables
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.window_feed import WindowFeed
from jobs.training.patches.windows import WindowFolder
from tests.faults.commands import wait_until
from tests.spark.conftest import Finished
from udfs.wsi import SlideError, open_slide

MOST_UNREAD = 3


@pytest.fixture(scope="module")
def spec(finished: Finished) -> PatchSpec:
    return patches_of_tables(finished.config.output.root, 224)


def small(folder: Path, most_unread: int = MOST_UNREAD, **settings: Any) -> PatchesSettings:
    sizes = {"epochs": 1, "window_patches": 40, "unit_patches": 8, "patience_s": 60.0}
    return PatchesSettings.model_validate({**sizes, **settings, "folder": str(folder), "most_unread": most_unread})


@pytest.mark.parametrize(("patch_px", "a_tile"), [(448, 1), (224, 4), (112, 16)])
def test_a_grid_over_the_tissue_is_the_tiles_in_equal_parts(finished: Finished, patch_px: int, a_tile: int) -> None:
    root = finished.config.output.root
    tiles = pl.read_delta(f"{root}/tiles").sort("image_id", "y_px", "x_px")
    spec = patches_of_tables(root, patch_px)
    rows = pl.from_arrow(spec.to_table())
    assert isinstance(rows, pl.DataFrame)
    assert len(rows) == a_tile * len(tiles)
    whole = rows.select("image_id", pl.col("x_px", "y_px") // 448 * 448).unique().sort("image_id", "y_px", "x_px")
    assert whole.rows() == tiles.select("image_id", "x_px", "y_px").rows()
    labels = dict(pl.read_delta(f"{root}/slides").select("image_id", "label").iter_rows())
    assert all(labels[image_id] == label for image_id, label in rows.select("image_id", "label").rows())


def test_patches_of_another_spacing_need_no_other_table_and_those_of_tables_read_as_the_slides_do(
    finished: Finished,
) -> None:
    root = finished.config.output.root
    with pytest.raises(ValueError, match=r"c1: mpp_unknown: mpp is 1\.0"):
        patches_of_tables(root, 128, mpp=1.0)
    spec = patches_of_tables(root, 128, mpp=1.0, patients={"001"})
    assert {slide.image_id for slide in spec.slides} == {"a1", "a2"}
    loader = PatchLoader(spec, 1000, say=lambda _: None)
    [batch] = loader.epoch(0)
    assert batch.pixels.shape == (len(spec), 128, 128, 3)
    plain = patches_of_tables(root, 100, patients={"001"}, versions={"tiles": finished.run.tables.version("tiles")})
    [batch] = PatchLoader(plain, 1000, say=lambda _: None).epoch(0)
    with open_slide(str(finished.slides / "a1.tif")) as slide:
        mine = [i for i, image_id in enumerate(batch.image_id) if image_id == "a1"]
        corners = [(int(batch.x_px[i]), int(batch.y_px[i])) for i in mine]
        for k, pixels in slide.read_tiles(corners, 100):
            np.testing.assert_array_equal(batch.pixels[mine[k]], pixels)
    with pytest.raises(ValueError, match="no table slides in /nowhere"):
        patches_of_tables("/nowhere", 128)
    with pytest.raises(ValueError, match="no patch of 8000 px has its centre on tissue"):
        patches_of_tables(root, 8000)


def test_executors_read_ahead_of_the_trainer_but_never_beyond_the_bound(
    spark: SparkSession, spec: PatchSpec, tmp_path: Path
) -> None:
    folder = WindowFolder(tmp_path)
    most = [0, 0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            files = len(list(folder.root.glob("epoch-*/window-*.parquet"))) + len(
                list(folder.root.glob("epoch-*/*.unfinished"))
            )
            most[:] = max(most[0], folder.unread(range(2))), max(most[1], files)
            time.sleep(0.002)

    with (
        Background(watch, ended),
        Background(lambda: read_ahead(spark, spec, small(tmp_path, epochs=2, window_patches=24))),
    ):
        feed = WindowFeed(tmp_path, 16, patience_s=60, say=lambda _: None)
        came: list[list[int]] = []
        for epoch in range(2):
            came.append([])
            for batch in feed.epoch(epoch):
                if epoch == 0 and not came[0]:
                    wait_until(lambda: most[0] == MOST_UNREAD, 60, "executors are as far ahead as they may")
                    time.sleep(0.5)  # in which they would go further, if they could
                came[epoch] += batch.patch.tolist()
    assert [sorted(patches) for patches in came] == [list(range(len(spec)))] * 2
    assert came[0] != came[1]
    assert sum(map(len, feed.plan.window_sizes)) > 2 * MOST_UNREAD, "more windows than the bound, else it shows nothing"
    assert most[0] == MOST_UNREAD  # it was reached, and never passed: nor by files, those under way among them
    assert most[1] <= MOST_UNREAD + 1  # and one that the trainer is done with and about to delete
    assert not list(tmp_path.glob("epoch-*/*.parquet"))


def test_a_worker_killed_while_it_reads_costs_no_patch(spark: SparkSession, spec: PatchSpec, tmp_path: Path) -> None:
    folder = WindowFolder(tmp_path)
    killed: list[int] = []
    ended = threading.Event()

    def hunt() -> None:
        while not killed and not ended.is_set():
            killed.extend(_kill_a_worker_that_writes(folder))

    with (
        Background(hunt, ended),
        Background(lambda: read_ahead(spark, spec, small(tmp_path, most_unread=2, window_patches=80))),
    ):
        feed = WindowFeed(tmp_path, 16, patience_s=60, say=lambda _: None)
        came = [int(patch) for batch in feed.epoch(0) for patch in batch.patch]
    assert killed, "no worker was met while it wrote a window"
    assert sorted(came) == list(range(len(spec)))
    assert not list(tmp_path.glob("epoch-*/*.unfinished")), "swept at the end"


def test_a_bad_slide_ends_the_job_by_name_and_the_trainer_is_told_or_it_is_skipped_and_counted(
    spark: SparkSession, finished: Finished, tmp_path: Path
) -> None:
    missing = str(tmp_path / "gone.tif")
    spec = patches_of_tables(finished.config.output.root, 448, patients={"002", "004"}, uris={"d1": missing})
    of_bad = int((np.array([slide.image_id for slide in spec.slides])[spec.slide] == "d1").sum())
    ends, skips = tmp_path / "ends", tmp_path / "skips"
    with pytest.raises(SlideError, match=r"file_missing: d1: nothing at .*gone\.tif"):
        read_ahead(spark, spec, small(ends))
    with pytest.raises(RuntimeError, match=r"gave up: SlideError: file_missing: d1: nothing at .*gone\.tif"):
        list(WindowFeed(ends, patience_s=10, say=lambda _: None).epoch(0))
    done = read_ahead(spark, spec, small(skips, on_bad_slide="skip"))
    assert done.n_patches == len(spec) - of_bad
    assert done.skipped["d1"][0] == of_bad > 0
    feed = WindowFeed(skips, 16, patience_s=10, say=lambda _: None)
    assert sum(len(batch) for batch in feed.epoch(0)) == len(spec) - of_bad == feed.readings[0].n_patches
    assert feed.skipped["d1"][0] == feed.readings[0].n_skipped == of_bad
    with pytest.raises(ConfigError, match=r"holds windows of another run \(seed 0, now 1\)"):
        read_ahead(spark, spec, small(skips, on_bad_slide="skip", seed=1))
    assert read_ahead(spark, spec, small(skips, on_bad_slide="skip")).n_patches == 0  # all were read, and are done
    plan = ends / "windows.json"
    plan.write_text(plan.read_text().replace('"window_sizes"', '"sizes"'))
    with pytest.raises(ConfigError, match=r"windows of another version of slidelake: empty it"):
        read_ahead(spark, spec, small(ends))
    with pytest.raises(ValueError, match=r"windows of another version of slidelake: empty it"):
        WindowFeed(ends, patience_s=10, say=lambda _: None)


def test_the_job_reads_the_patients_of_the_csv(spark: SparkSession, finished: Finished, tmp_path: Path) -> None:
    settings = {"folder": str(tmp_path / "windows"), "patch_px": 448, "window_patches": 16, "epochs": 2}
    config = finished.config.model_copy(update={"patches": PatchesSettings.model_validate(settings)})
    run = Run(config, spark, JOB)
    assert read_cohort_ahead(run, Namespace()) == 0
    feed = WindowFeed(tmp_path / "windows", 8, patience_s=10, say=lambda _: None)
    for epoch in range(2):
        assert (
            sum(len(batch) for batch in feed.epoch(epoch))
            == feed.plan.n_patches
            == run.record.counts["patches_read"] / 2
        )


class Background:
    """Run something beside the block; wait for it, and raise what it raised."""

    def __init__(self, work: Callable[[], object], end: threading.Event | None = None) -> None:
        self._work, self._end = work, end
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._end:
            self._end.set()
        self._thread.join(120)
        if self._error:
            raise self._error


def _workers() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        try:
            if "pyspark.daemon" in process.cmdline():
                yield process
        except psutil.NoSuchProcess:
            continue


def _kill_a_worker_that_writes(folder: WindowFolder) -> list[int]:
    """Kill -9 one Python worker that has a window open and unfinished; its process id, or nothing."""
    for process in _workers():
        try:
            if any(file.path.endswith(".unfinished") for file in process.open_files()):
                process.suspend()
                if any(file.path.endswith(".unfinished") for file in process.open_files()):
                    process.kill()
                    return [process.pid]
                process.resume()
        except psutil.NoSuchProcess:
            continue
    return []

"""Workers that die: of a slide that crashes them each time, of one that does so once, and killed from outside."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import tifffile
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import preprocess_in, write_csv
from tests.faults.boobytrap import deaths, install, set_trap
from tests.faults.commands import preprocess_command, wait_until
from tests.faults.frames import assert_same_rows, frame, frames, versions
from tests.slides.make import write_mosaic, write_slide

HEADER = "image_id,center_id,patient_id,image_num,label,uri"
MASK, FINEST = 1, 0  # levels of the trapped slides: the slides pass reads the one at 1/4, the features pass level 0
TRAPS = {
    # image_id: (patient_id, level whose bytes kill, once)
    "kills_slides_pass": ("101", MASK, False),
    "kills_features_pass": ("102", FINEST, False),
    "kills_slides_pass_once": ("103", MASK, True),
    "kills_features_pass_once": ("104", FINEST, True),
}
KILLERS = [name for name, (_, _, once) in TRAPS.items() if not once]
COMMAND_S = 300  # ten times what it takes on two idle cores


def test_a_slide_that_kills_its_worker_each_time_is_quarantined_and_one_that_does_so_once_is_not(
    spark: SparkSession, small_config: Callable[..., Config], pixels: NDArray[Any], tmp_path: Path
) -> None:
    plain, trapped = [], []
    for number, (name, (patient, level, once)) in enumerate(TRAPS.items()):
        # Of this quality a file is too large to come whole with its header, and the trap lies where no header is read.
        path = write_slide(tmp_path / f"{name}.tif", pixels[:1856, number : 1408 + number], pyramid=True, quality=97)
        start, stop = _middle_of_level(path, level)
        plain.append((name, "north", patient, 0, "CE", path))
        trapped.append((*plain[-1][:-1], set_trap(path, start, stop, once=once)))
    companion = tmp_path / "companion.tif"  # a good image of a patient whose other image kills
    write_slide(companion, pixels[:1856, 100:1508], pyramid=True)
    good = [("companion", "north", "102", 1, "CE", companion)]
    tiling = {"max_background": 0.8}
    config = small_config(tiling=tiling)
    undisturbed = small_config(tiling=tiling, output={"root": str(tmp_path / "undisturbed")})
    write_csv(Path(config.patients), plain + good, HEADER)
    preprocess_in(spark, undisturbed)
    write_csv(Path(config.patients), trapped + good, HEADER)

    log = tmp_path / "said.txt"
    with preprocess_command(config, log, install(tmp_path / "path")) as job:
        assert job.wait(COMMAND_S) == 3, log.read_text()

    found, expected = frames(Path(config.output.root)), frames(Path(undisturbed.output.root))
    for name, (_, _, once) in TRAPS.items():
        row = found["slides"].row(by_predicate=pl.col("image_id") == name, named=True)
        fired = deaths(tmp_path / f"{name}.tif")
        if once:
            assert (fired, row["status"], row["error_code"]) == (1, "ok", None)
        else:
            assert (fired, row["status"], row["error_code"]) == (2, "failed", "worker_died")
            assert name in row["error_message"]
            assert "--retry-failed" in row["error_message"]
            assert name in log.read_text()
    spared = ~pl.col("image_id").is_in(KILLERS)
    assert_same_rows(found["features"], expected["features"].filter(spared))
    assert_same_rows(
        found["slides"].filter(spared).drop("uri"), expected["slides"].filter(spared).drop("uri")
    )  # the uri has the other protocol
    of_slides_pass = pl.col("image_id") == "kills_slides_pass"
    assert_same_rows(found["tiles"], expected["tiles"].filter(~of_slides_pass))
    once_only = pl.col("patient_id").is_in(["103", "104"])
    assert_same_rows(found["patients"].filter(once_only), expected["patients"].filter(once_only))
    assert found["patients"]["patient_id"].to_list() == ["102", "103", "104"]
    beside_a_killer = found["patients"].row(0, named=True)
    assert (beside_a_killer["complete"], beside_a_killer["n_images_failed"]) == (False, 1)
    assert beside_a_killer["n_tiles"] == found["features"].filter(pl.col("image_id") == "companion").height > 0


def test_a_worker_killed_from_outside_while_it_encodes_leaves_no_trace_in_the_tables(
    spark: SparkSession,
    small_config: Callable[..., Config],
    pixels: NDArray[Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    slide = tmp_path / "slides" / "wide.tif"
    slide.parent.mkdir()
    write_mosaic(slide, pixels[1408:2944, 768:2048], width=5376, height=5376)
    rows = [("wide", "north", "001", 0, "CE")]
    options: dict[str, Any] = {"root": slide.parent, "tiling": {"max_background": 0.8}}
    undisturbed = small_config(rows, output={"root": str(tmp_path / "undisturbed")}, **options)
    config = small_config(rows, run={"unit_tiles": 40}, **options)
    killed: list[int] = []
    ended = threading.Event()

    def hunt() -> None:
        root = Path(config.output.root)
        wait_until(lambda: versions(root).get("slides", 0) > 0 or ended.is_set(), 120, "slides are committed")
        while not killed and not ended.is_set():
            killed.extend(_kill_a_worker_that_reads(slide))

    hunter = threading.Thread(target=hunt, daemon=True)
    hunter.start()
    try:
        preprocess_in(spark, config)
    finally:
        ended.set()
        hunter.join()
    assert killed, "no worker was met while it read the slide"
    record_property("killed_worker", killed[0])
    n_tiles = frame(Path(config.output.root), "features").height
    assert n_tiles > 40, "several units, one of them struck"

    preprocess_in(spark, undisturbed.model_copy(update={"run": config.run}))
    found, expected = frames(Path(config.output.root)), frames(Path(undisturbed.output.root))
    for name, rows_found in found.items():
        assert_same_rows(rows_found, expected[name])


def _middle_of_level(slide: Path, level: int) -> tuple[int, int]:
    """The bytes of the middle fifth of its blocks."""
    with tifffile.TiffFile(slide) as tiff:
        page = tiff.pages[level]
        ends = [start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
        start, stop = min(page.dataoffsets), max(ends)
    return start + 2 * (stop - start) // 5, start + 3 * (stop - start) // 5


def _kill_a_worker_that_reads(slide: Path) -> list[int]:
    """Kill -9 one Python worker of this test run's own Spark that has the slide open; its process id, or nothing."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "pyspark.daemon" not in process.cmdline() or not _has_open(process, slide):
                continue
            process.suspend()  # so that it is in the middle of the slide when it is killed, not just after it
            if _has_open(process, slide):
                process.kill()
                return [process.pid]
            process.resume()
        except psutil.NoSuchProcess:
            continue
    return []


def _has_open(process: psutil.Process, path: Path) -> bool:
    return any(file.path == str(path) for file in process.open_files())

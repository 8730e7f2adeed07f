"""Patches of pixels, read by Spark's executors ahead of a trainer into a bounded number of files.

The trainer takes them with jobs.training.patches.window_feed.WindowFeed(FOLDER), on any machine that shares the folder.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession
from tqdm import tqdm

from jobs.runtime.cohort.locating import locate
from jobs.runtime.run.cli import DONE, FAILED, SLIDES_FAILED
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.job_sections import PatchesSettings
from jobs.runtime.spark.session import slots
from jobs.runtime.spark.streams import terminal
from jobs.training.patches.from_tables import patches_of_tables
from jobs.training.patches.patch_units import PatchTally, Unit, cut_units
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.windows import WindowFolder, WindowPlan, read_manifest, windows_of_epoch, write_window
from jobs.training.refusals import FeedError
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import StorageOptions

JOB = Job("patches", reads=("slides", "tiles", "indexes", "patients"))
_log = logging.getLogger("slidelake.patches")
_POLL_S = 0.1
_SAME = ("fingerprint", "n_patches", "window_patches", "unit_patches", "seed")  # in every run on one folder


def read_ahead(
    spark: SparkSession, spec: PatchSpec, settings: PatchesSettings, storage_options: StorageOptions | None = None
) -> PatchTally:
    """Read the patches of all epochs into windows, one task each; returns what this call read.

    A window begins only if fewer than `most_unread` of them are unread or being read. So no task waits in its slot, and the
    disk holds no more than that. Spark tries a task that dies again; nobody reads what it left. A second call on the same
    folder continues the first.

    Raises:
        ConfigError: the folder holds windows of other patches or settings.
        SlideError: a slide cannot be read and on_bad_slide is "raise"; names the slide. The trainer gets the message, too.
        TimeoutError: the trainer took no window for `patience_s`.
    """
    folder = WindowFolder(str(settings.folder))
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.failed.unlink(missing_ok=True)
    try:
        units, unopened = cut_units(spec, settings.unit_patches, storage_options, settings.on_bad_slide)
        windows = [
            windows_of_epoch(units, settings.window_patches, settings.seed, epoch) for epoch in range(settings.epochs)
        ]
        plan = WindowPlan(
            fingerprint=spec.fingerprint,
            window_sizes=[[sum(len(unit.patches) for unit in window) for window in epoch] for epoch in windows],
            n_parallel=min(slots(spark), settings.most_unread),
            skipped=unopened.skipped,
            **settings.model_dump(include={"window_patches", "unit_patches", "most_unread", "seed"}),
        )
        try:
            existing = folder.read_plan() if folder.plan.exists() else plan
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name in _SAME:
            if getattr(existing, name) != getattr(plan, name):
                raise ConfigError(
                    f"{folder.root} holds windows of another run ({name} {getattr(existing, name)}, now "
                    f"{getattr(plan, name)}): empty it, or give patches.folder another path"
                )
        folder.sweep()
        folder.write_plan(plan, spec)
        read_window = partial(_read_window, spark, folder, settings, storage_options)
        loaded = _write_windows(folder, plan, windows, settings.patience_s, read_window)
    except ConfigError:
        raise
    except BaseException as error:
        folder.put(folder.failed, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        raise
    folder.sweep()
    return loaded


def _write_windows(
    folder: WindowFolder,
    plan: WindowPlan,
    windows: Sequence[Sequence[Sequence[Unit]]],
    patience_s: float,
    read_window: Callable[[int, int, Sequence[Unit]], Path],
) -> PatchTally:
    """Write all windows that are neither unread nor done, in the order in which the trainer wants them."""
    epochs, loaded = range(len(windows)), PatchTally()
    for epoch in epochs:
        loaded.add(PatchTally(skipped=plan.skipped))
        folder.epoch(epoch).mkdir(exist_ok=True)
    under_way: dict[Future[Path], Path] = {}  # the file of the window, once it is whole
    screen, total = terminal(), plan.n_patches * len(epochs)
    with (
        ThreadPoolExecutor(plan.n_parallel, "slidelake-windows") as pool,
        tqdm(total=total, unit="patch", desc="patches read ahead", file=screen, disable=screen is None) as bar,
    ):

        def collect() -> None:
            """Give windows that are whole their names."""
            for future in wait(under_way, _POLL_S, FIRST_COMPLETED).done:
                of_window = read_manifest(future.result())
                future.result().rename(under_way[future])
                del under_way[future]  # once it counts as unread, so that it counts at every moment
                loaded.add(of_window)
                bar.update(of_window.n_patches)

        def wait_for_room() -> None:
            since, before = time.monotonic(), -1
            while (now := folder.unread(epochs) + len(under_way)) >= plan.most_unread:
                if now != before or under_way:
                    since, before = time.monotonic(), now
                elif time.monotonic() - since > patience_s:
                    raise TimeoutError(
                        f"no trainer took a window of {folder.root} in {patience_s:g} s: start one, then this again"
                    )
                if under_way:
                    collect()
                else:
                    time.sleep(_POLL_S)

        try:
            for epoch, of_epoch in enumerate(windows):
                for window, units in enumerate(of_epoch):
                    file = folder.window(epoch, window)
                    if not file.exists() and not folder.done(epoch, window).exists():
                        wait_for_room()
                        under_way[pool.submit(read_window, epoch, window, units)] = file
            while under_way:
                collect()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return loaded


def _read_window(
    spark: SparkSession,
    folder: WindowFolder,
    settings: PatchesSettings,
    options: StorageOptions | None,
    epoch: int,
    window: int,
    units: Sequence[Unit],
) -> Path:
    """Read a window by a Spark job of one task; returns the file that the task wrote."""
    target, seed, on_bad_slide = folder.epoch(epoch), (settings.seed, epoch, window), settings.on_bad_slide

    def run(_: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        result: dict[str, str | None] = dict.fromkeys(("path", "code", "message"))
        try:
            result["path"] = str(write_window(target, units, seed, options, on_bad_slide))
        except SlideError as error:  # the task ends well: another attempt would meet the same slide
            result |= {"code": error.code.value, "message": error.message}
        yield pa.RecordBatch.from_pylist([result], pa.schema([(name, pa.string()) for name in result]))

    spark.sparkContext.setJobDescription(f"patches: epoch {epoch}, window {window}")  # of the jobs of this thread
    [result] = spark.range(0, 1, 1, 1).mapInArrow(run, "path string, code string, message string").collect()
    if result.code:
        raise SlideError(ErrorCode(result.code), result.message)
    return Path(result.path)


def read_cohort_ahead(run: Run, arguments: argparse.Namespace) -> int:
    """Read ahead the patches of the patients of the CSV, as section `patches` says."""
    del arguments
    settings, config, images = run.config.patches, run.config, run.images
    with run.progress.stage("plan"):
        located = locate(images, config)
        try:
            spec = patches_of_tables(
                config.output.root,
                settings.patch_px,
                mpp=settings.mpp,
                level=settings.level,
                patients={image.patient_id for image in images},
                split=settings.split,
                on_bad_slide=settings.on_bad_slide,
                uris={image_id: place.uri for image_id, place in located.items() if place.uri},
                storage_options=config.slides.storage_options,
            )
        except (ValueError, FeedError) as error:
            raise ConfigError(str(error)) from None
    try:
        with run.progress.stage("patches"):
            loaded = read_ahead(run.spark, spec, settings, config.slides.storage_options)
    except SlideError as error:
        _log.error("slidelake: failed: %s; or patches.on_bad_slide=skip leaves it out", error.message)
        return FAILED
    run.record.counts["patches_read"], run.record.counts["patches_skipped"] = loaded.n_patches, loaded.n_skipped
    print(f"slidelake patches: {loaded.n_patches:,} patches read ahead into {settings.folder}")
    for image_id, (n_patches, reason) in sorted(loaded.skipped.items()):
        _log.warning("slidelake: skipped %s patches of %s: %s", f"{n_patches:,}", image_id, reason)
    return SLIDES_FAILED if loaded.skipped and config.on_failed_slides == "report" else DONE


def _need_folder(config: Config) -> None:
    if not config.patches.folder:
        raise ConfigError("patches.folder is required: a folder on a disk that executors and trainer share")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, read_cohort_ahead, argv, check=_need_folder)


if __name__ == "__main__":
    sys.exit(main())

"""Patches of pixels, read by Spark's executors ahead of a trainer into a bounded number of files.

The trainer takes them with jobs.training.patches.window_feed.WindowFeed(FOLDER), on any machine that shares the folder.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field

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
from jobs.training.patches.patch_units import Skipped, Unit, UnitPlan, cut_units
from jobs.training.patches.selection import PatchSpec
from jobs.training.patches.windows import (
    Manifest,
    WindowFolder,
    WindowPlan,
    put_json,
    windows_of_epoch,
    write_spec,
    write_window,
)
from jobs.training.refusals import FeedError
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import StorageOptions

JOB = Job("patches", reads=("slides", "tiles", "indexes", "patients"))
_log = logging.getLogger("slidelake.patches")
_POLL_S = 0.1
_SAME = ("fingerprint", "n_patches", "window_patches", "unit_patches", "seed")  # in every run on one folder


@dataclass
class WindowsWritten:
    """What a run read into windows."""

    read: int = 0  # patches
    skipped: Skipped = field(default_factory=Skipped)


def read_ahead(
    spark: SparkSession, spec: PatchSpec, settings: PatchesSettings, storage_options: StorageOptions | None = None
) -> WindowsWritten:
    """Read the patches of all epochs into windows, one task each; returns when the last window is written.

    A window begins only if fewer than `most_unread` of them are unread or being read. So no task waits in its slot, and the
    disk holds no more than that. Spark tries a task that dies again; nobody reads what it left. A second call on the same
    folder continues the first.

    Args:
        spark: the session.
        spec: the patches.
        settings: section `patches`, with a folder.
        storage_options: of the slides, for fsspec.

    Returns:
        What this call read.

    Raises:
        ConfigError: the folder holds windows of other patches or settings.
        SlideError: a slide can't be read and on_bad_slide is "raise"; names the slide. The trainer gets the message, too.
        TimeoutError: the trainer took no window for `patience_s`.
    """
    folder = WindowFolder(str(settings.folder))
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.failed.unlink(missing_ok=True)
    try:
        units = cut_units(spec, settings.unit_patches, storage_options, settings.on_bad_slide)
        plan = _write_plan(folder, spec, units, settings, min(slots(spark), settings.most_unread))
        written = _write_windows(spark, folder, plan, units, settings, storage_options or {})
    except ConfigError:
        raise
    except BaseException as error:
        put_json(folder.failed, {"why": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"})
        raise
    folder.sweep()
    return written


def _write_plan(
    folder: WindowFolder, spec: PatchSpec, units: UnitPlan, settings: PatchesSettings, n_parallel: int
) -> WindowPlan:
    """Write the plan; if there is one, it must be the same."""
    plan = WindowPlan(
        fingerprint=spec.fingerprint,
        n_patches=units.n_patches,
        n_windows=tuple(
            len(windows_of_epoch(units.units, settings.window_patches, settings.seed, epoch))
            for epoch in range(settings.epochs)
        ),
        n_parallel=n_parallel,
        skipped=units.skipped,
        **settings.model_dump(include={"window_patches", "unit_patches", "most_unread", "seed"}),
    )
    existing = folder.read_plan() if folder.plan.exists() else plan
    for name in _SAME:
        if getattr(existing, name) != getattr(plan, name):
            raise ConfigError(
                f"{folder.root} holds windows of another run ({name} {getattr(existing, name)}, now {getattr(plan, name)}): "
                "empty it, or give patches.folder another path"
            )
    folder.sweep()
    write_spec(folder, spec)
    put_json(folder.plan, plan)
    return plan


def _write_windows(
    spark: SparkSession,
    folder: WindowFolder,
    plan: WindowPlan,
    units: UnitPlan,
    settings: PatchesSettings,
    options: StorageOptions,
) -> WindowsWritten:
    """Write all windows that are neither unread nor done, in the order in which the trainer wants them."""
    epochs, written = range(len(plan.n_windows)), WindowsWritten()
    for image_id, (n_patches, reason) in units.skipped.items():
        written.skipped.add(image_id, n_patches * len(epochs), reason)
    under_way: dict[Future[Manifest], tuple[int, int]] = {}  # epoch and window
    screen, total = terminal(), plan.n_patches * len(epochs)
    with (
        ThreadPoolExecutor(plan.n_parallel, "slidelake-windows") as pool,
        tqdm(total=total, unit="patch", desc="patches read ahead", file=screen, disable=screen is None) as bar,
    ):

        def collect(timeout_s: float) -> None:
            """Write the manifests of windows that are whole."""
            for future in wait(under_way, timeout_s, FIRST_COMPLETED).done:
                manifest = future.result()
                put_json(folder.manifest(*under_way[future]), manifest)
                del under_way[future]  # once it counts as unread, so that it counts at every moment
                written.read += manifest.n_patches
                for image_id, (n_patches, reason) in manifest.skipped.items():
                    written.skipped.add(image_id, n_patches, reason)
                bar.update(manifest.n_patches)

        try:
            for epoch in epochs:
                folder.epoch(epoch).mkdir(exist_ok=True)
                windows = windows_of_epoch(units.units, plan.window_patches, plan.seed, epoch)
                for window, of_window in enumerate(windows):
                    if folder.manifest(epoch, window).exists() or folder.done(epoch, window).exists():
                        continue
                    since, before = time.monotonic(), -1
                    while (now := folder.unread(epochs) + len(under_way)) >= plan.most_unread:
                        if now != before or under_way:
                            since, before = time.monotonic(), now
                        elif time.monotonic() - since > settings.patience_s:
                            raise TimeoutError(
                                f"no trainer took a window of {folder.root} in {settings.patience_s:g} s: start one, then this "
                                "again"
                            )
                        if under_way:
                            collect(_POLL_S)
                        else:
                            time.sleep(_POLL_S)
                    job = pool.submit(_one_window, spark, folder, epoch, window, of_window, settings, options)
                    under_way[job] = epoch, window
                    collect(0)
            while under_way:
                collect(_POLL_S)
        finally:
            for future in under_way:
                future.cancel()
    return written


def _one_window(
    spark: SparkSession,
    folder: WindowFolder,
    epoch: int,
    window: int,
    units: Sequence[Unit],
    settings: PatchesSettings,
    options: StorageOptions,
) -> Manifest:
    """Write a window by a Spark job of one task."""
    seed, on_bad_slide = settings.seed, settings.on_bad_slide

    def run(_: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            result: dict[str, object] = asdict(write_window(folder, epoch, window, units, seed, options, on_bad_slide))
        except SlideError as error:  # the task ends well: another attempt would meet the same slide
            result = {"code": error.code.value, "message": error.message}
        yield pa.RecordBatch.from_pydict({"result": [json.dumps(result)]})

    spark.sparkContext.setJobDescription(f"patches: epoch {epoch}, window {window}")  # of the jobs of this thread
    [row] = spark.range(0, 1, 1, 1).mapInArrow(run, "result string").collect()
    result = json.loads(row.result)
    if "code" in result:
        raise SlideError(ErrorCode(result["code"]), result["message"])
    return Manifest(**result)


def read_cohort_ahead(run: Run, arguments: argparse.Namespace) -> int:
    """Read ahead the patches of the patients of the CSV, as section `patches` says."""
    del arguments
    settings, config = run.config.patches, run.config
    images = run.images
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
            written = read_ahead(run.spark, spec, settings, config.slides.storage_options)
    except SlideError as error:
        _log.error("slidelake: failed: %s; or patches.on_bad_slide=skip leaves it out", error.message)
        return FAILED
    run.record.counts["patches_read"], run.record.counts["patches_skipped"] = written.read, written.skipped.n_patches
    print(f"slidelake patches: {written.read:,} patches read ahead into {settings.folder}")
    for image_id, (n_patches, reason) in sorted(written.skipped.items()):
        _log.warning("slidelake: skipped %s patches of %s: %s", f"{n_patches:,}", image_id, reason)
    return SLIDES_FAILED if written.skipped and config.on_failed_slides == "report" else DONE


def _need_folder(config: Config) -> None:
    if not config.patches.folder:
        raise ConfigError("patches.folder is required: a folder on a disk that executors and trainer share")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, read_cohort_ahead, argv, check=_need_folder)


if __name__ == "__main__":
    sys.exit(main())

"""Patches of pixels read by Spark's executors ahead of a trainer, into a bounded number of files that it consumes.

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
from jobs.runtime.spark.session import slots
from jobs.runtime.spark.streams import terminal
from jobs.training.patches.from_tables import patches_of_tables
from jobs.training.patches.patch_units import OnBadSlide, Unit, plan_units
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
from jobs.training.training_errors import FeedError
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import StorageOptions

_log = logging.getLogger("slidelake.patches")
JOB = Job("patches", reads=("slides", "tiles", "indexes", "patients"))
_POLL_S = 0.1
_WRITTEN = "manifest string, error_code string, error_message string"  # what a task tells: one of them


@dataclass
class ReadAhead:
    """What was read into windows."""

    read: int = 0  # patches
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)  # by image_id: patches, and why


@dataclass(frozen=True)
class Producer:
    """How far ahead windows are read, and of what size they are."""

    epochs: int
    window_patches: int = 2048
    unit_patches: int = 8
    most_unread: int = 8  # windows unread or being read, at most
    seed: int = 0
    on_bad_slide: OnBadSlide = "raise"
    patience_s: float = 3600.0  # so long the trainer may take for a window
    storage_options: StorageOptions = field(default_factory=dict, repr=False)


def read_ahead(spark: SparkSession, spec: PatchSpec, root: str, producer: Producer) -> ReadAhead:
    """Read the patches of all epochs into windows, each a task; returns when the last was written.

    No window is begun while `most_unread` of them are unread or being read, so no task ever waits in its slot, and the disk holds
    no more than that. A task that dies is tried again by Spark; what it left is in nobody's way. Called again on the same
    folder, it goes on where it was.

    Returns:
        What this call read.

    Raises:
        ConfigError: the folder holds the windows of other patches or settings.
        SlideError: a slide that can't be read, by name, with on_bad_slide="raise"; the trainer is told, too.
        TimeoutError: the trainer took no window for `patience_s`.
    """
    folder = WindowFolder(root)
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.failed.unlink(missing_ok=True)
    try:
        return _read_ahead(spark, spec, folder, producer)
    except ConfigError:
        raise
    except BaseException as error:
        put_json(folder.failed, {"why": _reason(error)})
        raise


def _read_ahead(spark: SparkSession, spec: PatchSpec, folder: WindowFolder, producer: Producer) -> ReadAhead:
    planned = plan_units(spec, producer.unit_patches, producer.storage_options, producer.on_bad_slide)
    at_once = min(slots(spark), producer.most_unread)
    plan = WindowPlan(
        fingerprint=spec.fingerprint,
        n_patches=sum(len(unit.patches) for unit in planned.units),
        n_windows=tuple(
            len(windows_of_epoch(planned.units, producer.window_patches, producer.seed, epoch))
            for epoch in range(producer.epochs)
        ),
        window_patches=producer.window_patches,
        unit_patches=producer.unit_patches,
        most_unread=producer.most_unread,
        n_parallel=at_once,
        seed=producer.seed,
        skipped=planned.skipped,
    )
    _settle(folder, plan, spec)
    done = ReadAhead(skipped={image_id: (n * producer.epochs, why) for image_id, (n, why) in planned.skipped.items()})
    screen = terminal()
    total = plan.n_patches * producer.epochs
    with (
        ThreadPoolExecutor(at_once, "slidelake-windows") as pool,
        tqdm(total=total, unit="patch", desc="patches read ahead", file=screen, disable=screen is None) as bar,
    ):
        under_way: dict[Future[Manifest], tuple[int, int]] = {}

        def settle(timeout_s: float) -> None:
            """Manifest the windows that are whole."""
            for future in wait(under_way, timeout_s, FIRST_COMPLETED).done:
                manifest = future.result()
                epoch, window = under_way[future]
                put_json(folder.manifest(epoch, window), manifest)
                del under_way[future]  # after it counts as unread, so that at no moment it counts for nothing
                done.read += manifest.n_patches
                for image_id, (patches, why) in manifest.skipped.items():
                    done.skipped[image_id] = done.skipped.get(image_id, (0, ""))[0] + patches, why
                bar.update(manifest.n_patches)

        try:
            for epoch, window, units in _to_do(folder, plan, planned.units):
                since, unread = time.monotonic(), -1
                while (now := folder.unread(range(producer.epochs)) + len(under_way)) >= plan.most_unread:
                    if now != unread or under_way:
                        since, unread = time.monotonic(), now
                    if time.monotonic() - since > producer.patience_s:
                        raise TimeoutError(
                            f"no trainer took a window of {folder.root} in {producer.patience_s:g} s: start one, then this again"
                        )
                    if under_way:
                        settle(_POLL_S)
                    else:
                        time.sleep(_POLL_S)
                under_way[pool.submit(_one_window, spark, folder, epoch, window, units, producer)] = epoch, window
                settle(0)
            while under_way:
                settle(_POLL_S)
        finally:
            for future in under_way:
                future.cancel()
    folder.sweep()
    return done


def _to_do(folder: WindowFolder, plan: WindowPlan, units: Sequence[Unit]) -> Iterator[tuple[int, int, list[Unit]]]:
    """Windows that are neither unread nor done, in the order in which the trainer wants them."""
    for epoch in range(len(plan.n_windows)):
        folder.epoch(epoch).mkdir(exist_ok=True)
        for window, of_window in enumerate(windows_of_epoch(units, plan.window_patches, plan.seed, epoch)):
            if not folder.manifest(epoch, window).exists() and not folder.done(epoch, window).exists():
                yield epoch, window, of_window


def _settle(folder: WindowFolder, plan: WindowPlan, spec: PatchSpec) -> None:
    """Write the plan, or find the same one there."""
    if folder.plan.exists():
        there = folder.read_plan()
        same = ("fingerprint", "n_patches", "window_patches", "unit_patches", "seed")
        for name in same:
            if getattr(there, name) != getattr(plan, name):
                raise ConfigError(
                    f"{folder.root} holds windows of another run ({name} {getattr(there, name)}, now {getattr(plan, name)}): "
                    "empty it, or give patches.folder another path"
                )
    folder.sweep()
    write_spec(folder, spec)
    put_json(folder.plan, plan)


def _one_window(
    spark: SparkSession, folder: WindowFolder, epoch: int, window: int, units: Sequence[Unit], producer: Producer
) -> Manifest:
    """One Spark job of one task."""
    seed, options, on_bad_slide = producer.seed, producer.storage_options, producer.on_bad_slide

    def run(_: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        told: list[str | None]
        try:
            manifest = write_window(folder, epoch, window, units, seed, options, on_bad_slide)
            told = [json.dumps(asdict(manifest)), None, None]
        except SlideError as error:  # no death of a worker: another attempt would meet the same slide
            told = [None, error.code.value, error.message]
        cells = [pa.array([text], pa.string()) for text in told]
        yield pa.RecordBatch.from_arrays(cells, ["manifest", "error_code", "error_message"])

    spark.sparkContext.setJobDescription(f"patches: epoch {epoch}, window {window}")  # of this thread's jobs
    [row] = spark.range(0, 1, 1, 1).mapInArrow(run, _WRITTEN).collect()
    if row.error_code:
        raise SlideError(ErrorCode(row.error_code), row.error_message)
    return Manifest(**json.loads(row.manifest))


def _reason(error: BaseException) -> str:
    """One line for the trainer."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def read_cohort_ahead(run: Run, arguments: argparse.Namespace) -> int:
    """The patients of the CSV, as section `patches` says."""
    del arguments
    settings, config = run.config.patches, run.config
    images = run.images
    with run.stage("plan"):
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
    producer = Producer(
        settings.epochs,
        settings.window_patches,
        settings.unit_patches,
        settings.most_unread,
        settings.seed,
        settings.on_bad_slide,
        settings.patience_s,
        config.slides.storage_options,
    )
    try:
        with run.stage("patches"):
            done = read_ahead(run.spark, spec, str(settings.folder), producer)
    except SlideError as error:
        _log.error("slidelake: failed: %s; or patches.on_bad_slide=skip leaves it out", error.message)
        return FAILED
    run.record.counts["patches_read"], run.record.counts["patches_skipped"] = (
        done.read,
        sum(n for n, _ in done.skipped.values()),
    )
    print(f"slidelake patches: {done.read:,} patches read ahead into {settings.folder}")
    for image_id, (patches, why) in sorted(done.skipped.items()):
        _log.warning("slidelake: skipped %s patches of %s: %s", f"{patches:,}", image_id, why)
    return SLIDES_FAILED if done.skipped and config.on_failed_slides == "report" else DONE


def _need_folder(config: Config) -> None:
    if not config.patches.folder:
        raise ConfigError("patches.folder is required: a folder on a disk that executors and trainer share")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, read_cohort_ahead, argv, check=_need_folder)


if __name__ == "__main__":
    sys.exit(main())

"""One run of a job: what it works with, how it goes through its waves, and the record that it leaves."""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from time import monotonic
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from jobs.runtime.cohort.locating import locate, read_cohort
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.survey import plan_waves, take_survey
from jobs.runtime.run.work import NoAccumulatorsError, Work, in_accumulators, try_accumulators
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.recipe import Recipe, full_recipe
from jobs.runtime.settings.withheld import described, may_be_secret
from jobs.runtime.spark.resources import executors_gone, features_resources
from jobs.runtime.spark.session import slots
from jobs.runtime.tables.tables import SCHEMAS, Tables, spark_schema
from udfs.encode_tiles import FeatureSpec, Models, load_models
from udfs.find_tissue import TissueSpec
from udfs.schemas import RUNS
from udfs.wording import new_run_id, package_versions, some
from udfs.wsi import ErrorCode
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.network import Network
from udfs.wsi.encoder.timm_network import is_known_to_timm
from udfs.wsi.store import absolute_uri
from udfs.wsi.weights.checkpoint import CheckpointError

_SLIDES_A_SLOT, _MOST_SLIDES_A_WAVE = 8, 512
_MOST_MISSING_A_WAVE = 4096  # slides; their names are lists in queries
_FATE = ("status", "error_code", "error_message")  # of a slide
_RECORDED_PACKAGES = [
    "slidelake",
    "delta-spark",
    "pyarrow",
    "torch",
    "timm",
    "openvino",
    "tifffile",
    "simplejpeg",
]


@dataclass
class Run:
    """What the stages of a run share."""

    config: Config
    spark: SparkSession
    job: str
    run_id: str = field(default_factory=new_run_id)
    counts: Counter[str] = field(default_factory=Counter)
    timings: dict[str, float] = field(default_factory=dict)
    reads: dict[tuple[str, str], tuple[int, Work]] = field(default_factory=dict)  # file size, by image_id and stage
    problems: list[str] = field(default_factory=list)  # what is no slide's fault, a line each
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    recipe: Recipe = field(default_factory=dict)  # of the features; empty in jobs that have nothing to do with them
    tables: Tables = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.tables = Tables(self.spark, self.config.output.root, self.run_id, self.config.output.schema_name)
        self.progress = Progress(0, 0)

    @property
    def tissue_spec(self) -> TissueSpec:
        """The settings of the slides pass, as the workers get them."""
        tiling = self.config.tiling
        return TissueSpec(
            tiling.tile_px,
            tiling.mpp,
            tiling.mask_downsample,
            tiling.background_brightness,
            tiling.max_background,
            self.config.slides.storage_options,
        )

    @property
    def feature_spec(self) -> FeatureSpec:
        """The settings of the features pass, as the workers get them."""
        encoder = self.config.encoder.model_dump()
        encoder["batch_size"] = None if encoder["batch_size"] == "auto" else encoder["batch_size"]
        if encoder["weights"]:
            encoder["weights"] = absolute_uri(encoder["weights"])
        stain = self.config.stain.weights
        return FeatureSpec(
            EncoderSpec(**encoder),
            absolute_uri(stain) if stain else None,
            self.config.histogram.bins,
            features_resources(self.spark, self.config.resources).gpu_share,
            self.config.slides.storage_options,
        )

    @cached_property
    def models(self) -> Models[Network]:
        """Loaded on the driver: a bad name or checkpoint ends the run here, before any work.

        Raises:
            ConfigError: one line on what can't be loaded.
        """
        try:
            return load_models(self.feature_spec)
        except (CheckpointError, ValueError) as error:
            name = self.config.encoder.name
            is_hidden = may_be_secret(name) and not is_known_to_timm(name)
            raise ConfigError(str(error).replace(name, described(name)) if is_hidden else str(error)) from None

    @contextmanager
    def stage(self, name: str, total: int = 0, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Time a stage and show how far it is; see `Progress.stage`."""
        begun = monotonic()
        with self.progress.stage(name, total, done):
            self.step("")
            try:
                yield
            finally:
                self._describe(f"slidelake {self.job}")
        self.timings[name] = self.timings.get(name, 0.0) + monotonic() - begun

    def step(self, what: str) -> None:
        """Name what Spark is given to do next in this stage: its UI has it as description of jobs, their stages and queries."""
        self._describe(self.progress.describe(what))

    def _describe(self, text: str) -> None:
        self.spark.sparkContext.setJobDescription(text)

    def show_work(self, rows: DataFrame) -> DataFrame:
        """The rows, whose work Spark's UI shows as they are computed; see `in_accumulators`."""
        return in_accumulators(rows) if self._can_show_work else rows

    @cached_property
    def _can_show_work(self) -> bool:
        try:
            try_accumulators(self.spark)
        except NoAccumulatorsError as error:
            self.progress.say(
                f"slidelake: Spark's UI shows no sums of requests, bytes and seconds, for Spark {self.spark.version} can't "
                f"add them up ({error}): look for them in table runs, column work"
            )
            return False
        return True

    def count_work(self, stage: str, rows: Iterable[Row]) -> None:
        """Take what workers tell of their work into account; rows have image_id, size_bytes and work, null where unread."""
        for row in rows:
            if row.work:
                _, before = self.reads.get((row.image_id, stage), (0, Work()))
                self.reads[row.image_id, stage] = row.size_bytes, before + Work(*row.work)

    def work(self) -> dict[str, Work]:
        """What all workers did, by stage."""
        sums: dict[str, Work] = {}
        for (_, stage), (_, work) in sorted(self.reads.items()):
            sums[stage] = sums.get(stage, Work()) + work
        return sums

    def record(self, status: str, read: dict[str, int]) -> None:
        """Append the run to table runs."""
        self.step("record")
        self.tables.create("runs")  # one of an older version gets its new columns
        after, encoder = self.tables.versions(), self.config.encoder
        row: dict[str, Any] = {
            "run_id": self.run_id,
            "job": self.job,
            "status": status,
            "started_at": self.started_at,
            "finished_at": datetime.now(UTC),
            "config": json.dumps(self.config.masked()),
            "versions": package_versions(_RECORDED_PACKAGES)
            | {"pyspark": self.spark.version, "encoder": f"{encoder.runtime} {encoder.precision}"},
            "features": self.recipe,
            "tables_read": read,
            "tables_written": {name: number for name, number in after.items() if read.get(name) != number},
            "counts": dict(self.counts),
            "timings": dict(self.timings),
            "reads": [
                (*of, size, work.requests, work.bytes, work.waited_s) for of, (size, work) in sorted(self.reads.items())
            ],
            "work": {stage: astuple(work) for stage, work in self.work().items()},
        }
        rows = self.spark.createDataFrame([tuple(row[name] for name in RUNS.names)], spark_schema(RUNS))
        self.tables.append("runs", rows)


Stage = Callable[[Run, pd.DataFrame], None]  # works on one wave: the survey's rows of its patients


def work_in_waves(
    run: Run,
    stages: Sequence[Stage],
    stale: Callable[[Run, pd.DataFrame], "pd.Series[bool]"],
    *,
    encodes: bool,
    retry_failed: bool,
    check: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Survey the cohort, then bring wave after wave of patients through the stages.

    Args:
        run: the run.
        stages: what to do with a wave, in order; each commits before the next begins.
        stale: which rows of the survey these stages have work on.
        encodes: whether the stages need to know what the features should be, and so the models.
        retry_failed: take failed slides for stale.
        check: may refuse `run.recipe`, before anything is read.

    Returns:
        The survey as it was before.
    """
    config = run.config
    with run.stage("plan"):
        images = read_cohort(config)
        located = locate(images, config)
        run.step("tables")
        for name in SCHEMAS:
            run.tables.create(name)
        models = None
        if encodes:
            features_resources(run.spark, config.resources)  # what no executor can give ends the run here
            models = run.models.identity
            run.recipe = full_recipe(config, run.models)
            check()
        run.step(f"survey of {len(images):,} images")
        survey = take_survey(images, located, run.tables, config, models, retry_failed=retry_failed)
        _tell_unreachable(run, survey)
        work = survey[stale(run, survey)]
        slides_a_wave = _slides_a_wave(run)
        is_missing = work["slide_stale"] & work["error_code"].notna()  # a row is written, nothing is read
        effort = pd.Series(1.0, work.index).mask(is_missing, min(1.0, slides_a_wave / _MOST_MISSING_A_WAVE))
        of_patient = effort.groupby(work["patient_id"]).sum()
        waves = plan_waves({str(patient): total for patient, total in of_patient.items()}, slides_a_wave)
    run.progress = Progress(len(work), len(waves))
    try:
        for patients in waves:
            wave = survey[survey["patient_id"].isin(patients)]
            run.progress.wave(int(work["patient_id"].isin(patients).sum()))
            gone = executors_gone(run.spark)
            for stage in stages:
                stage(run, wave)
            if given_up := _take_back(run, wave, gone):
                survey_now = take_survey(images, located, run.tables, config, models, retry_failed=True)
                wave = survey_now[survey_now["patient_id"].isin(given_up)]
                for stage in stages:
                    stage(run, wave)
            # What py4j names of the JVM is in cycles: plans and broadcasts of a wave would stay until Python looks for these.
            gc.collect()
    finally:
        run.progress.close()
        run.progress = Progress(0, 0)
    run.counts["waves"] = len(waves)
    return survey


def _take_back(run: Run, wave: pd.DataFrame, gone: set[str]) -> set[str]:
    """The patients of slides that this wave gave up as `worker_died` while executors went, beside those of `gone`.

    A task that begins anew is not told why: because its worker died of the slide, or because its executor was taken away, by a
    queue whose share it was in or with its node. So the slides get another chance, of two more deaths. Those that were given up
    while they were encoded are good again in table slides, for their tiles are there.
    """
    if executors_gone(run.spark) <= gone:
        return set()
    run.step("slides that executors left behind")
    died = (F.col("run_id") == run.run_id) & (F.col("error_code") == ErrorCode.WORKER_DIED.value)
    rows = run.tables.read("slides").where(died & F.col("image_id").isin(list(wave["image_id"])))
    given_up = rows.select("image_id", "patient_id", "n_tiles").collect()
    if given_up:
        names = some(sorted(row.image_id for row in given_up))
        run.progress.say(f"slidelake: executors went while they worked on {names}: these are taken up again")
    good = [(row.image_id, "ok", None, None) for row in given_up if row.n_tiles]
    if good:
        schema = "image_id string, status string, error_code string, error_message string"
        run.tables.upsert("slides", run.spark.createDataFrame(good, schema), "image_id", _FATE)
    return {row.patient_id for row in given_up}


def _tell_unreachable(run: Run, survey: pd.DataFrame) -> None:
    lost = survey[survey["unreachable"] == True]  # noqa: E712 - missing for images that are gone
    if len(lost):
        first = lost.iloc[0]
        run.problems.append(
            f"{len(lost)} slides that were read before can't be reached now, their rows are kept while the settings stay: "
            f"{first['error_code']}: {first['error_message']}"
        )


def _slides_a_wave(run: Run) -> int:
    return run.config.run.wave_slides or min(_SLIDES_A_SLOT * slots(run.spark), _MOST_SLIDES_A_WAVE)

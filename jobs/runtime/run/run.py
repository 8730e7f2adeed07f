"""One run of a job: what its stages work with."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic

import pandas as pd
from pyspark.sql import SparkSession

from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.recipe import Recipe
from jobs.runtime.settings.withheld import described, may_be_secret
from jobs.runtime.spark.resources import StageResources, features_resources
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.encode_tiles import FeatureSpec, Models, load_models
from udfs.find_tissue import TissueSpec
from udfs.schemas import RUNS
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision, Runtime
from udfs.wsi.encoder.network import is_known_to_timm
from udfs.wsi.store import absolute_uri
from udfs.wsi.weights.checkpoint import CheckpointError


@dataclass(frozen=True)
class Job:
    """What a job is called and which tables it works on; of a job that works in waves, also how.

    It makes those tables that it writes, and table runs. Those that it reads may be missing: then they have no rows.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    stages: "tuple[Stage, ...]" = ()  # of a wave, in order; each commits before the next begins
    stale: "Stale | None" = None  # which rows of the survey the stages have work on
    waiting: Callable[[pd.DataFrame], str] = lambda _: ""  # of a survey: what another job must do first, in one line
    encodes: bool = False  # whether the stages need to know what the features should be, and so the models
    result: str = "patients"  # the table to look at next
    next_step: str = ""  # the job to run next, if there is one

    @property
    def tables(self) -> tuple[str, ...]:
        """All that it opens."""
        return (*self.reads, *self.writes, "runs")


@dataclass
class Run:
    """What the stages of a run share."""

    config: Config
    spark: SparkSession
    job: Job
    record: Record = field(default_factory=Record)
    encoder_runs_by: tuple[Runtime, Precision] = ("torch", "fp32")  # settled before the survey
    recipe: Recipe = field(default_factory=dict)  # of the features; empty in jobs that have nothing to do with them
    tables: Tables = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.tables = Tables(self.spark, self.config.output.root, self.config.output.schema_name)
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
        encoder["runtime"], encoder["precision"] = self.encoder_runs_by
        encoder["batch_size"] = None if encoder["batch_size"] == "auto" else encoder["batch_size"]
        if encoder["weights"]:
            encoder["weights"] = absolute_uri(encoder["weights"])
        stain = self.config.stain.weights
        return FeatureSpec(
            EncoderSpec(**encoder),
            absolute_uri(stain) if stain else None,
            self.config.histogram.bins,
            self.stage_resources.gpu_share,
            self.config.slides.storage_options,
        )

    @cached_property
    def stage_resources(self) -> StageResources:
        """How the features stage is scheduled; built once, since to Spark each profile is another. Raises ConfigError."""
        return features_resources(self.spark, self.config.resources)

    @cached_property
    def models(self) -> Models:
        """Loaded on the driver: a bad name or checkpoint ends the run here, before any work.

        Raises:
            ConfigError: one line on what can't be loaded.
        """
        try:
            spec = self.feature_spec
            return load_models(
                replace(spec, encoder=replace(spec.encoder, device="cpu", runtime="torch", precision="fp32"))
            )
        except (CheckpointError, ValueError) as error:
            name = self.config.encoder.name
            is_hidden = may_be_secret(name) and not is_known_to_timm(name)
            raise ConfigError(str(error).replace(name, described(name)) if is_hidden else str(error)) from None

    @contextmanager
    def stage(self, name: str, total: int = 0, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Time a stage and show how far it is; see `Progress.stage`."""
        begun, timings = monotonic(), self.record.timings
        with self.progress.stage(name, total, done):
            self.step("")
            try:
                yield
            finally:
                self._describe(f"slidelake {self.job.name}")
        timings[name] = timings.get(name, 0.0) + monotonic() - begun

    def step(self, what: str) -> None:
        """Name what Spark is given to do next in this stage: its UI has it as description of jobs, their stages and queries."""
        self._describe(self.progress.describe(what))

    def _describe(self, text: str) -> None:
        self.spark.sparkContext.setJobDescription(text)

    def write_record(self, status: str) -> None:
        """Append the run to table runs."""
        self.step("record")
        row = {
            "job": self.job.name,
            "status": status,
            "config": json.dumps(self.config.masked()),
            "versions": {"pyspark": self.spark.version, "encoder": " ".join(self.encoder_runs_by)},
            "features": self.recipe,
            "tables_read": dict(self.tables.versions_opened),
            "tables_written": self.tables.versions_written(),
        }
        self.tables.create("runs")
        rows = self.spark.createDataFrame([self.record.row(**row)], spark_schema(RUNS))
        self.tables.append("runs", rows, shared=True)


Stage = Callable[[Run, pd.DataFrame], None]  # works on one wave: the survey's rows of its patients
Stale = Callable[[Run, pd.DataFrame], "pd.Series[bool]"]

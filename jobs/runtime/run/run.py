"""One run of a job: what its stages work with."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Literal

import pandas as pd
from pyspark.sql import SparkSession

from jobs.runtime.cohort.locating import Cohort, read_cohort
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.identity import Identity
from jobs.runtime.settings.sections import EncoderSettings
from jobs.runtime.settings.withheld import described, may_be_secret
from jobs.runtime.spark.resources import StageResources, features_resources
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.encode_tiles import FeatureSpec, Models, load_models
from udfs.find_tissue import TissueSpec
from udfs.schemas import RUNS
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.network import Network
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.timm_network import is_known_to_timm
from udfs.wsi.store import absolute_uri
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import is_of_hub
from udfs.wsi.weights.sources import absolute_source


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
    # How the stages know what the features should be: by models that are loaded, or by the record of the run that made them.
    models: Literal["loaded", "recorded"] | None = None
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
    identity: Identity = field(init=False)  # knows the models once the survey is taken
    tables: Tables = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.tables = Tables(self.spark, self.config.output.root, self.config.output.schema_name)
        self.progress = Progress(0, 0)
        self.identity = Identity(self.config)

    @cached_property
    def cohort(self) -> Cohort:
        """The CSV; the entry point of the jobs sets it, since it has read it before Spark starts."""
        return read_cohort(self.config)

    @property
    def images(self) -> Sequence[Image]:
        """The rows of the CSV."""
        return self.cohort.images

    @property
    def tissue_spec(self) -> TissueSpec:
        """The settings of the slides pass, as the workers get them."""
        tiling = self.config.tiling
        return TissueSpec(
            tiling.tile_px,
            tiling.mpp,
            tiling.mask_downsample,
            self.config.tissue_method,
            tiling.max_background,
            self.config.slides.storage_options,
        )

    @property
    def feature_spec(self) -> FeatureSpec:
        """The settings of the features pass, as the workers get them."""
        stain = self.config.stain.weights
        return FeatureSpec(
            encoder_spec(self.config.encoder),
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
    def models(self) -> Models[Network]:
        """Loaded on the driver: a bad name or checkpoint ends the run here, before any work.

        Raises:
            ConfigError: one line on what can't be loaded.
        """
        try:
            return load_models(self.feature_spec)
        except (CheckpointError, ValueError) as error:
            name = self.config.encoder.name
            is_known = name in PRESETS or is_of_hub(name) or is_known_to_timm(name)
            is_hidden = may_be_secret(name) and not is_known
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
        encoder = self.config.encoder
        row = {
            "job": self.job.name,
            "status": status,
            "config": json.dumps(self.config.masked()),
            "versions": {"pyspark": self.spark.version, "encoder": f"{encoder.runtime} {encoder.precision}"},
            "features": self.identity.recipe if self.identity.models is not None else {},
            "tables_read": dict(self.tables.versions_opened),
            "tables_written": self.tables.versions_written(),
        }
        self.tables.create("runs")
        rows = self.spark.createDataFrame([self.record.row(**row)], spark_schema(RUNS))
        self.tables.append("runs", rows, shared=True)


Stage = Callable[[Run, pd.DataFrame], None]  # works on one wave: the survey's rows of its patients
Stale = Callable[[pd.DataFrame], "pd.Series[bool]"]


def encoder_spec(settings: EncoderSettings) -> EncoderSpec:
    """Return the encoder of some settings as the workers get it."""
    encoder = settings.model_dump()
    encoder["batch_size"] = None if encoder["batch_size"] == "auto" else encoder["batch_size"]
    encoder["kwargs"] = tuple(sorted(encoder["kwargs"].items()))
    if encoder["weights"]:
        encoder["weights"] = absolute_source(encoder["weights"])
    return EncoderSpec(**encoder)

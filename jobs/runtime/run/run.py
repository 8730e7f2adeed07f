"""One run of a job: settings, session, tables, progress and record, and what is derived from them."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import pandas as pd
from pyspark.sql import SparkSession

from jobs.runtime.cohort.locating import Cohort, read_cohort
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.progress import Progress
from jobs.runtime.run.record import Record
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.identity import Identity
from jobs.runtime.settings.setting import filled
from jobs.runtime.settings.withheld import described, may_be_secret
from jobs.runtime.spark.resources import StageResources, features_resources
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.encode_tiles import FeatureSpec, Models, load_models
from udfs.find_tissue import TissueSpec
from udfs.schemas import RUNS
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.described import absolute_name
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.network import Network
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.provenance import LicenceError, licence_of, refuse_non_commercial
from udfs.wsi.encoder.tile_scale import check_tile_scale
from udfs.wsi.encoder.timm_network import is_known_to_timm
from udfs.wsi.store import absolute_uri
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import is_of_hub
from udfs.wsi.weights.sources import absolute_source

ORIGINS = "slidelake.encoders"
"""Property of tables features and patients: licence, revision and SHA-256 of the weights by encoder, as far as known."""
_log = logging.getLogger("slidelake.run")


@dataclass(frozen=True)
class Job:
    """The name of a job, the tables that it works on and, if it works in waves, its stages.

    A job makes the tables that it writes, and table runs. Those that it reads may be missing: they then have no rows.

    Attributes:
        stages: what a wave goes through, in order; each stage commits before the next begins. An entry takes from the run what
            its stage needs.
        stale: flags of the survey; the stages have work on images with any of them.
        waits_for: by name of another job, the flag of the survey for images on which that job has to work first.
        models: whether the stages take what the features should be from loaded models, or from the record of the run that made
            the features.
        result: the table to look at after the run.
        next_step: the job to run after this one, if there is one.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    stages: "tuple[Stage, ...]" = ()
    stale: tuple[str, ...] = ()
    waits_for: Mapping[str, str] = field(default_factory=dict)
    models: Literal["loaded", "recorded"] | None = None
    result: str = "patients"
    next_step: str = ""

    @property
    def tables(self) -> tuple[str, ...]:
        """All tables that the job opens."""
        return (*self.reads, *self.writes, "runs")


@dataclass
class Run:
    """What the entry point and the wave loop work with; stages are given the parts that they need."""

    config: Config
    spark: SparkSession
    job: Job
    record: Record = field(default_factory=Record)
    identity: Identity = field(init=False)  # knows the models once the survey is taken
    tables: Tables = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.tables = Tables(self.spark, self.config.output.root, self.config.output.schema_name)
        self.progress = Progress(self.record.timings, self._describe, f"slidelake {self.job.name}")
        self.identity = Identity(self.config)

    @cached_property
    def cohort(self) -> Cohort:
        """The CSV. The entry point sets it, because it reads the CSV before Spark starts."""
        return read_cohort(self.config)

    @property
    def images(self) -> Sequence[Image]:
        """The rows of the CSV."""
        return self.cohort.images

    @property
    def tissue_spec(self) -> TissueSpec:
        """The settings of the slides pass, as the workers get them."""
        config = self.config
        return filled(TissueSpec, config.tiling, config.slides, method=config.tissue_method)

    @property
    def feature_spec(self) -> FeatureSpec:
        """The settings of the features pass, as the workers get them."""
        config, stain = self.config, self.config.stain.weights
        return filled(
            FeatureSpec,
            config.histogram,
            config.slides,
            encoders={name: encoder_spec(config, name) for name in config.encoders},
            stain_weights=absolute_uri(stain) if stain else None,
            gpu_share=self.stage_resources.gpu_share,
        )

    @cached_property
    def stage_resources(self) -> StageResources:
        """How the features stage is scheduled; built once, since to Spark each profile is another. Raises ConfigError."""
        return features_resources(self.spark, self.config.resources)

    @cached_property
    def models(self) -> Models[Network]:
        """The models, loaded on the driver: a bad name or checkpoint ends the run here, before any work.

        Raises:
            ConfigError: one line on what cannot be loaded, or on tiles of another scale than an encoder's.
        """
        spec, tiling = self.feature_spec, self.config.tiling
        try:
            for name, encoder in spec.encoders.items():
                if not self.config.encoders[name].allow_other_scale:
                    check_tile_scale(encoder, tiling.tile_px, tiling.mpp)
                if self.config.licence == "commercial":
                    refuse_non_commercial(name, [licence_of(encoder)])  # before weights are fetched
            models = load_models(spec)
        except (CheckpointError, LicenceError, ValueError) as error:
            text = str(error)
            for name in [encoder.name for encoder in spec.encoders.values()]:
                is_known = name in PRESETS or is_of_hub(name) or is_known_to_timm(name)
                text = text if is_known or not may_be_secret(name) else text.replace(name, described(name))
            raise ConfigError(text) from None
        check_licences(self.config, {name: network.origin for name, network in models.encoders.items()})
        return models

    @cached_property
    def origins(self) -> dict[str, dict[str, str]]:
        """What is known of the origin of encoders: of those that this run loads, and of those that table features has."""
        noted: dict[str, dict[str, str]] = json.loads(self.tables.property("features", ORIGINS) or "{}")
        loaded = self.models.encoders.items() if self.job.models == "loaded" else ()
        return noted | {name: encoder.origin for name, encoder in loaded}

    @property
    def compared_feature_spec(self) -> FeatureSpec:
        """The same settings, with which a worker refuses models that are not the driver's; see `models` for errors."""
        return replace(self.feature_spec, models=self.models.identities)

    def _describe(self, text: str) -> None:
        self.spark.sparkContext.setJobDescription(text)

    def write_record(self, status: str) -> None:
        """Append the run to table runs."""
        self.progress.step("record")
        row = self.record.row(
            job=self.job.name,
            status=status,
            config=json.dumps(self.config.masked()),
            versions={"pyspark": self.spark.version, "encoder": runtime_text(self.config)},
            features={name: self.identity.recipe(name) | self.origins.get(name, {}) for name in self.identity.models},
            tables_read=dict(self.tables.versions_opened),
            tables_written=self.tables.versions_written(),
        )
        self.tables.create("runs")
        self.tables.append("runs", self.spark.createDataFrame([row], spark_schema(RUNS)), shared=True)


def check_licences(config: Config, origins: Mapping[str, Mapping[str, str]]) -> None:
    """Log encoders of unknown licence if the settings ask for commercial use.

    Args:
        config: the settings.
        origins: of the weights of encoders, by the encoder's name.

    Raises:
        ConfigError: a licence forbids commercial use.
    """
    for name in config.encoders if config.licence == "commercial" else ():
        try:
            unknown = refuse_non_commercial(name, [origins.get(name, {})])
        except LicenceError as error:
            raise ConfigError(str(error)) from None
        if unknown:
            _log.warning("slidelake: %s", unknown)


Stage = Callable[[Run, pd.DataFrame], None]  # works on one wave: the survey's rows of its patients


def runtime_text(config: Config) -> str:
    """Returns the runtime and the precisions of the encoders, for people."""
    precisions = sorted({encoder_spec(config, name).precision for name in config.encoders})
    return f"{config.inference.runtime} {'/'.join(precisions)}"


def encoder_spec(config: Config, name: str) -> EncoderSpec:
    """Returns an encoder of the settings as the workers get it."""
    settings, inference = config.encoders[name], config.inference
    model = settings.model or name
    is_on_gpu = inference.device == "cuda"  # by the settings alone: rows do not depend on the machine
    recommended: Precision = PRESETS[model].precision if model in PRESETS and is_on_gpu else "fp32"
    return filled(
        EncoderSpec,
        settings,
        inference,
        name=absolute_name(model),
        batch_size=None if inference.batch_size == "auto" else inference.batch_size,
        precision=inference.precision or recommended,
        kwargs=tuple(sorted(settings.kwargs.items())),
        weights=settings.weights and absolute_source(settings.weights),
    )

"""The sections of the settings that one job alone reads."""

import unicodedata
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator, model_validator

from jobs.runtime.settings.setting import NO_ROW, Location, Mpp, OutFile, OutFolder, Section, Shapes, Source, setting
from udfs.wsi.store import StoreUri

ONE_JOBS = {  # the job of each section
    "stainnet": "stainnet",
    "splits": "splits",
    "training": "train",
    "predict": "predict",
    "aggregators": "vectors",
    "patches": "patches",
}
_SPLITS = Shapes("splits")


def _in_nfc(text: str | None) -> str | None:
    return text and unicodedata.normalize("NFC", text)  # as identifiers of the CSV are


class StainnetSettings(Section):
    """Settings of the job stainnet, which fits a StainNet to your slides."""

    reference: Annotated[str | None, AfterValidator(_in_nfc)] = setting(
        None, "image_id of the slide whose colours all others get", NO_ROW
    )
    checkpoint: OutFile = setting(None, "path that the fitted checkpoint is written to", NO_ROW)
    tiles: int = setting(128, "tiles drawn from the cohort, evenly over slides", NO_ROW, ge=4, le=10_000)
    steps: int = setting(3000, "steps of the fit", NO_ROW, ge=1)
    seed: int = setting(0, "seed of the draw and the fit", NO_ROW)


class SplitsSettings(Section):
    """Settings of the job splits, which says who is in train, validation and test."""

    train: float = setting(0.8, "share of the images that models are trained on", _SPLITS, gt=0, le=1)
    validation: float = setting(0.1, "share that decides when training stops", _SPLITS, ge=0, lt=1)
    test: float = setting(0.1, "share that is held out", _SPLITS, ge=0, lt=1)
    stratify: tuple[Literal["center_id", "label"], ...] = setting(
        ("center_id", "label"), "what the shares hold within, beside the cohort as a whole", _SPLITS
    )
    seed: int = setting(0, "seed of the order in which patients are dealt", _SPLITS)
    folds: int | None = setting(None, "number of folds of train and validation; null: none", _SPLITS, ge=2, le=100)
    csv: OutFolder = setting(None, "folder or URI of train.csv, ...; null is ROOT/splits_csv", NO_ROW)

    @field_validator("stratify", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitsSettings":
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test sum to {total:.6g}: they must sum to 1")
        return self


class TrainingSettings(Section):
    """Settings of the job train."""

    encoder: str | None = setting(None, "the encoder whose bags the model takes; null takes the only one", NO_ROW)
    model: Literal["attention", "mean", "logistic"] = setting(
        "attention",
        "attention: gated attention over the tiles of a patient; mean: all tiles alike; logistic: logistic regression on the "
        "mean tile",
        NO_ROW,
    )
    columns: Literal["embedding", "max", "both"] = setting(
        "embedding", "vectors of a tile that the model sees; max and both: of encoders with a feature map", NO_ROW
    )
    use_histogram: bool = setting(False, "the model also sees the colour histogram of the patient", NO_ROW)
    use_center: bool = setting(False, "the model also sees the centre, and so learns which patients it treats", NO_ROW)
    hidden: int = setting(256, "width of a tile after the first layer", NO_ROW, ge=1, le=8192)
    attention_hidden: int = setting(128, "width of the attention network", NO_ROW, ge=1, le=8192)
    dropout: float = setting(0.25, "share of hidden values left out in each step", NO_ROW, ge=0, lt=1)
    learning_rate: float = setting(1e-3, "step size of AdamW", NO_ROW, gt=0)
    weight_decay: float = setting(1e-2, "weight decay of AdamW", NO_ROW, ge=0)
    epochs: int = setting(50, "passes over split train, at most", NO_ROW, ge=1, le=100_000)
    patience: int = setting(15, "epochs without a lower loss on split validation, then training stops", NO_ROW, ge=1)
    batch_size: int = setting(8, "patients per step and process", NO_ROW, ge=1, le=65_536)
    bag_size: int | None = setting(None, "tiles drawn per patient and epoch in training; null: all", NO_ROW, ge=1)
    fold: int | None = setting(None, "fold of table splits to validate on; null goes by column split", NO_ROW, ge=0)
    class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: every class has the same weight in the loss, however few patients it has", NO_ROW
    )
    seed: int = setting(
        0, "seed of first weights, order, draws and dropout: same seed, same model", NO_ROW, ge=0, lt=2**32
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        "auto takes one GPU per process: one of this machine, or on a cluster one that Spark gives each task by "
        "spark.task.resource.gpu.amount=1",
        NO_ROW,
    )
    processes: int = setting(1, "processes at once, by Spark's TorchDistributor; 1 needs no Spark", NO_ROW, ge=1)
    output: OutFolder = setting(None, "folder or URI of the models; null is OUTPUT.ROOT/models", NO_ROW)
    mlflow: Annotated[StoreUri | None, Location(names=("databricks", "databricks-uc"))] = setting(
        None, "tracking URI of MLflow to send metrics to as well; needs slidelake[mlflow]", NO_ROW
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainingSettings":
        if self.mlflow and not find_spec("mlflow"):
            raise ValueError("mlflow needs MLflow: pip install 'slidelake[mlflow]', or set it to null")
        if self.model == "logistic" and self.processes > 1:
            raise ValueError("model logistic trains in one process: set processes to 1")
        return self


class PredictSettings(Section):
    """Settings of the job predict."""

    model: Source = setting(None, "folder or URI of a trained model: ROOT/models/RUN_ID", NO_ROW)
    csv: OutFile = setting(
        None, "path or URI of the CSV of probabilities; null is ROOT/predictions_csv/MODEL_ID.csv", NO_ROW
    )


class AggregatorSettings(Section):
    """What makes one vector of the embeddings of a slide or patient. Section `aggregators` has one below each name."""

    method: str | None = setting(
        None,
        "mean, max, or gated_attention (learned: Ilse et al. 2018); null takes the aggregator's name",
        NO_ROW,
    )
    weights: Source = setting(
        None, "path or URI of the checkpoint of a learned one, such as ROOT/models/RUN_ID/model.safetensors", NO_ROW
    )
    encoder: str | None = setting(
        None,
        "the encoder of section encoders whose tiles it takes; null takes those of each, and of a model of job train those that "
        "it learned from",
        NO_ROW,
    )


class PatchesSettings(Section):
    """Settings of the job patches, which reads patches of pixels ahead of a trainer."""

    folder: OutFolder = setting(None, "folder of the windows, on a disk of executors and trainer", NO_ROW)
    patch_px: int = setting(256, "edge of a patch, pixels; no table is made again for it", NO_ROW, ge=1, le=8192)
    mpp: Mpp | None = setting(None, "um/px of a patch; null reads `level` as it is", NO_ROW)
    level: int = setting(0, "of the slide, 0 is the finest; used if mpp is null", NO_ROW, ge=0)
    split: str | None = setting(None, "only patients of this value of patients.split; null: all", NO_ROW)
    epochs: int = setting(1, "epochs to read ahead, each in an order of its own", NO_ROW, ge=1)
    window_patches: int = setting(2048, "patches of a window, mixed; a task holds them in memory", NO_ROW, ge=1)
    unit_patches: int = setting(8, "neighbours read together: more read faster, fewer mix better", NO_ROW, ge=1)
    most_unread: int = setting(8, "windows on disk or being read; executors then wait for the trainer", NO_ROW, ge=2)
    patience_s: float = setting(3600.0, "seconds that a trainer may take for a window; then the job ends", NO_ROW, gt=0)
    on_bad_slide: Literal["raise", "skip"] = setting(
        "raise", "raise: a slide that cannot be read ends the job; skip: its patches are left out and counted", NO_ROW
    )
    seed: int = setting(0, "seed of the order", NO_ROW, ge=0)

    @model_validator(mode="after")
    def _one_spacing(self) -> "PatchesSettings":
        if self.mpp is not None and self.level:
            raise ValueError("mpp and level are both set, and mpp chooses the level: leave one out")
        return self

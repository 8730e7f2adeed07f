"""The sections of the settings that one job alone reads."""

import unicodedata
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator, model_validator

from jobs.runtime.settings.setting import (
    NO_ROW,
    Location,
    Mpp,
    Section,
    Shapes,
    Source,
    WrittenFile,
    WrittenFolder,
    setting,
)

ONE_JOBS = {  # the job of each section
    "stainnet": "stainnet",
    "splits": "splits",
    "training": "train",
    "predict": "predict",
    "patches": "patches",
}


def _in_nfc(text: str | None) -> str | None:
    return text and unicodedata.normalize("NFC", text)  # as identifiers of the CSV are


class StainnetSettings(Section):
    """Settings of the job stainnet, which fits a StainNet to your slides."""

    reference: Annotated[str | None, AfterValidator(_in_nfc)] = setting(
        None, "image_id of the slide that all others are made to look like", NO_ROW
    )
    checkpoint: WrittenFile = setting(None, "path that the fitted checkpoint is written to", NO_ROW)
    tiles: int = setting(128, "tiles drawn from the cohort, evenly over slides", NO_ROW, ge=4, le=10_000)
    steps: int = setting(3000, "steps of the fit", NO_ROW, ge=1)
    seed: int = setting(0, "of the draw and the fit", NO_ROW)


class SplitsSettings(Section):
    """Settings of the job splits, which says who is in train, validation and test."""

    train: float = setting(0.8, "share of the images that models are trained on", Shapes("splits"), gt=0, le=1)
    validation: float = setting(0.1, "share that decides when training stops", Shapes("splits"), ge=0, lt=1)
    test: float = setting(0.1, "share that is held out", Shapes("splits"), ge=0, lt=1)
    stratify: tuple[Literal["center_id", "label"], ...] = setting(
        ("center_id", "label"), "what the shares hold within, beside the cohort as a whole", Shapes("splits")
    )
    seed: int = setting(0, "of the order in which patients are dealt", Shapes("splits"))
    folds: int | None = setting(
        None, "deal train and validation to so many folds too; null: no folds", Shapes("splits"), ge=2, le=100
    )
    csv: WrittenFolder = setting(
        None, "folder or URI of train.csv, validation.csv, ...; null is ROOT/splits_csv", NO_ROW
    )

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

    model: Literal["attention", "mean", "logistic"] = setting(
        "attention",
        "attention: gated attention over the tiles of a patient; mean: all tiles alike; logistic: logistic "
        "regression on the mean tile",
        NO_ROW,
    )
    columns: Literal["avg", "max", "both"] = setting("avg", "embeddings of a tile that the model sees", NO_ROW)
    use_histogram: bool = setting(False, "the model also sees the colour histogram of the patient", NO_ROW)
    use_center: bool = setting(
        False,
        "the model also sees the centre: it then learns which patients each centre treats, and knows no other centre",
        NO_ROW,
    )
    hidden: int = setting(256, "width of a tile after the first layer", NO_ROW, ge=1, le=8192)
    attention_hidden: int = setting(128, "width of the attention network", NO_ROW, ge=1, le=8192)
    dropout: float = setting(0.25, "share of hidden values left out in each step", NO_ROW, ge=0, lt=1)
    learning_rate: float = setting(1e-3, "of AdamW", NO_ROW, gt=0)
    weight_decay: float = setting(1e-2, "of AdamW", NO_ROW, ge=0)
    epochs: int = setting(50, "at most so many passes over split train", NO_ROW, ge=1, le=100_000)
    patience: int = setting(15, "stop if the loss on split validation has not fallen for so many epochs", NO_ROW, ge=1)
    batch_size: int = setting(8, "patients per step and process", NO_ROW, ge=1, le=65_536)
    bag_size: int | None = setting(
        None, "tiles drawn per patient and epoch; null takes all; predictions always take all", NO_ROW, ge=1
    )
    fold: int | None = setting(
        None, "validate on this fold of table splits, learn from the others; null goes by column split", NO_ROW, ge=0
    )
    class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: every class has the same weight in the loss, however few patients it has", NO_ROW
    )
    seed: int = setting(0, "of first weights, order, draws and dropout: same seed, same model", NO_ROW, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        "auto takes one GPU per process, if there are some: of this machine, or on a cluster those that Spark "
        "gives tasks by spark.task.resource.gpu.amount=1",
        NO_ROW,
    )
    processes: int = setting(
        1, "more than 1: so many at once, by Spark's TorchDistributor; 1 needs no Spark", NO_ROW, ge=1
    )
    output: WrittenFolder = setting(
        None, "folder or URI of the models, one folder per run; null is OUTPUT.ROOT/models", NO_ROW
    )
    mlflow: Annotated[str | None, Location(names=("databricks", "databricks-uc"))] = setting(
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
    csv: WrittenFile = setting(
        None, "path or URI of the CSV of probabilities; null is ROOT/predictions_csv/MODEL_ID.csv", NO_ROW
    )


class PatchesSettings(Section):
    """Settings of the job patches, which reads patches of pixels ahead of a trainer."""

    folder: WrittenFolder = setting(
        None, "folder of the windows: a path on a disk that executors and trainer share", NO_ROW
    )
    patch_px: int = setting(
        256, "edge of a finished patch, pixels; no table is made again for it", NO_ROW, ge=1, le=8192
    )
    mpp: Mpp | None = setting(None, "micrometres per pixel of a patch; null reads `level` as it is", NO_ROW)
    level: int = setting(0, "of the slide, 0 is the finest; used if mpp is null", NO_ROW, ge=0)
    split: str | None = setting(None, "only patients of this value of patients.split; null takes all", NO_ROW)
    epochs: int = setting(1, "epochs to read ahead, each in an order of its own", NO_ROW, ge=1)
    window_patches: int = setting(
        2048, "patches per window, which are mixed with each other; a task holds them in memory", NO_ROW, ge=1
    )
    unit_patches: int = setting(
        8, "neighbouring patches read together: more read faster, fewer mix better", NO_ROW, ge=1
    )
    most_unread: int = setting(
        8, "windows on disk or being read, at most; executors then wait for the trainer", NO_ROW, ge=2
    )
    patience_s: float = setting(
        3600.0, "seconds that the trainer may take for a window; then the job ends", NO_ROW, gt=0
    )
    on_bad_slide: Literal["raise", "skip"] = setting(
        "raise", "raise: a slide that can't be read ends the job; skip: its patches are left out and counted", NO_ROW
    )
    seed: int = setting(0, "of the order", NO_ROW, ge=0)

    @model_validator(mode="after")
    def _one_spacing(self) -> "PatchesSettings":
        if self.mpp is not None and self.level:
            raise ValueError("mpp and level are both set, and mpp chooses the level: leave one out")
        return self

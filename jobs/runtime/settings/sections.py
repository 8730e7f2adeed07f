"""The sections of the settings: what can be set, its type, its default, its meaning, and what does not go together."""

import os
import unicodedata
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from udfs.wsi.reading.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import TIMEOUT_S, StoreOptions, why_not_for_tables


@dataclass(frozen=True)
class Location:
    """Marks a setting that says where something lies: a path or a URI."""

    written: Literal["folder", "file"] | None = None  # what the job that reads the setting writes there
    names: tuple[str, ...] = ()  # values that are neither


Source = Annotated[str | None, Location()]
Folder = Annotated[str | None, Location(written="folder")]
File = Annotated[str | None, Location(written="file")]
# Sections that one job alone reads.
ONE_JOBS = {
    "stainnet": "stainnet",
    "splits": "splits",
    "training": "train",
    "predict": "predict",
    "patches": "patches",
}


class Section(BaseModel):
    """What all sections have: no unknown keys, no changes, no NaN; the names of settings, whatever attributes are called."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


def _with_dots(extensions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{extension.lower().removeprefix('.')}" for extension in extensions)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("must be a power of two")
    return value


def _in_nfc(text: str | None) -> str | None:
    return text and unicodedata.normalize("NFC", text)  # as identifiers of the CSV are


def _plausible(mpp: float) -> float:
    if plausible_mpp(mpp) is None:
        raise ValueError(f"must be {MPP_WANTED}")
    return mpp


Mpp = Annotated[float, AfterValidator(_plausible)]


class Slides(Section):
    """Where the slides are."""

    root: Source = Field(
        None, description="folder or bucket of the slides, any fsspec URI; files are found at any depth by image_id"
    )
    extensions: Annotated[tuple[str, ...], AfterValidator(_with_dots)] = Field(
        (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif"), description="file name endings that are slides"
    )
    timeout_s: float = Field(
        TIMEOUT_S,
        gt=0,
        description="seconds that a slide may wait for its store in all, and one more for each MB that comes; then it is "
        "read_failed; also for the CSV and weights",
    )
    storage_options: dict[str, Any] = Field(
        {},
        description="for fsspec, for the store of root and no other (weights on s3:// beside az://); ${NAME} takes an "
        "environment variable; never logged, never stored",
        repr=False,
    )

    @field_validator("storage_options")
    @classmethod
    def _of_the_root(cls, options: dict[str, Any], info: ValidationInfo) -> StoreOptions:
        return StoreOptions(options, info.data.get("root"), info.data.get("timeout_s", TIMEOUT_S))


def _place_of_tables(root: str) -> str:
    if not root.strip():
        raise ValueError("names no folder: give a path or a URI")
    if why := why_not_for_tables(root):
        raise ValueError(f"{why}: name the folder otherwise")
    return root if "://" in root else os.path.expanduser(root)  # noqa: PTH111 - Path's own refuses a folder ~x


class Output(Section):
    """Where the tables go."""

    root: Annotated[str, Location(written="folder"), AfterValidator(_place_of_tables)] = Field(
        description="folder or URI of the tables: ROOT/slides, ROOT/tiles, ROOT/features, ..."
    )
    schema_name: str | None = Field(  # BaseModel has a `schema` of its own
        None,
        alias="schema",
        pattern=r"^[^\s.`]+(\.[^\s.`]+)?$",
        description="SCHEMA or CATALOG.SCHEMA of Spark's catalog (Unity Catalog, Hive), there already, where the tables get "
        "their names too; null registers none",
    )
    embedding_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="of the bags in patients; float16 halves them and rounds to 3 digits; a patient with numbers above "
        "65504 has float32",
    )


class Tiling(Section):
    """Which squares of a slide are tiles."""

    tile_px: int = Field(448, ge=16, le=8192, description="edge of a tile, pixels at the reading resolution")
    mpp: Mpp | None = Field(None, description="target micrometres per pixel; null reads level 0 as scanned")
    mask_downsample: int = Field(16, ge=1, le=256, description="the tissue mask is computed at 1/this")
    background_brightness: int = Field(
        190, ge=0, le=255, description="a mask pixel is background where R, G and B are all above this"
    )
    max_background: float = Field(0.10, ge=0, le=1, description="a tile is kept where its background share is <= this")
    max_tiles_per_patient: int | None = Field(
        None, ge=1, description="encode at most this many tiles a patient, drawn by a hash of seed and patient_id"
    )
    seed: int = Field(0, description="of that draw")


class Stain(Section):
    """Stain normalisation."""

    weights: Source = Field(None, description="URI of a StainNet checkpoint; null does not normalise")


class Encoder(Section):
    """The network that embeds tiles."""

    name: str = Field("efficientnet_b0", description="a timm model")
    weights: Source = Field(
        None, description="URI of its checkpoint (safetensors or state dict); null takes the hub's pretrained weights"
    )
    input_px: int = Field(224, ge=32, le=2048, description="edge of what the encoder sees")
    interpolation: Literal["area", "model"] = Field(
        "area", description="how a tile is brought to input_px: area average, or as the model was trained"
    )
    pooling: Literal["auto", "map", "pooled"] = Field(
        "auto",
        description="map: mean and max over the positions of the model's feature map; pooled: the model's own vector, "
        "and no maximum; auto: map if the model yields one",
    )
    runtime: Literal["torch", "openvino"] = Field(
        "torch",
        description="openvino is fastest on processors, and an extra; the job doctor measures both on your slides",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16 and fp16 are faster on some processors and on GPUs; the job doctor measures them"
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto", description="tiles per forward pass; auto measures once per host"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")

    @field_validator("runtime", mode="before")
    @classmethod
    def _not_measured_by_the_run(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("must be torch or openvino: slidelake doctor measures both on your slides")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "Encoder":
        if self.precision == "fp16" and (self.device == "cpu" or self.runtime == "openvino"):
            raise ValueError("precision fp16 needs a GPU: set precision to fp32 or bf16")
        if self.runtime == "openvino" and self.device == "cuda":
            raise ValueError("runtime openvino runs on processors: set device to cpu, or runtime to torch")
        if self.runtime == "openvino" and not find_spec("openvino"):
            raise ValueError(
                "runtime openvino needs OpenVINO: pip install 'slidelake[openvino]', or set runtime to torch"
            )
        return self


class Resources(Section):
    """What a task of the features stage gets on a cluster; other stages go by Spark's own settings."""

    gpus_per_task: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPUs a task, at most the one that it uses; 0.5 lets two tasks share one; null asks for none. Without "
        "effect where executors have no GPU and in local mode",
    )
    cpus_per_task: int | None = Field(None, ge=1, description="processors a task; null is spark.task.cpus")


class Histogram(Section):
    """Colour counts."""

    bins: Annotated[int, AfterValidator(_power_of_two)] = Field(16, ge=2, le=32, description="bins a channel")


class Stainnet(Section):
    """Settings of the job stainnet, which fits a StainNet to your slides."""

    reference: Annotated[str | None, AfterValidator(_in_nfc)] = Field(
        None, description="image_id of the slide that all others shall look like"
    )
    checkpoint: File = Field(None, description="path that the fitted checkpoint is written to")
    tiles: int = Field(128, ge=4, le=10_000, description="tiles drawn from the cohort, evenly over slides")
    steps: int = Field(3000, ge=1, description="steps of the fit")
    seed: int = Field(0, description="of the draw and the fit")


class Splits(Section):
    """Settings of the job splits, which says who is in train, validation and test."""

    train: float = Field(0.8, gt=0, le=1, description="share of the images that models learn from")
    validation: float = Field(0.1, ge=0, lt=1, description="share that says when to stop")
    test: float = Field(0.1, ge=0, lt=1, description="share that is held out")
    stratify: tuple[Literal["center_id", "label"], ...] = Field(
        ("center_id", "label"), description="what the shares hold within, beside the cohort as a whole"
    )
    seed: int = Field(0, description="of the order in which patients are dealt")
    folds: int | None = Field(
        None, ge=2, le=100, description="deal train and validation to so many folds too; null: no folds"
    )
    csv: Folder = Field(None, description="folder or URI of train.csv, validation.csv, ...; null is ROOT/splits_csv")

    @field_validator("stratify", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _sum_to_one(self) -> "Splits":
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test sum to {total:.6g}: they must sum to 1")
        return self


class Training(Section):
    """Settings of the job train."""

    model: Literal["attention", "mean", "logistic"] = Field(
        "attention",
        description="attention: gated attention over the tiles of a patient; mean: all tiles alike; logistic: logistic "
        "regression on the mean tile",
    )
    columns: Literal["avg", "max", "both"] = Field(
        "avg", description="embeddings of a tile that the model sees; max: of encoders with a feature map"
    )
    use_histogram: bool = Field(False, description="show it the patient's colour histogram too")
    use_center: bool = Field(
        False,
        description="show it the centre too: it then learns which patients each centre treats, and can't judge others",
    )
    hidden: int = Field(256, ge=1, le=8192, description="width of a tile after the first layer")
    attention_hidden: int = Field(128, ge=1, le=8192, description="width of the attention network")
    dropout: float = Field(0.25, ge=0, lt=1, description="share of hidden values left out in each step")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    epochs: int = Field(50, ge=1, le=100_000, description="at most so many passes over split train")
    patience: int = Field(
        15, ge=1, description="stop when the loss on split validation has not gone down for so many epochs"
    )
    batch_size: int = Field(8, ge=1, le=65_536, description="patients a step, of each process")
    bag_size: int | None = Field(
        None, ge=1, description="tiles drawn of each patient in each epoch; null takes all; predictions always take all"
    )
    fold: int | None = Field(
        None,
        ge=0,
        description="validate on this fold of table splits, learn from the others; null goes by column split",
    )
    class_weights: Literal["balanced", "none"] = Field(
        "balanced", description="balanced: every class has the same say in the loss, however few its patients"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="of first weights, order, draws and dropout: same seed, same model"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto takes GPUs, one a process, where there are some: this machine's, or on a cluster those that Spark "
        "gives tasks by spark.task.resource.gpu.amount=1",
    )
    processes: int = Field(
        1, ge=1, description="more than 1: so many at once, by Spark's TorchDistributor; 1 needs no Spark"
    )
    output: Folder = Field(
        None, description="folder or URI of the models, one folder a run; null is OUTPUT.ROOT/models"
    )
    mlflow: Annotated[str | None, Location(names=("databricks", "databricks-uc"))] = Field(
        None, description="tracking URI of MLflow to send metrics to as well; needs slidelake[mlflow]"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Training":
        if self.mlflow and not find_spec("mlflow"):
            raise ValueError("mlflow needs MLflow: pip install 'slidelake[mlflow]', or set it to null")
        if self.model == "logistic" and self.processes > 1:
            raise ValueError("model logistic trains in one process: set processes to 1")
        return self


class Predict(Section):
    """Settings of the job predict."""

    model: Source = Field(None, description="folder or URI of a trained model: ROOT/models/RUN_ID")
    csv: File = Field(
        None, description="path or URI of the CSV of probabilities; null is ROOT/predictions_csv/MODEL_ID.csv"
    )


class Patches(Section):
    """Settings of the job patches, which reads patches of pixels ahead of a trainer."""

    folder: Folder = Field(None, description="where the windows go: a path on a disk that executors and trainer share")
    patch_px: int = Field(
        256, ge=1, le=8192, description="edge of a finished patch, pixels; no table is made again for it"
    )
    mpp: Mpp | None = Field(None, description="micrometres per pixel of a patch; null reads `level` as it is")
    level: int = Field(0, ge=0, description="of the slide, 0 the finest; where mpp is null")
    split: str | None = Field(None, description="only patients of this value of patients.split; null takes all")
    epochs: int = Field(1, ge=1, description="epochs to read ahead, each in an order of its own")
    window_patches: int = Field(
        2048, ge=1, description="patches a window, which are mixed with each other; a task holds them in memory"
    )
    unit_patches: int = Field(
        8, ge=1, description="neighbouring patches read together: more read faster, fewer mix better"
    )
    most_unread: int = Field(
        8, ge=2, description="windows on disk or being read, at most; executors then wait for the trainer"
    )
    patience_s: float = Field(
        3600.0, gt=0, description="seconds that the trainer may take for a window; then the job ends"
    )
    on_bad_slide: Literal["raise", "skip"] = Field(
        "raise",
        description="raise: a slide that can't be read ends the job; skip: its patches are left out and counted",
    )
    seed: int = Field(0, ge=0, description="of the order")

    @model_validator(mode="after")
    def _one_spacing(self) -> "Patches":
        if self.mpp is not None and self.level:
            raise ValueError("mpp and level are both set, and mpp chooses the level: leave one out")
        return self


class Run(Section):
    """How a run goes."""

    wave_slides: int | None = Field(
        None,
        ge=1,
        description="slides committed at once, beside at most 4,096 missing ones; null takes 8 a task slot, at most 512",
    )
    unit_tiles: int = Field(
        256, ge=1, le=100_000, description="at most so many neighbouring tiles are read and encoded together"
    )

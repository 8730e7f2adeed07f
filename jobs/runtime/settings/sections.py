"""The sections of the settings: what can be set, its type, its default, its meaning, and what does not go together."""

import os
import unicodedata
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from udfs.wsi.reading.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import TIMEOUT_S, StoreOptions, why_not_for_tables
from udfs.wsi.tissue.method import tissue_methods


@dataclass(frozen=True)
class Location:
    """Marks a setting that says where something lies: a path or a URI."""

    written: Literal["folder", "file"] | None = None  # what the job that reads the setting writes there
    names: tuple[str, ...] = ()  # values that are neither


Source = Annotated[str | None, Location()]
WrittenFolder = Annotated[str | None, Location(written="folder")]
WrittenFile = Annotated[str | None, Location(written="file")]


class Shapes:
    """Says whose rows a setting shapes: see `jobs.runtime.settings.identity`.

    Args:
        tables: ``slides`` stands for slides, tiles and indexes, which one pass makes; ``selection`` for which tiles have a
            row in features. Tables further down follow from these and are not named.
        by_content: not the value itself counts, but what it leads to: the numbers in a file, the form of a loaded model.
    """

    def __init__(
        self, *tables: Literal["slides", "selection", "features", "patients", "splits"], by_content: bool = False
    ) -> None:
        self.tables, self.by_content = frozenset(tables), by_content


NO_ROW = Shapes()


def setting(default: Any, meaning: str, shapes: Shapes, **constraints: Any) -> Any:
    """A field of a section: its default (``...``: required), its meaning, the rows that it shapes, and pydantic's constraints."""
    return Field(default, description=meaning, json_schema_extra={"shapes": shapes}, **constraints)  # type: ignore[dict-item]


def shapes_of(field: FieldInfo) -> Shapes | None:
    """Whose rows a setting shapes; None if its definition does not say."""
    extra = field.json_schema_extra
    shapes = extra.get("shapes") if isinstance(extra, dict) else None
    return shapes if isinstance(shapes, Shapes) else None


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


class SlidesSettings(Section):
    """Where the slides are."""

    root: Source = setting(
        None, "folder or bucket of the slides, any fsspec URI; files are found at any depth by image_id", NO_ROW
    )
    extensions: Annotated[tuple[str, ...], AfterValidator(_with_dots)] = setting(
        (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif"), "file name endings that are slides", NO_ROW
    )
    timeout_s: float = setting(
        TIMEOUT_S,
        "seconds that a slide may wait for its store in all, and one more for each MB that comes; then it is "
        "read_failed; also for the CSV and weights",
        NO_ROW,
        gt=0,
    )
    storage_options: dict[str, Any] = setting(
        {},
        "for fsspec, for the store of root and no other (weights on s3:// beside az://); ${NAME} takes an "
        "environment variable; never logged, never stored",
        NO_ROW,
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


class OutputSettings(Section):
    """Where the tables go."""

    root: Annotated[str, Location(written="folder"), AfterValidator(_place_of_tables)] = setting(
        ..., "folder or URI of the tables: ROOT/slides, ROOT/tiles, ROOT/features, ...", NO_ROW
    )
    schema_name: str | None = setting(  # BaseModel has a `schema` of its own
        None,
        "SCHEMA or CATALOG.SCHEMA of Spark's catalog (Unity Catalog, Hive), there already, where the tables get "
        "their names too; null registers none",
        NO_ROW,
        alias="schema",
        pattern=r"^[^\s.`]+(\.[^\s.`]+)?$",
    )
    embedding_dtype: Literal["float32", "float16"] = setting(
        "float32",
        "of the bags in patients; float16 halves them and rounds to 3 digits; a patient with numbers above "
        "65504 has float32",
        Shapes("patients"),
    )


def _tissue_section() -> Any:
    """The section `tissue`: the method, and the settings that each method declares."""
    methods = tissue_methods()
    choice = setting("brightness", f"how the mask is made: {', '.join(methods)}", Shapes("slides"))
    settings: dict[str, Any] = {"method": (Literal[*methods], choice)}
    for name, method in methods.items():
        for one in fields(method):
            shapes = Shapes("slides") if one.metadata["shapes_mask"] else NO_ROW
            meaning = f"{name}: {one.metadata['description']}"
            field = setting(one.default, meaning, shapes, **one.metadata["bounds"])
            settings[one.name] = (get_type_hints(method)[one.name], field)
    return create_model("TissueSettings", __base__=Section, **settings)


TissueSettings = _tissue_section()


class TilingSettings(Section):
    """Which squares of a slide are tiles."""

    tile_px: int = setting(
        448, "edge of a tile, pixels at the reading resolution", Shapes("slides", "features"), ge=16, le=8192
    )
    mpp: Mpp | None = setting(
        None, "target micrometres per pixel; null reads level 0 as scanned", Shapes("slides", "features")
    )
    mask_downsample: int = setting(16, "the tissue mask is computed at 1/this", Shapes("slides"), ge=1, le=256)
    max_background: float = setting(
        0.10, "a tile is kept where its background share is <= this", Shapes("slides"), ge=0, le=1
    )
    max_tiles_per_patient: int | None = setting(
        None,
        "encode at most this many tiles a patient, drawn by a hash of seed and patient_id",
        Shapes("selection"),
        ge=1,
    )
    seed: int = setting(0, "of that draw", Shapes("selection"))


class StainSettings(Section):
    """Stain normalisation."""

    weights: Source = setting(
        None, "URI of a StainNet checkpoint; null does not normalise", Shapes("features", by_content=True)
    )


class EncoderSettings(Section):
    """The network that embeds tiles."""

    name: str = setting("efficientnet_b0", "a timm model", Shapes("features"))
    weights: Source = setting(
        None,
        "URI of its checkpoint (safetensors or state dict); null takes the hub's pretrained weights",
        Shapes("features", by_content=True),
    )
    input_px: int = setting(224, "edge of what the encoder sees", Shapes("features"), ge=32, le=2048)
    interpolation: Literal["area", "model"] = setting(
        "area", "how a tile is brought to input_px: area average, or as the model was trained", Shapes("features")
    )
    pooling: Literal["auto", "map", "pooled"] = setting(
        "auto",
        "map: mean and max over the positions of the model's feature map; pooled: the model's own vector, and no maximum; "
        "auto: map if the model yields one",
        Shapes("features", by_content=True),
    )
    runtime: Literal["torch", "openvino"] = setting(
        "torch",
        "openvino is fastest on processors, and an extra; the job doctor measures both on your slides",
        Shapes("features", by_content=True),
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32",
        "bf16 and fp16 are faster on some processors and on GPUs; the job doctor measures them",
        Shapes("features", by_content=True),
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = setting(
        "auto", "tiles per forward pass; auto measures once per host", NO_ROW
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU if there is one", NO_ROW)

    @field_validator("runtime", mode="before")
    @classmethod
    def _not_measured_by_the_run(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("must be torch or openvino: slidelake doctor measures both on your slides")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "EncoderSettings":
        if self.precision == "fp16" and (self.device == "cpu" or self.runtime == "openvino"):
            raise ValueError("precision fp16 needs a GPU: set precision to fp32 or bf16")
        if self.runtime == "openvino" and self.device == "cuda":
            raise ValueError("runtime openvino runs on processors: set device to cpu, or runtime to torch")
        if self.runtime == "openvino" and not find_spec("openvino"):
            raise ValueError(
                "runtime openvino needs OpenVINO: pip install 'slidelake[openvino]', or set runtime to torch"
            )
        return self


class ResourcesSettings(Section):
    """What a task of the features stage gets on a cluster; other stages go by Spark's own settings."""

    gpus_per_task: float | None = setting(
        None,
        "GPUs a task, at most the one that it uses; 0.5 lets two tasks share one; null asks for none. Without "
        "effect where executors have no GPU and in local mode",
        NO_ROW,
        ge=0,
        le=1,
    )
    cpus_per_task: int | None = setting(None, "processors a task; null is spark.task.cpus", NO_ROW, ge=1)


class HistogramSettings(Section):
    """Colour counts."""

    bins: Annotated[int, AfterValidator(_power_of_two)] = setting(16, "bins a channel", Shapes("features"), ge=2, le=32)


class StainnetSettings(Section):
    """Settings of the job stainnet, which fits a StainNet to your slides."""

    reference: Annotated[str | None, AfterValidator(_in_nfc)] = setting(
        None, "image_id of the slide that all others shall look like", NO_ROW
    )
    checkpoint: WrittenFile = setting(None, "path that the fitted checkpoint is written to", NO_ROW)
    tiles: int = setting(128, "tiles drawn from the cohort, evenly over slides", NO_ROW, ge=4, le=10_000)
    steps: int = setting(3000, "steps of the fit", NO_ROW, ge=1)
    seed: int = setting(0, "of the draw and the fit", NO_ROW)


class SplitsSettings(Section):
    """Settings of the job splits, which says who is in train, validation and test."""

    train: float = setting(0.8, "share of the images that models learn from", Shapes("splits"), gt=0, le=1)
    validation: float = setting(0.1, "share that says when to stop", Shapes("splits"), ge=0, lt=1)
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
    use_histogram: bool = setting(False, "show it the patient's colour histogram too", NO_ROW)
    use_center: bool = setting(
        False,
        "show it the centre too: it then learns which patients each centre treats, and can't judge others",
        NO_ROW,
    )
    hidden: int = setting(256, "width of a tile after the first layer", NO_ROW, ge=1, le=8192)
    attention_hidden: int = setting(128, "width of the attention network", NO_ROW, ge=1, le=8192)
    dropout: float = setting(0.25, "share of hidden values left out in each step", NO_ROW, ge=0, lt=1)
    learning_rate: float = setting(1e-3, "of AdamW", NO_ROW, gt=0)
    weight_decay: float = setting(1e-2, "of AdamW", NO_ROW, ge=0)
    epochs: int = setting(50, "at most so many passes over split train", NO_ROW, ge=1, le=100_000)
    patience: int = setting(
        15, "stop when the loss on split validation has not gone down for so many epochs", NO_ROW, ge=1
    )
    batch_size: int = setting(8, "patients a step, of each process", NO_ROW, ge=1, le=65_536)
    bag_size: int | None = setting(
        None, "tiles drawn of each patient in each epoch; null takes all; predictions always take all", NO_ROW, ge=1
    )
    fold: int | None = setting(
        None, "validate on this fold of table splits, learn from the others; null goes by column split", NO_ROW, ge=0
    )
    class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: every class has the same say in the loss, however few its patients", NO_ROW
    )
    seed: int = setting(0, "of first weights, order, draws and dropout: same seed, same model", NO_ROW, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        "auto takes GPUs, one a process, where there are some: this machine's, or on a cluster those that Spark "
        "gives tasks by spark.task.resource.gpu.amount=1",
        NO_ROW,
    )
    processes: int = setting(
        1, "more than 1: so many at once, by Spark's TorchDistributor; 1 needs no Spark", NO_ROW, ge=1
    )
    output: WrittenFolder = setting(
        None, "folder or URI of the models, one folder a run; null is OUTPUT.ROOT/models", NO_ROW
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
        None, "where the windows go: a path on a disk that executors and trainer share", NO_ROW
    )
    patch_px: int = setting(
        256, "edge of a finished patch, pixels; no table is made again for it", NO_ROW, ge=1, le=8192
    )
    mpp: Mpp | None = setting(None, "micrometres per pixel of a patch; null reads `level` as it is", NO_ROW)
    level: int = setting(0, "of the slide, 0 the finest; where mpp is null", NO_ROW, ge=0)
    split: str | None = setting(None, "only patients of this value of patients.split; null takes all", NO_ROW)
    epochs: int = setting(1, "epochs to read ahead, each in an order of its own", NO_ROW, ge=1)
    window_patches: int = setting(
        2048, "patches a window, which are mixed with each other; a task holds them in memory", NO_ROW, ge=1
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


class RunSettings(Section):
    """How a run goes."""

    wave_slides: int | None = setting(
        None,
        "slides committed at once, beside at most 4,096 missing ones; null takes 8 a task slot, at most 512",
        NO_ROW,
        ge=1,
    )
    unit_tiles: int = setting(
        256, "at most so many neighbouring tiles are read and encoded together", NO_ROW, ge=1, le=100_000
    )

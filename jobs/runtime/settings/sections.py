"""The sections of the settings that several jobs read: what can be set, and what does not go together."""

import os
from dataclasses import fields
from importlib.util import find_spec
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from jobs.runtime.settings.setting import NO_ROW, Location, Mpp, Section, Shapes, Source, setting
from udfs.wsi.colour import Colour, checked_mean, checked_std
from udfs.wsi.store import TIMEOUT_S, StoreOptions, StoreUri, why_not_for_tables
from udfs.wsi.tissue.method import tissue_methods

_SLIDES, _FEATURES, _ALL_ROWS = Shapes("slides"), Shapes("features"), Shapes("slides", "features")
_LOADED = Shapes("features", by_content=True)


def _with_dots(extensions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{extension.lower().removeprefix('.')}" for extension in extensions)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("must be a power of two")
    return value


class SlidesSettings(Section):
    """Where the slides are."""

    root: Source = setting(None, "folder or bucket of the slides, any fsspec URI; searched at any depth", NO_ROW)
    extensions: Annotated[tuple[str, ...], AfterValidator(_with_dots)] = setting(
        (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif"), "file name endings that are slides", NO_ROW
    )
    timeout_s: float = setting(
        TIMEOUT_S,
        "seconds that a slide may wait for its store in all, and one more for each MB that arrives; then it is read_failed; "
        "also for the CSV and weights",
        NO_ROW,
        gt=0,
    )
    storage_options: dict[str, Any] = setting(
        {},
        "for fsspec, only for the store of root (not for weights on s3:// beside az://); ${NAME} takes an environment variable; "
        "never logged, never stored",
        NO_ROW,
        repr=False,
    )

    @field_validator("storage_options")
    @classmethod
    def _of_the_root(cls, options: dict[str, Any], info: ValidationInfo) -> StoreOptions:
        return StoreOptions(options, info.data.get("root"), info.data.get("timeout_s", TIMEOUT_S))


def _table_root(root: str) -> str:
    if not root.strip():
        raise ValueError("names no folder: give a path or a URI")
    if why := why_not_for_tables(root):
        raise ValueError(f"{why}: name the folder otherwise")
    return root if "://" in root else os.path.expanduser(root)  # noqa: PTH111 - Path's own refuses a folder ~x


class OutputSettings(Section):
    """Where the tables go."""

    root: Annotated[StoreUri, Location(written="folder"), AfterValidator(_table_root)] = setting(
        ..., "folder or URI of the tables: ROOT/slides, ROOT/tiles, ROOT/features, ...", NO_ROW
    )
    schema_name: str | None = setting(  # BaseModel has a `schema` of its own
        None,
        "an existing SCHEMA or CATALOG.SCHEMA of Spark's catalog (Unity Catalog, Hive), in which the tables get names too",
        NO_ROW,
        alias="schema",
        pattern=r"^[^\s.`]+(\.[^\s.`]+)?$",
    )
    embedding_dtype: Literal["float32", "float16"] = setting(
        "float32",
        "of the bags in patients; float16 halves them and rounds to 3 digits; a patient with numbers above 65504 has float32",
        Shapes("patients"),
    )


def _tissue_section() -> Any:
    """The section `tissue`: the method, and the settings that each method declares."""
    methods = tissue_methods()
    choice = setting("brightness", f"how the mask is made: {', '.join(methods)}", _SLIDES)
    settings: dict[str, Any] = {"method": (Literal[*methods], choice)}
    for name, method in methods.items():
        for one in fields(method):
            shapes = _SLIDES if one.metadata["shapes_mask"] else NO_ROW
            field = setting(one.default, f"{name}: {one.metadata['description']}", shapes, **one.metadata["bounds"])
            settings[one.name] = (get_type_hints(method)[one.name], field)
    return create_model("TissueSettings", __base__=Section, **settings)


TissueSettings = _tissue_section()


class TilingSettings(Section):
    """Which squares of a slide are tiles."""

    tile_px: int = setting(448, "edge of a tile, pixels at the reading resolution", _ALL_ROWS, ge=16, le=8192)
    mpp: Mpp | None = setting(None, "um/px that tiles are read at; null reads level 0 as scanned", _ALL_ROWS)
    mask_downsample: int = setting(16, "the tissue mask is computed at 1/this", _SLIDES, ge=1, le=256)
    max_background: float = setting(0.10, "a tile is kept if its background share is <= this", _SLIDES, ge=0, le=1)
    max_tiles_per_patient: int | None = setting(
        None, "tiles encoded per patient, at most, drawn by a hash of seed and patient_id", Shapes("selection"), ge=1
    )
    seed: int = setting(0, "seed of this draw", Shapes("selection"))


class StainSettings(Section):
    """Stain normalisation."""

    weights: Source = setting(None, "URI of a StainNet checkpoint; null does not normalise", _LOADED)


def _number(value: Any) -> Any:
    """The number that YAML takes for a text, such as 1e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Argument = Annotated[bool | int | float | str | None, BeforeValidator(_number)]


class EncoderSettings(Section):
    """A network that embeds tiles. Section `encoders` has one below each name."""

    model: str | None = setting(
        None,
        "a preset (`slidelake encoders` lists them), which says how it is run, a timm model, hf-hub:OWNER/NAME[@REVISION], or "
        "local-dir:PATH; null takes the encoder's name",
        _LOADED,
    )
    weights: Source = setting(
        None,
        "path or URI of its checkpoint (safetensors or state dict), or hf-hub:OWNER/NAME[@REVISION]; null takes the published "
        "weights from the hub",
        _LOADED,
    )
    input_px: int | None = setting(
        None,
        "edge to which a tile is resized; null takes the preset's, else 224",
        _LOADED,
        ge=32,
        le=2048,
    )
    crop_px: int | None = setting(
        None,
        "edge of the centre that the encoder sees of it; null takes the preset's, else all of it",
        _LOADED,
        ge=32,
        le=2048,
    )
    interpolation: Literal["area", "bilinear", "bicubic", "model"] | None = setting(
        None,
        "how a tile is resized; area is the area average, model is as the model was trained; null takes the preset's, else area",
        _LOADED,
    )
    mean: Annotated[Colour, AfterValidator(checked_mean)] | None = setting(
        None,
        "mean of the training images in red, green and blue, 0 to 1; null takes the preset's, else the model's own",
        _LOADED,
    )
    std: Annotated[Colour, AfterValidator(checked_std)] | None = setting(
        None, "their standard deviation, above 0 and at most 1; null as for mean", _LOADED
    )
    pooling: Literal["auto", "map", "pooled", "cls", "mean", "cls_mean"] = setting(
        "auto",
        "map: mean and max over the positions of the model's feature map; one vector and no maximum: pooled (the model's own), "
        "cls (class token), mean (of the patches), cls_mean (both, joined); auto: the preset's, else map if there is one",
        _LOADED,
    )
    kwargs: dict[str, Argument] = setting({}, "arguments for timm's model beside the preset's; layers by name", _LOADED)
    allow_other_scale: bool = setting(
        False, "run a preset on tiles of a width or um/px that it is not recommended for", NO_ROW
    )


class InferenceSettings(Section):
    """How encoders run."""

    runtime: Literal["torch", "openvino"] = setting(
        "torch", "openvino is fastest on processors, and an extra; the job doctor measures both on your slides", _LOADED
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = setting(
        None,
        "bf16 and fp16 are faster on some processors and on GPUs; the job doctor measures them; null: fp32, or the preset's if "
        "device is cuda",
        _LOADED,
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
    def _fit_together(self) -> "InferenceSettings":
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
        "GPUs per task, at most 1; 0.5 lets two tasks share one; null requests none. No effect if executors have no GPU, nor in "
        "local mode",
        NO_ROW,
        ge=0,
        le=1,
    )
    cpus_per_task: int | None = setting(None, "processors per task; null is spark.task.cpus", NO_ROW, ge=1)


class HistogramSettings(Section):
    """Colour counts."""

    bins: Annotated[int, AfterValidator(_power_of_two)] = setting(16, "bins per channel", _FEATURES, ge=2, le=32)


class RunSettings(Section):
    """How a run goes."""

    wave_slides: int | None = setting(
        None,
        "slides committed at once; null: 8 per task slot, at most 512; up to 4,096 missing ones more",
        NO_ROW,
        ge=1,
    )
    unit_tiles: int = setting(256, "neighbouring tiles read and encoded together, at most", NO_ROW, ge=1, le=100_000)

"""The run's own work for some seconds, for the job doctor: the models, how fast a task is, and how fast it could be."""

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from udfs.encode_tiles import FeatureSpec, device_of_this_task, encode_tiles, models_of_this_worker
from udfs.find_tissue import TissueSpec, find_tissue
from udfs.plan_units import plan_units
from udfs.schemas import ENCODED, UNITS
from udfs.wsi.encoder.encoder_spec import Precision, Runtime

_UNIT_TILES = 64  # few, so that a sample ends when its time is over
_MANY_TILES = 10**6  # a run has many ahead: the sample makes StainNet's table, as the run will
_RUNTIMES: dict[
    str, tuple[tuple[Runtime, Precision], ...]
] = {  # by device; the first is what the others are held against
    "cpu": (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16")),
    "cuda": (("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16")),
}
_MOST_UNITS = 16  # to measure runtimes by

Vectors = list[NDArray[np.float32]]  # [n, dim] for each output of the encoder
Encode = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]
SlidePlace = tuple[str, float | None]
"""URI of a slide, and its um/px from the CSV (None: the header's)."""


@dataclass(frozen=True)
class Loaded:
    """The models of a worker."""

    host: str
    device: str
    identity: tuple[str, ...]  # as of `udfs.encode_tiles.Models`


def load(spec: FeatureSpec) -> Loaded:
    """Load the models, to be used by later tasks of this worker; raises what they raise if weights can't be had."""
    models = models_of_this_worker(spec)
    return Loaded(socket.gethostname(), str(models.encoder.device), models.identity)


@dataclass(frozen=True)
class MeasuredRuntime:
    """One way to run the encoder."""

    runtime: Runtime
    precision: Precision
    tiles_per_s: float  # of one task of the features stage
    cosine: float  # to PyTorch's fp32: the mean over the tiles, of the worse of the outputs; NaN if one is not finite


def measure_runtimes(
    slides: Sequence[SlidePlace], tissue: TissueSpec, features: FeatureSpec, seconds: float
) -> list[MeasuredRuntime]:
    """Encode the same tiles in every way that this worker has, by the stages slides and features.

    Args:
        slides: where they are; the tiles are those of the first that has some.
        tissue: settings of the slides pass.
        features: settings of the features pass; of its encoder, runtime and precision are not used.
        seconds: PyTorch in fp32 encodes for so long or until the tiles end, the others encode as many tiles.

    Returns:
        PyTorch in fp32 first; nothing if no slide has tissue, or the first that has some does not decode.
    """
    found = (_found(tissue, slide) for slide in slides)
    units = next((_units(slide, tissue.tile_px)[:_MOST_UNITS] for slide in found if slide["status"] == "ok"), [])
    device = device_of_this_task(replace(features.encoder, runtime="torch")).type
    measured: list[MeasuredRuntime] = []
    expected: Vectors = []
    for runtime, precision in _RUNTIMES[device] if units else ():
        spec = replace(features, encoder=replace(features.encoder, runtime=runtime, precision=precision))
        try:
            models_of_this_worker(spec)
        except ValueError:  # not installed, not a precision of this processor, not a model that it takes
            continue
        encode = encode_tiles(spec, "doctor", tiles_ahead=_MANY_TILES)
        list(encode(units[:1]))  # what a worker does once
        vectors, n_units, first_s = _vectors(encode, units, math.inf if measured else seconds)
        if not all(map(len, vectors)):
            break  # the slide does not decode
        units, expected = units[:n_units], expected or vectors
        _, _, second_s = _vectors(encode, units, math.inf)
        cosine = float(np.min([_cosines(*pair).mean() for pair in zip(vectors, expected, strict=True)]))
        measured.append(MeasuredRuntime(runtime, precision, len(vectors[0]) / min(first_s, second_s), cosine))
    return measured


def _vectors(encode: Encode, units: Sequence[pa.RecordBatch], seconds: float) -> tuple[Vectors, int, float]:
    """The vectors of each output, of how many units they are, and the seconds that this took."""
    begun = time.monotonic()
    batches = list(encode(_in_time(units, seconds)))
    taken = time.monotonic() - begun
    rows = pa.Table.from_batches([batch for batch in batches if _is_of_tiles(batch)], ENCODED)
    columns = [rows[name] for name in ENCODED.names if name.startswith("embedding_")]
    vectors = [np.array(column.to_pylist(), np.float32) for column in columns if not column.null_count]
    return vectors, sum(not _is_of_tiles(batch) for batch in batches), taken


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = np.divide((x * y).sum(axis=1), norms, out=np.ones(len(x)), where=norms != 0)
    return cosines


@dataclass(frozen=True)
class SeenSlide:
    """A slide whose tissue was looked for."""

    seconds: float
    n_bytes: int  # read of it for that
    n_tiles: int
    size_bytes: int  # of its file
    error: str = ""
    too_small: str = ""  # why no tile fits on it


@dataclass
class Sample:
    """What one task did."""

    slides: list[SeenSlide] = field(default_factory=list)
    n_tiles: int = 0  # encoded
    seconds: float = 0.0  # that took, with the models loaded
    n_bytes: int = 0  # read for that
    dim: int = 0  # of an embedding
    n_embeddings: int = 2  # of a tile
    errors: list[str] = field(default_factory=list)


def take_sample(slides: Sequence[SlidePlace], tissue: TissueSpec, features: FeatureSpec, seconds: float) -> Sample:
    """Find tissue on each slide and encode tiles of it, as the stages slides and features do, for so many seconds in all.

    What a worker does once (loading models, the first batches) is not in them; what was begun when they are over is ended.

    Args:
        slides: where they are.
        tissue: settings of the slides pass.
        features: settings of the features pass.
        seconds: shared out evenly over the slides.
    """
    sample = Sample()
    encode = encode_tiles(features, "doctor", tiles_ahead=_MANY_TILES)
    is_warm = False
    for slide in slides:
        begun = time.monotonic()
        found = _found(tissue, slide)
        taken = time.monotonic() - begun
        read = found["work"]["bytes"] if found["work"] else 0
        message = found["error_message"] or ""
        error, too_small = ("", message) if found["status"] == "too_small" else (message, "")
        size = 0 if error else int(found["size_bytes"] or 0)
        sample.slides.append(SeenSlide(taken, read, found["n_tiles"] or 0, size, error, too_small))
        if found["status"] != "ok":
            continue
        units = _units(found, tissue.tile_px)
        if not is_warm:
            list(encode(units[:1]))
            is_warm = True
        _encode(sample, encode, units, max(0.0, seconds / len(slides) - taken))
    return sample


def _encode(sample: Sample, encode: Encode, units: Sequence[pa.RecordBatch], seconds: float) -> None:
    begun = time.monotonic()
    for batch in encode(_in_time(units, seconds)):
        if _is_of_tiles(batch):
            sample.dim = len(batch["embedding_avg"][0])
            sample.n_embeddings = 1 if batch["embedding_max"].null_count else 2
            continue
        [end] = batch.to_pylist()
        sample.n_tiles += end["n_tiles"]
        sample.n_bytes += end["work"]["bytes"] if end["work"] else 0
        if end["error_message"]:
            sample.errors.append(end["error_message"])
    sample.seconds += time.monotonic() - begun


def _in_time(units: Sequence[pa.RecordBatch], seconds: float) -> Iterator[pa.RecordBatch]:
    """Unit after unit until the time is over, at least one."""
    begun = time.monotonic()
    for unit in units:
        yield unit
        if time.monotonic() - begun >= seconds:
            return


def _is_of_tiles(batch: pa.RecordBatch) -> bool:
    """Else it is the row on how a unit went."""
    return bool(batch["x_px"].null_count == 0)


def _found(tissue: TissueSpec, slide: SlidePlace) -> dict[str, Any]:
    """The row of the slides pass, with the URI as it is opened."""
    uri, mpp = slide
    row = {"image_id": "sample", "patient_id": "sample", "uri": uri, "mpp": mpp, "params_hash": ""}
    frame = next(iter(find_tissue(tissue, "doctor")([pd.DataFrame([row], dtype=object)])))
    return cast(dict[str, Any], frame.iloc[0].to_dict()) | {"uri": uri}


def _units(found: dict[str, Any], tile_px: int) -> list[pa.RecordBatch]:
    """Work units of a slide, a batch each."""
    names = [name for name in UNITS.names if name not in ("unit", "n_tiles", "n_bytes", "cost")]
    row = found | {"tile_px": tile_px}
    schema = UNITS.empty_table().select(names).schema
    [planned] = plan_units(_UNIT_TILES)([pa.RecordBatch.from_pylist([{name: row[name] for name in names}], schema)])
    return [planned.slice(row, 1) for row in range(planned.num_rows)]

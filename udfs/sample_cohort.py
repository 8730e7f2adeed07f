"""A sample of a run's work for some seconds, for the job doctor: the models, how fast a task is, and how fast it could be."""

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from udfs.encode_tiles import FeatureSpec, device_of_this_task, encode_tiles, models_of_this_worker
from udfs.find_tissue import TissueSpec, find_tissue
from udfs.plan_units import plan_units
from udfs.schemas import ENCODED, UNITS
from udfs.wsi.encoder.encoder_spec import Precision, Runtime

_UNIT_TILES = 64  # few, so that a sample ends when its time is over
_MANY_TILES = 10**6  # a run has many ahead: the sample makes StainNet's table, as the run will
# by device; the first is what the others are held against
_RUNTIMES: dict[str, tuple[tuple[Runtime, Precision], ...]] = {
    "cpu": (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16")),
    "cuda": (("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16")),
}
_MOST_UNITS = 16  # to measure runtimes by

Vectors = list[NDArray[np.float32]]  # [n, dim] for each output of each encoder
Encode = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]
SlidePlace = tuple[str, float | None]
"""URI of a slide, and its um/px from the CSV (None: the header's)."""


@dataclass(frozen=True)
class Loaded:
    """The models of a worker."""

    host: str
    device: str
    identities: dict[str, tuple[str, ...]]  # as of `udfs.encode_tiles.Models`


def load(spec: FeatureSpec) -> Loaded:
    """Load the models, to be used by later tasks of this worker; raises what `models_of_this_worker` raises."""
    models = models_of_this_worker(spec)
    [device] = {str(encoder.device) for encoder in models.encoders.values()}
    return Loaded(socket.gethostname(), device, models.identities)


@dataclass(frozen=True)
class MeasuredRuntime:
    """One way to run the encoders."""

    runtime: Runtime
    precision: Precision
    tiles_per_s: float  # of one task of the features stage
    cosine: float  # to PyTorch's fp32: the mean over the tiles, of the worst of the vectors; NaN if one is not finite


def measure_runtimes(
    slides: Sequence[SlidePlace], tissue: TissueSpec, features: FeatureSpec, seconds: float
) -> list[MeasuredRuntime]:
    """Encodes the same tiles in every way that this worker has, by the slides and features passes.

    The tiles are those of the first slide that has some. Runtime and precision of `features` are not used. PyTorch in fp32
    encodes for `seconds` or until the tiles end; the others encode as many tiles.

    Returns:
        PyTorch in fp32 first; nothing if no slide has tissue, or the first slide that has some does not decode.
    """
    found = (_found(tissue, slide) for slide in slides)
    units = next(
        (_units(slide, tissue.tile_px, features.encoders)[:_MOST_UNITS] for slide in found if slide["status"] == "ok"),
        [],
    )
    encoders = features.encoders.items()
    device = device_of_this_task(replace(next(iter(features.encoders.values())), runtime="torch")).type
    measured: list[MeasuredRuntime] = []
    expected: Vectors = []
    for runtime, precision in _RUNTIMES[device] if units else ():
        here = {name: replace(encoder, runtime=runtime, precision=precision) for name, encoder in encoders}
        spec = replace(features, encoders=here)
        try:
            models_of_this_worker(spec)
        except ValueError:  # not installed, not a precision of this processor, not a model that it takes
            continue
        encode = encode_tiles(spec, "doctor", tiles_ahead=_MANY_TILES)
        list(encode(units[:1]))  # what a worker does once
        tiles, ends, first_s = _encode(encode, units, math.inf if measured else seconds)
        n_tiles = sum(end["n_tiles"] for end in ends)
        if not n_tiles:
            break  # the slide does not decode
        vectors = [vectors for name, _ in encoders for vectors in _vectors(tiles, name)]
        units, expected = units[: len(ends)], expected or vectors
        _, _, second_s = _encode(encode, units, math.inf)
        cosine = float(np.min([_cosines(*pair).mean() for pair in zip(vectors, expected, strict=True)]))
        measured.append(MeasuredRuntime(runtime, precision, n_tiles / min(first_s, second_s), cosine))
    return measured


def _vectors(tiles: pa.Table, encoder: str) -> Iterator[NDArray[np.float32]]:
    """Yields the columns of vectors that an encoder fills, float32 [n, dim]."""
    rows = tiles.filter(pc.field("encoder") == encoder)
    for name in ("embedding", "embedding_max"):
        if not rows[name].null_count:
            yield np.array(rows[name].to_pylist(), np.float32)


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
    dims: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the vectors of a tile, by encoder
    errors: list[str] = field(default_factory=list)


def take_sample(slides: Sequence[SlidePlace], tissue: TissueSpec, features: FeatureSpec, seconds: float) -> Sample:
    """Finds tissue on each slide and encodes tiles of it, as the slides and features passes do, for `seconds` in all.

    The seconds are shared out evenly over the slides. What a worker does once (loading models, the first batches) is not in
    them; a unit that was begun when they are over is finished.
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
        units = _units(found, tissue.tile_px, features.encoders)
        if not is_warm:
            list(encode(units[:1]))
            is_warm = True
        begun, ends = time.monotonic(), []
        for batch in encode(_in_time(units, max(0.0, seconds / len(slides) - taken))):  # not kept: embeddings are large
            tiles = batch.filter(pc.is_valid(batch["x_px"]))
            ends += batch.filter(pc.is_null(batch["x_px"])).to_pylist()
            if len(tiles):
                vectors = [tiles[name][0] for name in ("embedding", "embedding_max")]
                sample.dims[tiles["encoder"][0].as_py()] = tuple(len(one) for one in vectors if one.is_valid)
        sample.n_tiles += sum(end["n_tiles"] for end in ends)
        sample.seconds += time.monotonic() - begun
        sample.n_bytes += sum(end["work"]["bytes"] for end in ends if end["work"])
        sample.errors += [end["error_message"] for end in ends if end["error_message"]]
    return sample


def _encode(
    encode: Encode, units: Sequence[pa.RecordBatch], seconds: float
) -> tuple[pa.Table, list[dict[str, Any]], float]:
    """Encodes units, see `_in_time`.

    Returns the rows of tiles, one row per unit on how it went, and the seconds that this took.
    """
    begun = time.monotonic()
    rows = pa.Table.from_batches(list(encode(_in_time(units, seconds))), ENCODED)
    taken = time.monotonic() - begun
    ends = rows.filter(pc.field("x_px").is_null() & pc.field("encoder").is_null())
    return rows.filter(pc.is_valid(rows["x_px"])), ends.to_pylist(), taken


def _in_time(units: Sequence[pa.RecordBatch], seconds: float) -> Iterator[pa.RecordBatch]:
    """Yields unit after unit until the time is over, at least one."""
    begun = time.monotonic()
    for unit in units:
        yield unit
        if time.monotonic() - begun >= seconds:
            return


def _found(tissue: TissueSpec, slide: SlidePlace) -> dict[str, Any]:
    """The row of the slides pass, with the URI as it is opened."""
    uri, mpp = slide
    row = {"image_id": "sample", "patient_id": "sample", "uri": uri, "mpp": mpp, "params_hash": ""}
    frame = next(iter(find_tissue(tissue, "doctor")([pd.DataFrame([row], dtype=object)])))
    return cast(dict[str, Any], frame.iloc[0].to_dict()) | {"uri": uri}


def _units(found: dict[str, Any], tile_px: int, encoders: Iterable[str]) -> list[pa.RecordBatch]:
    """The work units of a slide, one batch per unit."""
    names = [name for name in UNITS.names if name not in ("unit", "n_tiles", "n_bytes", "cost")]
    row = found | {"tile_px": tile_px, "encoders": [{"encoder": name, "params_hash": ""} for name in encoders]}
    schema = UNITS.empty_table().select(names).schema
    [planned] = plan_units(_UNIT_TILES)([pa.RecordBatch.from_pylist([{name: row[name] for name in names}], schema)])
    return [planned.slice(row, 1) for row in range(planned.num_rows)]

"""The features pass: work units of coordinates in, a row a tile with embeddings and colours out (mapInArrow).

Pixels are read, normalised, embedded and counted inside the worker and dropped there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyspark import TaskContext

from udfs.failures import as_slide_error, check_quarantine
from udfs.schemas import ENCODED, HISTOGRAM
from udfs.wsi import SlideError, open_slide
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.histogram import color_histogram
from udfs.wsi.spacing import region_edge, resample
from udfs.wsi.stain import StainNet, load_stainnet
from udfs.wsi.storage import StorageOptions

VERSION = 1  # raise it when the same settings begin to give other rows: they are then redone

Unit = dict[str, Any]  # a work unit: one slide's id, uri and reading, and the coordinates of some of its tiles


@dataclass(frozen=True)
class FeatureSpec:
    """The settings that shape table features."""

    encoder: EncoderSpec
    stain_weights: str | None  # URI of a StainNet checkpoint, None for no normalisation
    bins: int  # of the colour histogram, a channel
    storage_options: StorageOptions = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Models:
    """What a worker loads once."""

    encoder: Encoder
    stainnet: StainNet | None

    @property
    def fingerprint(self) -> tuple[str, str | None]:
        """Hashes of the weights of the encoder and of StainNet."""
        return self.encoder.fingerprint, self.stainnet.fingerprint if self.stainnet else None


def load_models(spec: FeatureSpec) -> Models:
    """Load the encoder and StainNet; raises what they raise where weights are missing or do not fit."""
    stainnet = load_stainnet(spec.stain_weights, spec.storage_options) if spec.stain_weights else None
    encoder = Encoder(spec.encoder, spec.storage_options)
    return Models(encoder, stainnet.to(encoder.device) if stainnet else None)


def encode_tiles(
    spec: FeatureSpec, run_id: str, done: Callable[[int], None] = lambda _: None
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """The mapInArrow function of the features pass; give it one work unit, which is of one slide, a partition.

    Input columns: image_id, patient_id, uri (as it is opened), tile_px, level_read, downsample, x_px and y_px (arrays,
    level-0 pixels, neighbours together), params_hash. Output: `udfs.schemas.ENCODED`: a row for each coordinate in the
    order of reading, or a row with the error where the slide can't be read (what was read before it may precede it).
    `done` is told how many tiles are through.
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        models: Models | None = None
        for batch in batches:
            for unit in batch.to_pylist():
                models = models or _models_of_this_worker(spec)
                yield from _encode_unit(unit, spec, models, run_id)
                done(len(unit["x_px"]))

    return run


_loaded: dict[tuple[object, ...], Models] = {}


def _models_of_this_worker(spec: FeatureSpec) -> Models:
    """Loaded once a worker process; Spark uses a process again for later tasks."""
    context = TaskContext.get()
    torch.set_num_threads(context.cpus() if context else 1)  # a slot's share: more would fight the other slots
    key = (spec.encoder, spec.stain_weights)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_models(spec)
    return _loaded[key]


def _encode_unit(unit: Unit, spec: FeatureSpec, models: Models, run_id: str) -> Iterator[pa.RecordBatch]:
    constant = {name: unit[name] for name in ("image_id", "patient_id", "params_hash")} | {"run_id": run_id}
    try:
        check_quarantine(unit["image_id"])
        for xy, pixels in _read(unit, spec.storage_options, models.encoder.spec.batch_size):
            tiles = np.stack([models.stainnet.normalise(tile) for tile in pixels]) if models.stainnet else pixels
            average, maximum = models.encoder.embed(tiles)
            columns = {
                "x_px": xy[:, 0],
                "y_px": xy[:, 1],
                "embedding_avg": _rows(average),
                "embedding_max": _rows(maximum),
                "color_histogram": _sparse([color_histogram(tile, spec.bins) for tile in tiles]),
            }
            yield _batch(len(xy), constant, columns)
    except Exception as error:
        failed: SlideError = as_slide_error(error, unit["uri"], spec.storage_options)
        yield _batch(1, constant, {"error_code": [failed.code.value], "error_message": [failed.message]})


def _read(
    unit: Unit, storage_options: StorageOptions, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Batches of (xy int [n, 2] in level-0 pixels, pixels uint8 [n, tile_px, tile_px, 3]), all full but the last."""
    xy = np.stack([unit["x_px"], unit["y_px"]], axis=1)
    tile_px, level = unit["tile_px"], unit["level_read"]
    with open_slide(unit["uri"], storage_options) as slide:
        region_px = region_edge(tile_px * unit["downsample"], slide.levels[level].downsample)
        indices: list[int] = []
        pixels: list[NDArray[np.uint8]] = []
        for index, region in slide.read_tiles(xy, region_px, level):
            indices.append(index)
            pixels.append(resample(region, tile_px))
            if len(pixels) == batch_size:
                yield xy[indices], np.stack(pixels)
                indices, pixels = [], []
        if pixels:
            yield xy[indices], np.stack(pixels)


def _batch(rows: int, constant: dict[str, Any], columns: dict[str, Any]) -> pa.RecordBatch:
    arrays = []
    for field_ in ENCODED:
        values = columns.get(field_.name, [constant.get(field_.name)] * rows)
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field_.type))
    return pa.RecordBatch.from_arrays(arrays, schema=ENCODED)


def _rows(matrix: NDArray[np.float32]) -> pa.Array:
    """float32 [n, dim] as a list column, without a Python object a number."""
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))


def _sparse(histograms: list[NDArray[np.int64]]) -> pa.Array:
    bins = [np.flatnonzero(histogram).astype(np.int32) for histogram in histograms]
    counts = [histogram[at].astype(np.int32) for histogram, at in zip(histograms, bins, strict=True)]
    return pa.StructArray.from_arrays(
        [pa.array(bins, HISTOGRAM[0].type), pa.array(counts, HISTOGRAM[1].type)], fields=list(HISTOGRAM)
    )

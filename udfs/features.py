"""The features pass: work units of coordinates in, a row a tile with embeddings and colours out (mapInArrow).

Pixels are read, normalised, embedded and counted inside the worker and dropped there.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from udfs.failures import as_slide_error, check_quarantine
from udfs.schemas import ENCODED, HISTOGRAM
from udfs.task import slot_cpus
from udfs.wsi import Slide, SlideError, open_slide
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.foreign import ForeignSlide
from udfs.wsi.histogram import color_histogram
from udfs.wsi.spacing import region_edge, resample
from udfs.wsi.stain import StainNet, load_stainnet
from udfs.wsi.store import StorageOptions
from udfs.wsi.tiff.index import SlideIndex

VERSION = 1  # raise it when the same settings begin to give other rows: they are then redone

Unit = dict[str, Any]  # a row of `udfs.schemas.UNITS`


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
    """The mapInArrow function of the features pass; give it work units of one slide a partition.

    Input columns are those of `udfs.schemas.UNITS`, of which unit, n_tiles, n_bytes and cost are not looked at. Output:
    `udfs.schemas.ENCODED`: a row for each coordinate in the order of reading, then a row on how the unit went, with the
    error where the slide can't be read (what was read before it precedes it). `done` is told how many tiles are through.
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        models: Models | None = None
        units = (unit for batch in batches for unit in batch.to_pylist())
        with closing(_one_ahead(units, spec.storage_options)) as opened:
            for reading in opened:
                models = models or _models_of_this_worker(spec)
                yield from _encode_unit(reading, spec, models, run_id)
                done(len(reading.unit["x_px"]))

    return run


_loaded: dict[tuple[object, ...], Models] = {}


def _models_of_this_worker(spec: FeatureSpec) -> Models:
    """Loaded once a worker process; Spark uses a process again for later tasks."""
    torch.set_num_threads(slot_cpus())
    key = (spec.encoder, spec.stain_weights)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_models(spec)
    return _loaded[key]


@dataclass
class _Reading:
    """A unit whose first bytes are on their way, or the error that came of it."""

    unit: Unit
    xy_px: NDArray[np.int64]  # [n, 2], level-0 pixels
    slide: Slide | ForeignSlide | None = None
    tiles: Iterable[tuple[int, NDArray[np.uint8]]] = ()
    error: Exception | None = None

    def close(self) -> None:
        if self.slide:
            self.slide.close()


def _one_ahead(units: Iterable[Unit], storage_options: StorageOptions) -> Generator[_Reading, None, None]:
    """Each unit opened, and the next one too, so that its bytes come while this one is encoded; closes them."""
    opened: deque[_Reading] = deque()
    try:
        for unit in units:
            opened.append(_open(unit, storage_options))
            if len(opened) == 2:
                yield opened[0]
                opened.popleft().close()
        while opened:
            yield opened[0]
            opened.popleft().close()
    finally:
        for reading in opened:
            reading.close()


def _open(unit: Unit, storage_options: StorageOptions) -> _Reading:
    reading = _Reading(unit, np.stack([unit["x_px"], unit["y_px"]], axis=1))
    try:
        check_quarantine(unit["image_id"])
        index = SlideIndex.from_bytes(unit["index"]) if unit["index"] else None
        slide = reading.slide = open_slide(unit["uri"], storage_options, index=index, threads=slot_cpus())
        level = unit["level_read"]
        region_px = region_edge(unit["tile_px"] * unit["downsample"], slide.levels[level].downsample)
        reading.tiles = slide.read_tiles(reading.xy_px, region_px, level)
    except Exception as error:  # told in the row of this unit, when it is its turn
        reading.error = error
    return reading


def _encode_unit(reading: _Reading, spec: FeatureSpec, models: Models, run_id: str) -> Iterator[pa.RecordBatch]:
    unit = reading.unit
    constant = {name: unit[name] for name in ("image_id", "patient_id", "params_hash")} | {"run_id": run_id}
    end: dict[str, Any] = {"n_tiles": 0}
    try:
        for xy, pixels in _batches(reading, models.encoder.spec.batch_size):
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
            end["n_tiles"] += len(xy)
    except Exception as error:
        failed: SlideError = as_slide_error(error, unit["uri"], spec.storage_options)
        end |= {"error_code": failed.code.value, "error_message": failed.message}
    if reading.slide:
        end |= {"size_bytes": reading.slide.file.size_bytes, "traffic": asdict(reading.slide.traffic)}
    yield _batch(1, constant | end, {})


def _batches(reading: _Reading, batch_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Batches of (xy int [n, 2] in level-0 pixels, pixels uint8 [n, tile_px, tile_px, 3]), all full but the last."""
    if reading.error:
        raise reading.error
    indices: list[int] = []
    pixels: list[NDArray[np.uint8]] = []
    for index, region in reading.tiles:
        indices.append(index)
        pixels.append(resample(region, reading.unit["tile_px"]))
        if len(pixels) == batch_size:
            yield reading.xy_px[indices], np.stack(pixels)
            indices, pixels = [], []
    if pixels:
        yield reading.xy_px[indices], np.stack(pixels)


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

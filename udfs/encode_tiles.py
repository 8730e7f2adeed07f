"""The features pass: work units of coordinates in, one row per tile and encoder with vectors and colours out (mapInArrow).

Pixels are read, normalised, embedded, counted and measured inside the worker and dropped there.
"""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from udfs.failures import as_slide_error, check_quarantine
from udfs.schemas import ENCODED, FEATURES, HISTOGRAM
from udfs.spark_task import gpu_address, keep_what_is_loaded, slot_cpus, task_number
from udfs.stopwatch import Stopwatch
from udfs.wsi import ErrorCode, Slide, SlideError, open_slide
from udfs.wsi.encoder import Encoder, EncoderSpec, device_of
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.network import Network, load_network
from udfs.wsi.inference import Batch, Encoded, Inference, inference
from udfs.wsi.prefetch import prefetch
from udfs.wsi.quality.pixel_metric import PixelMetric
from udfs.wsi.reading.foreign import ForeignSlide
from udfs.wsi.reading.spacing import region_edge, resample
from udfs.wsi.stain.colour_table import StainNormaliser
from udfs.wsi.stain.stain_network import load_stainnet
from udfs.wsi.store import StorageOptions, public_uri
from udfs.wsi.tiff.index import SlideIndex
from udfs.wsi.weights.checkpoint import CheckpointError

VERSION = 3  # raise it when the same settings begin to give other rows: they are then redone

_MOST_BATCH_BYTES = 256 << 20  # of pixels: five batches are alive at most, one filled, two waiting, two encoded
_BATCHES_AHEAD = 3  # read or being read, beside those that are encoded

Unit = dict[str, Any]  # a row of `udfs.schemas.UNITS`


@dataclass(frozen=True)
class FeatureSpec:
    """The settings that shape table features."""

    encoders: Mapping[str, EncoderSpec]  # by name
    stain_weights: str | None  # URI of a StainNet checkpoint, None for no normalisation
    bins: int  # of the colour histogram, per channel
    gpu_share: float = 1.0  # of a GPU's memory, at most, if tasks share one
    storage_options: StorageOptions = field(default_factory=dict, repr=False)
    models: Mapping[str, tuple[str, ...]] | None = (
        None  # identities of the driver's `Models`, which workers' have to equal
    )


AnyEncoder = TypeVar("AnyEncoder", Network, Encoder)


@dataclass(frozen=True)
class Models(Generic[AnyEncoder]):
    """The encoders by name, and StainNet: an `Encoder` is on a device, a `Network` not yet."""

    encoders: Mapping[str, AnyEncoder]
    stain: StainNormaliser | None

    @property
    def identities(self) -> dict[str, tuple[str, ...]]:
        """What of the models shapes the rows of each encoder, each as ``name=value``."""
        return {name: _identity(encoder, self.stain) for name, encoder in self.encoders.items()}


def load_models(spec: FeatureSpec) -> Models[Network]:
    """Returns the encoders and StainNet, on no device.

    Raises:
        CheckpointError: weights are missing or do not fit.
        ValueError: see `load_network`, or table features has no column for an output.
    """
    return Models({name: _load_encoder(name, spec) for name in spec.encoders}, _load_stain(spec))


def _load_encoder(name: str, spec: FeatureSpec) -> Network:
    try:
        encoder = load_network(spec.encoders[name], spec.storage_options)
    except (CheckpointError, ValueError) as error:
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        raise kind(f"encoders.{name}: {error}") from None
    outputs = [output for output, _ in encoder.outputs]
    if outputs[:1] != ["embedding"] or any(output not in FEATURES.names for output in outputs):
        raise ValueError(f"encoders.{name} yields {outputs}: table features takes embedding, and then embedding_max")
    return encoder


def _load_stain(spec: FeatureSpec) -> StainNormaliser | None:
    return StainNormaliser(load_stainnet(spec.stain_weights, spec.storage_options)) if spec.stain_weights else None


def _identity(encoder: Network | Encoder, stain: StainNormaliser | None) -> tuple[str, ...]:
    fingerprint = stain.net.fingerprint[:16] if stain else "null"
    return (*(f"encoder.{part}" for part in encoder.identity), f"stain.weights={fingerprint}")


def encode_tiles(
    spec: FeatureSpec,
    run_id: str,
    done: Callable[[int], None] = lambda _: None,
    *,
    encoders: Collection[str] | None = None,
    tiles_ahead: int = 0,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Returns the mapInArrow function of the features pass; each partition must hold work units of one slide.

    Input columns are those of `udfs.schemas.UNITS`; unit, n_tiles, n_bytes and cost are not used. Output:
    `udfs.schemas.ENCODED`: one row per coordinate and encoder of the unit in the order of reading, then one row with the error
    per encoder that gives numbers that are not finite, and one row on how the unit went, with the error if the slide cannot be
    read (rows of tiles that were read before the error precede it).

    Args:
        spec: the settings.
        run_id: of the run, for every row.
        done: called with numbers of finished tiles.
        encoders: those that any of the units names: others are not loaded; None: all.
        tiles_ahead: how many tiles this host has to expect: many pay for a table of StainNet's colours.
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        readings = _one_ahead((unit for batch in batches for unit in batch.to_pylist()), spec.storage_options)
        with closing(readings):
            first = next(readings, None)  # its bytes are on their way while the models load
            if first is None:
                return
            models = models_of_this_worker(spec, encoders)
            if models.stain:
                models.stain.tiles_ahead = tiles_ahead
            encode = inference(models.encoders, models.stain, spec.bins, PixelMetric.defined())
            encode.batch_size  # noqa: B018  measured here, where a failure is no slide's
            steps = _steps(chain([first], readings), encode, spec.storage_options)
            not_finite = Counter[str]()  # tiles of the unit at hand, by encoder
            pulled, spent = Stopwatch(), Stopwatch()  # the latter runs on while the next batch is made or waited for
            is_on_gpu = any(encoder.device.type == "cuda" for encoder in models.encoders.values())
            if slot_cpus() > 1 or is_on_gpu:  # else reading would take turns with the rest
                steps = prefetch(steps, _BATCHES_AHEAD)
            with closing(steps):
                for step, encoded in spent.during(encode((step, step.batch) for step in pulled.during(steps))):
                    constant = {name: step.unit[name] for name in ("image_id", "patient_id")} | {"run_id": run_id}
                    if encoded and step.xy_px is not None:
                        shared = _shared_columns(step.xy_px, encoded)
                        for row in step.unit["encoders"]:
                            outputs = models.encoders[row["encoder"]].outputs
                            vectors = zip(outputs, encoded.embeddings[row["encoder"]], strict=True)
                            columns = shared | {name: _lists(matrix) for (name, _), matrix in vectors}
                            yield _batch(len(step.xy_px), constant | row, columns)
                            not_finite[row["encoder"]] += encoded.n_not_finite(row["encoder"])
                        continue
                    if work := step.end.get("work"):
                        work["encoded_s"] = spent.take() - pulled.take()
                    for name, number in (+not_finite).items():
                        fault = _error_columns(_not_finite(name, number, step, spec.encoders[name].precision))
                        yield _batch(1, constant | {"encoder": name, "n_tiles": 0} | fault, {})
                    not_finite.clear()
                    yield _batch(1, constant | step.end, {})
                    done(len(step.unit["x_px"]))
        if is_on_gpu:  # an idle worker keeps nothing from those that work
            torch.cuda.empty_cache()

    return run


_encoders: dict[tuple[EncoderSpec, str], Encoder] = {}  # of this worker process, by device
_stain: dict[str | None, StainNormaliser | None] = {}  # of this worker process: one entry, by URI


def models_of_this_worker(spec: FeatureSpec, names: Collection[str] | None = None) -> Models[Encoder]:
    """Returns models, loaded once per worker process and device: later tasks of a process may get another GPU.

    Args:
        spec: the settings.
        names: of the encoders; None: all of the settings.

    Raises:
        CheckpointError: the models are not the driver's; for others see `load_models`.
        ValueError: see `load_models` and `Encoder`.
    """
    torch.set_num_threads(slot_cpus())
    wanted = {name: one for name, one in spec.encoders.items() if names is None or name in names}
    keys = {name: (one, str(device_of_this_task(one))) for name, one in wanted.items()}
    if spec.gpu_share < 1:  # PyTorch keeps memory that it once had: each task has its part
        for device in {device for _, device in keys.values() if device.startswith("cuda")}:
            torch.cuda.set_per_process_memory_fraction(spec.gpu_share, device)
    if spec.stain_weights not in _stain or _replaced(keys, spec):
        _encoders.clear()
        _stain.clear()
        _stain[spec.stain_weights] = _load_stain(spec)
    for key in [key for key in _encoders if key[0] not in spec.encoders.values()]:
        del _encoders[key]  # of an earlier run
    stain = _stain[spec.stain_weights]
    for name, key in keys.items():
        if key not in _encoders:
            network = _load_encoder(name, spec)
            if spec.models is not None:
                _check_same(_identity(network, stain), spec.models[name])
            _encoders[key] = Encoder(wanted[name], network, device=torch.device(key[1]), threads=slot_cpus())
            keep_what_is_loaded()
    return Models({name: _encoders[key] for name, key in keys.items()}, stain)


def _replaced(keys: Mapping[str, tuple[EncoderSpec, str]], spec: FeatureSpec) -> bool:
    """Whether a loaded model is of a file that was replaced since an earlier run."""
    stain, loaded = _stain[spec.stain_weights], {name: key for name, key in keys.items() if key in _encoders}
    models = spec.models
    return models is not None and any(_identity(_encoders[key], stain) != models[name] for name, key in loaded.items())


def _check_same(here: tuple[str, ...], driver: tuple[str, ...]) -> None:
    """Raises CheckpointError if the models of this worker are not those of the driver, under whose identity rows are stored."""
    differences = [f"{own}, and the driver has {other}" for own, other in zip_longest(here, driver) if own != other]
    if differences:
        raise CheckpointError(
            f"the models of host {socket.gethostname()} are not the driver's: {'; '.join(differences)}: put the same files of "
            "weights on all nodes, replace none while a run goes on, and name a model of the hub with the commit, "
            "hf-hub:OWNER/NAME@COMMIT; then run again"
        )


def device_of_this_task(spec: EncoderSpec) -> torch.device:
    """Returns the GPU that Spark gave this task; if Spark gives none, tasks take turns with those of the machine."""
    device, address = device_of(spec), gpu_address()
    if device.type != "cuda":
        return device
    if address is None:
        return torch.device("cuda", task_number() % torch.cuda.device_count())
    # a GPU's address is its number in the machine; PyTorch counts those that this process is allowed to see
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else []
    number = numbers.index(address) if address in numbers else int(address) if address.isdigit() else 0
    return torch.device("cuda", number)


class _Reading:
    """A unit whose first bytes are on their way, or the error that opening it raised."""

    slide: Slide | ForeignSlide | None = None
    error: Exception | None = None

    def __init__(self, unit: Unit, storage_options: StorageOptions) -> None:
        self.unit, self.xy_px = unit, np.stack([unit["x_px"], unit["y_px"]], axis=1)  # int64 [n, 2], level-0 pixels
        try:
            check_quarantine(unit["image_id"])
            index = SlideIndex.from_bytes(unit["index"]) if unit["index"] else None
            self.slide = open_slide(unit["uri"], storage_options, index=index, threads=slot_cpus())
            level = unit["level_read"]
            region_px = region_edge(unit["tile_px"] * unit["downsample"], self.slide.levels[level].downsample)
            self.tiles = self.slide.read_tiles(self.xy_px, region_px, level)
        except Exception as error:  # becomes the row of this unit, when it is its turn
            self.error = error

    def close(self) -> None:
        if self.slide:
            self.slide.close()


def _one_ahead(units: Iterator[Unit], storage_options: StorageOptions) -> Generator[_Reading, None, None]:
    """Yields each unit opened, and opens the next one too, so that its bytes come while this one is encoded."""
    opened: deque[_Reading] = deque()
    try:
        while True:
            opened.extend(_Reading(unit, storage_options) for unit in islice(units, 2 - len(opened)))
            if not opened:
                return
            yield opened[0]
            opened.popleft().close()
    finally:
        for reading in opened:
            reading.close()


class _Step(NamedTuple):
    """A batch of a unit's tiles; or, after the last batch, how the unit went."""

    unit: Unit
    end: dict[str, Any]  # columns of the row on how the unit went, filled as it goes
    xy_px: NDArray[np.int64] | None = None  # [n, 2], level-0 pixels
    batch: Batch | None = None


def _steps(
    readings: Iterable[_Reading], encode: Inference, storage_options: StorageOptions
) -> Generator[_Step, None, None]:
    for reading in readings:
        end: dict[str, Any] = {"n_tiles": 0}
        watch, waited_s = Stopwatch(), reading.slide.traffic.waited_s if reading.slide else 0.0
        try:
            names = [row["encoder"] for row in reading.unit["encoders"]]
            for xy_px, tiles in watch.during(_batches(reading, encode)):
                yield _Step(reading.unit, end, xy_px, Batch(tiles, names))
                end["n_tiles"] += len(tiles)
        except Exception as error:
            end |= _error_columns(as_slide_error(error, reading.unit["uri"], storage_options))
        if reading.slide:
            traffic = reading.slide.traffic
            work = asdict(traffic) | {"decoded_s": watch.take() - (traffic.waited_s - waited_s)}
            end |= {"size_bytes": reading.slide.file.size_bytes, "work": work}
        yield _Step(reading.unit, end)


def _error_columns(error: SlideError) -> dict[str, str]:
    return {"error_code": error.code.value, "error_message": error.message}


def _not_finite(name: str, n_tiles: int, end: _Step, precision: Precision) -> SlideError:
    wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(precision)
    remedy = f"set inference.precision to {wider}" if wider else f"give other weights in encoders.{name}.weights"
    return SlideError(
        ErrorCode.EMBEDDING_NOT_FINITE,
        f"{public_uri(end.unit['uri'])}: vectors of encoder {name} for {n_tiles:,} of {end.end['n_tiles']:,} tiles are NaN or "
        f"infinite in {precision}: {remedy}, then run with --retry-failed",
    )


def _batches(reading: _Reading, encode: Inference) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Batches of (xy int [n, 2] in level-0 pixels, pixels uint8 [n, tile_px, tile_px, 3]), all full but the last."""
    if reading.error:
        raise reading.error
    edge, left = reading.unit["tile_px"], len(reading.xy_px)
    indices: list[int] = []
    for index, region in reading.tiles:
        if not indices:
            fit = max(1, _MOST_BATCH_BYTES // (3 * edge * edge))
            tiles = np.empty((min(encode.batch_size, left, fit), edge, edge, 3), np.uint8)
        tiles[len(indices)] = resample(region, edge)
        indices.append(index)
        if len(indices) == len(tiles):
            yield reading.xy_px[indices], tiles
            left -= len(indices)
            indices = []


def _batch(rows: int, constant: dict[str, Any], columns: dict[str, Any]) -> pa.RecordBatch:
    constants = {name: [constant.get(name)] * rows for name in ENCODED.names}
    return pa.RecordBatch.from_pydict(constants | columns, ENCODED)


def _shared_columns(xy_px: NDArray[np.int64], encoded: Encoded) -> dict[str, Any]:
    """The columns that are equal for all encoders."""
    corners = {"x_px": xy_px[:, 0], "y_px": xy_px[:, 1]}
    return {**corners, "color_histogram": _sparse(encoded.histograms), **encoded.metrics}


def _lists(matrix: NDArray[np.float32]) -> pa.Array:
    """float32 [n, dim] as a list column, without one Python object per number."""
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))


def _sparse(histograms: NDArray[np.int32]) -> pa.Array:
    """Counts [n, bins ** 3] as the bins that are not empty."""
    tiles, bins = np.nonzero(histograms)
    offsets = pa.array(np.searchsorted(tiles, np.arange(len(histograms) + 1)).astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.int32)))
        for values in (bins, histograms[tiles, bins])
    ]
    return pa.StructArray.from_arrays(lists, fields=list(HISTOGRAM))

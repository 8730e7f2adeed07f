"""From the pixels of tiles to what is kept of them: normalised, counted, measured and embedded, on a processor or a GPU.

Several encoders share what comes before them: tiles are normalised, counted and measured once.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder import Encoder
from udfs.wsi.encoder.batch_size import is_out_of_memory
from udfs.wsi.encoder.encoder import Embeddings
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.encoder.resize import resize_tensor
from udfs.wsi.quality.histogram import color_histograms, color_histograms_on
from udfs.wsi.quality.pixel_metric import PixelMetric
from udfs.wsi.stain.colour_table import StainNormaliser, lookup

Tiles = NDArray[np.uint8]  # [n, h, w, 3], RGB
Key = TypeVar("Key")

_LEAST_TILES_PER_CALL = 4  # share the cost of a call, and fit the processor's cache
_LEAST_TILES_PER_BATCH = 16  # share the cost of handing a batch over, a tenth of a millisecond at either end


class Batch(NamedTuple):
    """Tiles, and the encoders that embed them, by name; None: all."""

    tiles: Tiles
    encoders: Collection[str] | None = None


@dataclass(frozen=True)
class Encoded:
    """Embeddings and colours of n tiles."""

    embeddings: Mapping[str, Embeddings]  # by encoder: float32 [n, dim] for each of its outputs
    histograms: NDArray[np.int32]  # [n, bins ** 3], pixels counted
    metrics: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # [n] for each metric of pixels, by column

    def n_not_finite(self, encoder: str) -> int:
        """Returns the number of tiles whose vectors of an encoder hold NaN or infinity."""
        finite = np.logical_and.reduce([np.isfinite(each).all(axis=1) for each in self.embeddings[encoder]])
        return int((~finite).sum())

    @classmethod
    def joined(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """Join parts, one or more, in their order."""

        def join(name: str) -> Embeddings:
            return tuple(map(np.concatenate, zip(*(part.embeddings[name] for part in parts), strict=True)))

        histograms = np.concatenate([part.histograms for part in parts])
        metrics = {column: np.concatenate([part.metrics[column] for part in parts]) for column in parts[0].metrics}
        return cls({name: join(name) for name in parts[0].embeddings}, histograms, metrics)


Pending = Callable[[], Encoded]  # waits for results that are on their way from a device
Encoders = Mapping[str, Encoder]


class HostInference:
    """On a processor."""

    def __init__(
        self, encoders: Encoders, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
    ) -> None:
        """`stain`: None for no normalisation; `bins`: of the colour histogram, per channel; `metrics`: to measure."""
        self._encoders, self._stain, self._bins, self._metrics = encoders, stain, bins, metrics

    @property
    def batch_size(self) -> int:
        """Number of tiles to give at once: whole batches of the encoders."""
        return self._whole_batches(_LEAST_TILES_PER_BATCH)

    def __call__(self, batches: Iterable[tuple[Key, Batch | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Yields what is kept of each batch; None of None."""
        for key, batch in batches:
            yield key, None if batch is None else Encoded.joined(list(self._parts(*batch)))

    def _parts(self, tiles: Tiles, names: Collection[str] | None) -> Iterator[Encoded]:
        size = self._whole_batches(_LEAST_TILES_PER_CALL)
        for start in range(0, len(tiles), size):
            some = tiles[start : start + size]
            normalised = self._stain.normalise(some) if self._stain else some
            metrics = {metric.column: metric.measure(normalised) for metric in self._metrics}
            embeddings = {name: each.embed(normalised) for name, each in _chosen(self._encoders, names)}
            yield Encoded(embeddings, color_histograms(normalised, self._bins), metrics)

    def _whole_batches(self, tiles: int) -> int:
        sizes = [encoder.batch_size for encoder in self._encoders.values()]
        return max(size * math.ceil(tiles / size) for size in sizes)


class DeviceInference:
    """On a GPU: bytes of pixels go over the bus, vectors and counts come back, and all between stays on the GPU.

    Metrics are measured on the processor: if there are any, the normalised pixels come back too. While the GPU works on a
    batch, the next one is read. The same code runs on a processor, for tests without a GPU.
    """

    def __init__(
        self, encoders: Encoders, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
    ) -> None:
        """As `HostInference`; the encoders run by PyTorch, on one device."""
        self._encoders, self._bins, self._metrics = encoders, bins, metrics
        self._forward = {name: _forward(encoder) for name, encoder in encoders.items()}
        self._device = next(iter(encoders.values())).device
        self._table = stain.table_on(self._device) if stain else None
        self._most: int | None = None  # tiles of a batch, once memory ran out beside the encoders

    @property
    def batch_size(self) -> int:
        """Number of tiles to give at once."""
        largest = max(encoder.batch_size for encoder in self._encoders.values())
        return min(largest, self._most or largest)

    def __call__(self, batches: Iterable[tuple[Key, Batch | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Yields what is kept of each batch, while the next one is under way; None of None."""
        before: list[tuple[Key, list[Pending]]] = []
        for key, batch in batches:
            submitted = [] if batch is None else self._submit(*batch)
            yield from map(_collected, before)
            before = [(key, submitted)]
        yield from map(_collected, before)

    def _submit(self, tiles: Tiles, names: Collection[str] | None) -> list[Pending]:
        """Start a batch, in halves if memory runs out."""
        try:
            return [self._start(tiles, names)]
        except (RuntimeError, MemoryError) as error:
            if len(tiles) == 1 or not is_out_of_memory(error):
                raise
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = self._most = len(tiles) // 2
        return [*self._submit(tiles[:half], names), *self._submit(tiles[half:], names)]

    @torch.inference_mode()
    def _start(self, tiles: Tiles, names: Collection[str] | None) -> Pending:
        on_gpu = self._device.type == "cuda"
        host = torch.from_numpy(np.ascontiguousarray(tiles))
        pixels = (host.pin_memory() if on_gpu else host).to(self._device, non_blocking=True)
        if self._table is not None:
            pixels = lookup(self._table, pixels)
        histograms = color_histograms_on(pixels, self._bins)
        vectors = {name: self._vectors(name, each, pixels) for name, each in _chosen(self._encoders, names)}
        measured = pixels if self._metrics else pixels[:0]
        results = (measured, histograms, *(one for of_encoder in vectors.values() for one in of_encoder))
        n_vectors = {name: len(of_encoder) for name, of_encoder in vectors.items()}
        if not on_gpu:
            return lambda: self._kept(n_vectors, *(each.numpy() for each in results))
        # pinned memory: a copy to any other would wait for the GPU
        landing = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in results]
        on_host = tuple(to.copy_(one, non_blocking=True) for to, one in zip(landing, results, strict=True))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))

        def collect() -> Encoded:
            arrived.synchronize()
            return self._kept(n_vectors, *(each.numpy() for each in on_host))

        return collect

    def _vectors(self, name: str, encoder: Encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The vectors of an encoder, in batches that fit in memory beside those of the others."""

        def run(part: torch.Tensor, _: int) -> tuple[torch.Tensor, ...]:
            return self._forward[name](resize_tensor(part, encoder.input_px, encoder.interpolation))

        done = encoder.in_batches(pixels, run)
        return done[0] if len(done) == 1 else tuple(map(torch.cat, zip(*done, strict=True)))

    def _kept(
        self, n_vectors: Mapping[str, int], pixels: Tiles, histograms: NDArray[np.int32], *vectors: NDArray[np.float32]
    ) -> Encoded:
        metrics = {metric.column: metric.measure(pixels) for metric in self._metrics}
        rest = iter(vectors)
        embeddings = {name: tuple(islice(rest, number)) for name, number in n_vectors.items()}
        return Encoded(embeddings, histograms, metrics)


def _chosen(encoders: Encoders, names: Collection[str] | None) -> list[tuple[str, Encoder]]:
    return [(name, encoder) for name, encoder in encoders.items() if names is None or name in names]


def _forward(encoder: Encoder) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    if not isinstance(encoder.runtime, TorchRuntime):
        raise TypeError("a device needs the runtime torch")
    return encoder.runtime.forward


def _collected(batch: tuple[Key, list[Pending]]) -> tuple[Key, Encoded | None]:
    key, pending = batch
    return key, Encoded.joined([collect() for collect in pending]) if pending else None


Inference = HostInference | DeviceInference


def inference(
    encoders: Encoders, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
) -> Inference:
    """Returns the inference for the encoders' device."""
    on = DeviceInference if next(iter(encoders.values())).device.type == "cuda" else HostInference
    return on(encoders, stain, bins, metrics)

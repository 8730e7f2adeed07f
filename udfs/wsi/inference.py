"""From the pixels of tiles to what is kept of them: normalised, counted, measured and embedded, on a processor or a GPU."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder import Encoder
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


@dataclass(frozen=True)
class Encoded:
    """Embeddings and colours of n tiles."""

    embeddings: Embeddings  # float32 [n, dim] for each output of the encoder
    histograms: NDArray[np.int32]  # [n, bins ** 3], pixels counted
    metrics: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # [n] for each metric of pixels, by column

    @property
    def n_not_finite(self) -> int:
        """Number of tiles whose vectors hold NaN or infinity."""
        finite = np.logical_and.reduce([np.isfinite(each).all(axis=1) for each in self.embeddings])
        return int((~finite).sum())

    @classmethod
    def joined(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """Join parts, one or more, in their order."""
        embeddings = (np.concatenate(of_output) for of_output in zip(*(part.embeddings for part in parts), strict=True))
        histograms = np.concatenate([part.histograms for part in parts])
        metrics = {column: np.concatenate([part.metrics[column] for part in parts]) for column in parts[0].metrics}
        return cls(tuple(embeddings), histograms, metrics)


Pending = Callable[[], Encoded]  # waits for results that are on their way from a device


class HostInference:
    """On a processor."""

    def __init__(
        self, encoder: Encoder, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
    ) -> None:
        """`stain`: None for no normalisation; `bins`: of the colour histogram, per channel; `metrics`: to measure."""
        self._encoder, self._stain, self._bins, self._metrics = encoder, stain, bins, metrics

    @property
    def batch_size(self) -> int:
        """Number of tiles to give at once: whole batches of the encoder."""
        return self._whole_batches(_LEAST_TILES_PER_BATCH)

    def __call__(self, batches: Iterable[tuple[Key, Tiles | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Yields what is kept of each batch; None of None."""
        for key, tiles in batches:
            yield key, None if tiles is None else Encoded.joined(list(self._parts(tiles)))

    def _parts(self, tiles: Tiles) -> Iterator[Encoded]:
        size = self._whole_batches(_LEAST_TILES_PER_CALL)
        for start in range(0, len(tiles), size):
            some = tiles[start : start + size]
            normalised = self._stain.normalise(some) if self._stain else some
            metrics = {metric.column: metric.measure(normalised) for metric in self._metrics}
            yield Encoded(self._encoder.embed(normalised), color_histograms(normalised, self._bins), metrics)

    def _whole_batches(self, tiles: int) -> int:
        size = self._encoder.batch_size
        return size * math.ceil(tiles / size)


class DeviceInference:
    """On a GPU: bytes of pixels go over the bus, vectors and counts come back, and all between stays on the GPU.

    Metrics are measured on the processor: if there are any, the normalised pixels come back too. While the GPU works on a
    batch, the next one is read. The same code runs on a processor, for tests without a GPU.
    """

    def __init__(
        self, encoder: Encoder, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
    ) -> None:
        """As `HostInference`; the encoder runs by PyTorch."""
        if not isinstance(encoder.runtime, TorchRuntime):
            raise TypeError("a device needs the runtime torch")
        self._encoder, self._runtime, self._bins, self._metrics = encoder, encoder.runtime, bins, metrics
        self._device = encoder.device
        self._table = stain.table_on(self._device) if stain else None

    @property
    def batch_size(self) -> int:
        """Number of tiles to give at once."""
        return self._encoder.batch_size

    def __call__(self, batches: Iterable[tuple[Key, Tiles | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Yields what is kept of each batch, while the next one is under way; None of None."""
        before: list[tuple[Key, list[Pending]]] = []
        for key, tiles in batches:
            submitted = [] if tiles is None else self._submit(tiles)
            yield from map(_collected, before)
            before = [(key, submitted)]
        yield from map(_collected, before)

    def _submit(self, tiles: Tiles) -> list[Pending]:
        """Start a batch, in halves if memory runs out."""
        submitted = self._encoder.or_smaller(len(tiles), lambda: self._start(tiles))
        if submitted:
            return [submitted]
        half = len(tiles) // 2
        return [*self._submit(tiles[:half]), *self._submit(tiles[half:])]

    @torch.inference_mode()
    def _start(self, tiles: Tiles) -> Pending:
        on_gpu = self._device.type == "cuda"
        host = torch.from_numpy(np.ascontiguousarray(tiles))
        pixels = (host.pin_memory() if on_gpu else host).to(self._device, non_blocking=True)
        if self._table is not None:
            pixels = lookup(self._table, pixels)
        histograms = color_histograms_on(pixels, self._bins)
        images = resize_tensor(pixels, self._encoder.input_px, self._encoder.interpolation)
        measured = pixels if self._metrics else pixels[:0]
        results = (measured, histograms, *self._runtime.forward(images))
        if not on_gpu:
            return lambda: self._kept(*(each.numpy() for each in results))
        # pinned memory: a copy to any other would wait for the GPU
        landing = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in results]
        on_host = tuple(to.copy_(one, non_blocking=True) for to, one in zip(landing, results, strict=True))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))

        def collect() -> Encoded:
            arrived.synchronize()
            return self._kept(*(each.numpy() for each in on_host))

        return collect

    def _kept(self, pixels: Tiles, histograms: NDArray[np.int32], *embeddings: NDArray[np.float32]) -> Encoded:
        metrics = {metric.column: metric.measure(pixels) for metric in self._metrics}
        return Encoded(embeddings, histograms, metrics)


def _collected(batch: tuple[Key, list[Pending]]) -> tuple[Key, Encoded | None]:
    key, pending = batch
    return key, Encoded.joined([collect() for collect in pending]) if pending else None


Inference = HostInference | DeviceInference


def inference(
    encoder: Encoder, stain: StainNormaliser | None, bins: int, metrics: Sequence[PixelMetric] = ()
) -> Inference:
    """Returns the inference for the encoder's device."""
    on = DeviceInference if encoder.device.type == "cuda" else HostInference
    return on(encoder, stain, bins, metrics)

"""Pixels of tiles to what is kept of them: normalised, counted and embedded. On a processor, or all of it on a GPU."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder import Encoder
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.encoder.resize import resize_tensor
from udfs.wsi.quality.histogram import color_histograms, color_histograms_on
from udfs.wsi.stain.colour_table import StainNormaliser, lookup

Tiles = NDArray[np.uint8]  # [n, h, w, 3], RGB
Key = TypeVar("Key")

# What each call costs is shared by so many tiles at least, and no more than fit a processor's cache; and by so many what it costs
# to hand them over, which is a tenth of a millisecond here, and as much where rows are received.
_LEAST_TILES_A_CALL, _LEAST_TILES_A_BATCH = 4, 16


@dataclass(frozen=True)
class Encoded:
    """Of n tiles."""

    average: NDArray[np.float32]  # [n, dim]
    maximum: NDArray[np.float32]  # [n, dim]
    histograms: NDArray[np.int32]  # [n, bins ** 3], pixels counted

    @property
    def n_not_finite(self) -> int:
        """Tiles whose vectors hold NaN or infinity."""
        finite = [np.isfinite(each) for each in (self.average, self.maximum)]
        return 0 if all(each.all() for each in finite) else int((~(finite[0] & finite[1]).all(axis=1)).sum())


class HostInference:
    """On a processor."""

    def __init__(self, encoder: Encoder, stain: StainNormaliser | None, bins: int) -> None:
        """`stain`: None for no normalisation; `bins`: of the colour histogram, a channel."""
        self._encoder, self._stain, self._bins = encoder, stain, bins

    @property
    def batch_size(self) -> int:
        """How many tiles to give at once: whole batches of the encoder's."""
        return self._whole_batches(_LEAST_TILES_A_BATCH)

    def __call__(self, batches: Iterable[tuple[Key, Tiles | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Batch after batch; None for None."""
        for key, tiles in batches:
            yield key, None if tiles is None else self._encoded(tiles)

    def _encoded(self, tiles: Tiles) -> Encoded:
        size, parts = self._whole_batches(_LEAST_TILES_A_CALL), []
        for start in range(0, len(tiles), size):
            some = tiles[start : start + size]
            normalised = self._stain.normalise(some) if self._stain else some
            parts.append((*self._encoder.embed(normalised), color_histograms(normalised, self._bins)))
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))

    def _whole_batches(self, tiles: int) -> int:
        """`tiles` or a few more."""
        size = self._encoder.batch_size
        return size * math.ceil(tiles / size)


@dataclass(frozen=True)
class _Pending:
    """Results on their way from a device."""

    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    arrived: torch.cuda.Event | None

    def collect(self) -> list[NDArray[np.generic]]:
        if self.arrived:
            self.arrived.synchronize()
        return [part.numpy() for part in self.parts]


class DeviceInference:
    """On a GPU: bytes of pixels go over the bus, vectors and counts come back, and all between stays there.

    While it works on a batch, the next one is read; its results are waited for after that. The same code runs on a
    processor, which is how it is tested where there is no GPU.
    """

    def __init__(self, encoder: Encoder, stain: StainNormaliser | None, bins: int) -> None:
        """As `HostInference`; the encoder runs by PyTorch."""
        if not isinstance(encoder.runtime, TorchRuntime):
            raise TypeError("a device needs the runtime torch")
        self._encoder, self._runtime, self._bins = encoder, encoder.runtime, bins
        self._device = encoder.device
        self._table = stain.table_on(self._device) if stain else None

    @property
    def batch_size(self) -> int:
        """How many tiles to give at once."""
        return self._encoder.batch_size

    def __call__(self, batches: Iterable[tuple[Key, Tiles | None]]) -> Iterator[tuple[Key, Encoded | None]]:
        """Batch after batch, one of them under way; None for None."""
        before: _Batch[Key] | None = None
        for key, tiles in batches:
            batch = _Batch(key, [] if tiles is None else self._submit(tiles))
            if before:
                yield before.collect()
            before = batch
        if before:
            yield before.collect()

    def _submit(self, tiles: Tiles) -> list[_Pending]:
        """In halves where memory runs out."""
        submitted = self._encoder.or_smaller(len(tiles), lambda: self._start(tiles))
        if submitted:
            return [submitted]
        half = len(tiles) // 2
        return [*self._submit(tiles[:half]), *self._submit(tiles[half:])]

    @torch.inference_mode()
    def _start(self, tiles: Tiles) -> _Pending:
        on_gpu = self._device.type == "cuda"
        host = torch.from_numpy(np.ascontiguousarray(tiles))
        pixels = (host.pin_memory() if on_gpu else host).to(self._device, non_blocking=True)
        if self._table is not None:
            pixels = lookup(self._table, pixels)
        histograms = color_histograms_on(pixels, self._bins)
        images = resize_tensor(pixels, self._encoder.spec.input_px, self._encoder.interpolation)
        results = (*self._runtime.forward(images), histograms)
        if not on_gpu:
            return _Pending(results, None)
        # pinned memory: a copy to any other would wait for the GPU
        landing = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in results]
        average, maximum, counts = (to.copy_(one, non_blocking=True) for to, one in zip(landing, results, strict=True))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._device))
        return _Pending((average, maximum, counts), arrived)


@dataclass(frozen=True)
class _Batch(Generic[Key]):
    key: Key
    pending: list[_Pending]

    def collect(self) -> tuple[Key, Encoded | None]:
        if not self.pending:
            return self.key, None
        parts = zip(*(pending.collect() for pending in self.pending), strict=True)
        return self.key, Encoded(*(np.concatenate(part) for part in parts))


Inference = HostInference | DeviceInference


def inference(encoder: Encoder, stain: StainNormaliser | None, bins: int) -> Inference:
    """The one for the encoder's device."""
    on = DeviceInference if encoder.device.type == "cuda" else HostInference
    return on(encoder, stain, bins)

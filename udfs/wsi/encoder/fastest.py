"""Which runtime and precision are fastest here and still right: measured on real tiles."""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision, Runtime
from udfs.wsi.inference import inference
from udfs.wsi.store import StorageOptions

LEAST_COSINE = 0.999
_CANDIDATES: dict[str, tuple[tuple[Runtime, Precision], ...]] = {
    "cpu": (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16")),
    "cuda": (("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16")),
}
_ROUNDS = 2
_BATCHES = 2  # at least, of a round: on a GPU the next one is on its way while one is encoded
_BINS = 16


@dataclass(frozen=True)
class Measured:
    """One way to run an encoder."""

    runtime: Runtime
    precision: Precision
    tiles_per_s: float  # of one task, from pixels to what is kept of them
    cosine: float  # to PyTorch's fp32: the mean over the tiles, of the worse of the two aggregates; NaN if one is not finite


def measure(
    spec: EncoderSpec,
    tiles: NDArray[np.uint8],
    storage_options: StorageOptions | None = None,
    *,
    precision: Precision | None = None,
    device: torch.device | None = None,
    threads: int = 1,
) -> Iterator[Measured]:
    """Measure each way that is there, in a few seconds.

    Args:
        spec: the encoder; its runtime and precision are not looked at.
        tiles: uint8 [n, h, w, 3], real ones.
        storage_options: for the weights.
        precision: of these alone; None for all.
        device: where, None as the spec says.
        threads: see `Encoder`.
    """
    reference = Encoder(replace(spec, runtime="torch", precision="fp32"), storage_options, device=device)
    expected = reference.embed(tiles)
    for runtime, each in _CANDIDATES[reference.device.type]:
        if precision not in (None, each):
            continue
        try:
            way = replace(spec, runtime=runtime, precision=each)
            encoder = Encoder(way, storage_options, device=device, threads=threads)
        except ValueError:  # not installed, not a precision of this processor, not a model that it takes
            continue
        found = encoder.embed(tiles)
        cosine = float(np.min([_cosines(a, b).mean() for a, b in zip(found, expected, strict=True)]))
        yield Measured(runtime, each, max(_tiles_per_s(encoder, tiles) for _ in range(_ROUNDS)), cosine)


def fastest(measured: list[Measured]) -> Measured | None:
    """The fastest of those that keep the cosine; None where none does."""
    right = [one for one in measured if one.cosine >= LEAST_COSINE]
    return max(right, key=lambda one: one.tiles_per_s, default=None)


def _tiles_per_s(encoder: Encoder, tiles: NDArray[np.uint8]) -> float:
    """By the way that the features pass goes on this device."""
    run = inference(encoder, None, _BINS)
    size = run.batch_size
    batch = np.resize(tiles, (size, *tiles.shape[1:]))  # the same ones again where there are fewer
    batches = max(_BATCHES, math.ceil(len(tiles) / size))
    start = time.perf_counter()
    deque(run((i, batch) for i in range(batches)), 0)
    return batches * size / (time.perf_counter() - start)


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = np.divide((x * y).sum(axis=1), norms, out=np.ones(len(x)), where=norms != 0)
    return cosines

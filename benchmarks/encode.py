"""encode: tiles to embeddings on one core by each runtime and precision, beside the runtime alone at its best batch.

Ours is `Encoder.embed`, from uint8 tiles of 448 px to two vectors; the runtime alone has its images ready. The cosine is that
to PyTorch's fp32 over real tiles, of the worse of the two aggregates; random weights have none to speak of. `gflops` is what
the network calculates in a second: tiles by `benchmarks.sizing.gflop_per_tile`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import inputs
from benchmarks.agreement import cosines
from benchmarks.measure import Line, median_seconds, seconds
from benchmarks.sizing import gflop_per_tile
from benchmarks.ways import WAYS
from tests.slides.weights import LITE0
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.encoder import Embeddings
from udfs.wsi.encoder.encoder_spec import Precision, Runtime
from udfs.wsi.encoder.resize import resize

_SIZES = (1, 2, 4, 8, 16, 32)
_TILES_OF_COSINE = 512
_MODELS = {LITE0: 32, "efficientnet_b0": 32, "kaiko-vits16": 16, "vit_small_patch16_224": 16, "h0-mini": 4}
"""Each with the number of tiles that it is measured with."""


def run() -> Iterator[Line]:
    """A line for each runtime and precision of each model."""
    torch.set_num_threads(1)
    tiles = inputs.kept_pixels(inputs.section(), _TILES_OF_COSINE)
    for name, n_tiles in _MODELS.items():
        is_real = name == LITE0
        weights = inputs.lite0_weights() if is_real else inputs.random_weights(name)
        reference: Embeddings | None = None
        for runtime, precision in WAYS:
            encoder, alone = (Encoder(_spec(name, weights, runtime, precision)) for _ in range(2))
            kind = "real" if is_real else "random"
            line: Line = {"encoder": name, "weights": kind, "runtime": runtime, "precision": precision}
            line |= _speed(encoder, alone, tiles[: max(n_tiles, encoder.batch_size)])
            line["gflops"] = float(line["images_per_s"]) * gflop_per_tile(name)
            if is_real:
                found = encoder.embed(tiles)
                reference = reference or found
                line |= _cosines(found, reference)
            yield line


def _spec(name: str, weights: Path, runtime: Runtime, precision: Precision) -> EncoderSpec:
    return EncoderSpec(name, str(weights), runtime=runtime, precision=precision, device="cpu")


def _speed(encoder: Encoder, alone: Encoder, tiles: NDArray[np.uint8]) -> Line:
    """Two of them, for each keeps to the batch size that it was last run with."""
    images = resize(tiles, encoder.input_px, encoder.interpolation)
    sizes = [size for size in _SIZES if size <= len(tiles)]

    def bare(size: int) -> None:
        for start in range(0, len(images), size):
            alone.runtime(images[start : start + size], size)

    for size in sizes:
        bare(size)  # compiled, and warm
    best = min(sizes, key=lambda size: min(seconds(partial(bare, size)) for _ in range(2)))
    taken = median_seconds({"ours": partial(encoder.embed, tiles), "bare": partial(bare, best)})
    rates = {way: len(tiles) / spent for way, spent in taken.items()}
    return {
        "batch_size": encoder.batch_size,
        "images_per_s": rates["ours"],
        "bare_batch_size": best,
        "bare_images_per_s": rates["bare"],
        "of_bare": rates["ours"] / rates["bare"],
    }


def _cosines(found: Embeddings, reference: Embeddings) -> Line:
    each = [cosines(ours, theirs) for ours, theirs in zip(found, reference, strict=True)]
    mean, least = (min(float(statistic(one)) for one in each) for statistic in (np.mean, np.min))
    return {
        "cosine_tiles": len(found[0]),
        "cosine_mean": f"{mean:.5f}",
        "cosine_min": f"{least:.5f}",
    }

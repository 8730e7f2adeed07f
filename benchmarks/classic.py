"""The pipeline that people write by hand: OpenSlide, StainNet's convolutions, timm in fp32 and numpy.histogramdd.

A process a core, tile by tile, in batches of 16. It is given the tiles: finding the tissue costs it nothing.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from numpy.typing import NDArray
from openslide import OpenSlide
from torch.nn import functional

from benchmarks.inputs import TILE_PX
from benchmarks.work import BINS, INPUT_PX
from udfs.encode_tiles import FeatureSpec
from udfs.wsi.stain.stain_network import StainNet
from udfs.wsi.weights.checkpoint import load_state_dict

_BATCH = 16
_prepared: list[tuple[Any, StainNet]] = []  # of this process

Embeddings = dict[tuple[str, int, int], NDArray[np.float32]]
"""By slide, x_px and y_px: float32 [2, dim], mean and max."""


def prepare(spec: FeatureSpec) -> None:
    """Load in this process what `encode` needs."""
    torch.set_num_threads(1)
    [encoder] = spec.encoders.values()
    model = timm.create_model(encoder.name, checkpoint_path=encoder.weights).eval()
    stainnet = StainNet()
    stainnet.load_state_dict(load_state_dict(str(spec.stain_weights)))
    _prepared[:] = [(model, stainnet.eval())]


@torch.inference_mode()
def encode(path: Path, corners: Sequence[tuple[int, int]]) -> tuple[Embeddings, Counter[str]]:
    """Embed tiles and count their colours, in this process; and the seconds of each step."""
    [(model, stainnet)] = _prepared
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    spent: Counter[str] = Counter()
    embeddings: Embeddings = {}

    def step(name: str, since: float) -> float:
        now = time.perf_counter()
        spent[name] += now - since  # type: ignore[assignment]
        return now

    with OpenSlide(path) as slide:
        for first in range(0, len(corners), _BATCH):
            images = []
            at = time.perf_counter()
            for corner in corners[first : first + _BATCH]:
                tile = np.asarray(slide.read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB"))
                at = step("read", at)
                x = torch.tensor(tile).permute(2, 0, 1)[None].float() / 127.5 - 1
                y = ((stainnet(x) * 0.5 + 0.5) * 255).round().clamp(0, 255)
                at = step("stain", at)
                pixels = y[0].permute(1, 2, 0).to(torch.uint8).reshape(-1, 3).numpy()
                np.histogramdd(pixels, bins=BINS, range=[(0, 256)] * 3)
                at = step("histogram", at)
                images.append(functional.interpolate(y, size=(INPUT_PX, INPUT_PX), mode="area"))
            features = model.forward_features((torch.cat(images) / 255 - mean) / std)
            both = torch.stack([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1).numpy()
            keys = ((path.stem, *corner) for corner in corners[first : first + _BATCH])
            embeddings.update(zip(keys, both, strict=True))
            step("encode", at)
    return embeddings, spent

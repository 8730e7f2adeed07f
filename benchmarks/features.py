"""features: what the features pass does for one work unit, in this process, beside its parts and a plain timm loop.

The chain is `encode_tiles` as a Spark worker runs it, with StainNet and tf_efficientnet_lite0 in fp32, batches of 8, one
thread. The plain loop is what people write by hand: OpenSlide, StainNet's convolutions and timm, tile by tile in batches,
without a histogram.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import timm.data
import torch
from numpy.typing import NDArray
from openslide import OpenSlide
from torch.nn import functional

from benchmarks import inputs
from benchmarks.inputs import TILE_PX
from benchmarks.measure import Line, median_seconds
from tests.slides.weights import LITE0
from udfs.features import FeatureSpec, encode_tiles, load_models
from udfs.wsi import open_slide
from udfs.wsi.checkpoint import load_state_dict
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.histogram import color_histogram
from udfs.wsi.stain import StainNet

_TILES, _BATCH, _INPUT_PX, _BINS = 48, 8, 224, 16


def run() -> Iterator[Line]:
    """One line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = inputs.pyramid()
    kept = inputs.kept_tiles(path)
    xy = kept[len(kept) // 2 :][:_TILES]
    with tempfile.TemporaryDirectory() as scratch:
        stain = Path(scratch) / "stainnet.pth"
        torch.save(StainNet().state_dict(), stain)
        encoder = EncoderSpec(LITE0, str(inputs.lite0_weights()), _INPUT_PX, "area", _BATCH, "cpu")
        spec = FeatureSpec(encoder, str(stain), _BINS)
        parts = _parts(spec, path, xy)
        actions = {"chain": _chain(spec, path, xy), "plain": _plain_loop(spec, path, xy), **parts}
        taken = median_seconds(actions)
    ms = {name: 1000 * spent / len(xy) for name, spent in taken.items()}
    yield {
        "tiles": len(xy),
        "tiles_per_s": len(xy) / taken["chain"],
        "ms_per_tile": ms["chain"],
        **{f"{part}_ms": ms[part] for part in parts},
        "plain_timm_ms": ms["plain"],
        "vs_plain_timm": taken["plain"] / taken["chain"],
        "of_parts": sum(taken[part] for part in parts) / taken["chain"],
    }


def _chain(spec: FeatureSpec, path: Path, xy: NDArray[np.int64]) -> Callable[[], None]:
    unit: dict[str, Any] = dict.fromkeys(("image_id", "patient_id", "params_hash"), "bench")
    unit |= {"uri": str(path), "tile_px": TILE_PX, "level_read": 0, "downsample": 1.0, "index": None}
    unit |= {"x_px": xy[:, 0].tolist(), "y_px": xy[:, 1].tolist()}
    batch = pa.RecordBatch.from_pylist([unit])

    def encode() -> None:
        encoded = list(encode_tiles(spec, "bench")([batch]))
        if sum(len(rows) - rows["error_code"].null_count for rows in encoded):
            raise AssertionError(encoded[-1]["error_message"][0].as_py())

    return encode


def _parts(spec: FeatureSpec, path: Path, xy: NDArray[np.int64]) -> dict[str, Callable[[], object]]:
    """Each part alone, over the same tiles."""
    models = load_models(spec)
    stainnet = models.stainnet
    if stainnet is None:
        raise AssertionError("no StainNet")

    def read() -> list[NDArray[np.uint8]]:
        with open_slide(str(path)) as slide:
            return [tile for _, tile in slide.read_tiles(xy, TILE_PX)]

    tiles = np.stack(read())
    return {
        "read": read,
        "stain": lambda: [stainnet.normalise(tile) for tile in tiles],
        "encode": lambda: models.encoder.embed(tiles),
        "histogram": lambda: [color_histogram(tile, _BINS) for tile in tiles],
    }


def _plain_loop(spec: FeatureSpec, path: Path, xy: NDArray[np.int64]) -> Callable[[], None]:
    model = timm.create_model(LITE0, checkpoint_path=spec.encoder.weights).eval()
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    stainnet = StainNet()
    stainnet.load_state_dict(load_state_dict(str(spec.stain_weights)))

    @torch.inference_mode()
    def encode() -> None:
        with OpenSlide(path) as slide:
            for start in range(0, len(xy), _BATCH):
                corners = xy[start : start + _BATCH].tolist()
                tiles = [slide.read_region((x, y), 0, (TILE_PX, TILE_PX)).convert("RGB") for x, y in corners]
                batch = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).float()
                stained = ((stainnet(batch / 127.5 - 1) * 0.5 + 0.5) * 255).round().clamp(0, 255)
                small = functional.interpolate(stained, size=(_INPUT_PX, _INPUT_PX), mode="area")
                features = model.forward_features((small / 255 - mean) / std)
                features.mean(dim=(2, 3)).numpy(), features.amax(dim=(2, 3)).numpy()

    return encode

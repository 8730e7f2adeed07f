"""stain: StainNet by table on real tissue, beside its convolutions tile by tile, as it is published.

All 2^24 colours are compared first. Both run on one thread; the table is a file that is mapped, as workers use it.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import inputs
from benchmarks.measure import Line, median_seconds, seconds
from udfs.wsi.quality.colours import COLOURS, rgb
from udfs.wsi.stain.colour_table import StainNormaliser
from udfs.wsi.stain.stain_network import StainNet

_TILES, _BATCH = 48, 8


def run() -> Iterator[Line]:
    """One line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = StainNet().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.35)  # outputs reach both ends, as those of fitted weights do
    tiles = inputs.kept_pixels(inputs.pyramid(), _TILES)
    with tempfile.TemporaryDirectory() as folder:
        normaliser = StainNormaliser(net, tiles_ahead=10_000, folder=Path(folder))
        build = seconds(lambda: normaliser.normalise(tiles[:1]))
        for first in range(0, COLOURS, 2**18):
            colours = rgb(first, first + 2**18).reshape(512, 512, 3)
            np.testing.assert_array_equal(normaliser.normalise(colours), _convolved(net, colours))
        taken = median_seconds(
            {
                "table": partial(_each, normaliser.normalise, tiles),
                "convolution": partial(_each, lambda batch: [_convolved(net, tile) for tile in batch], tiles),
                "without_table": partial(_each, net.normalise, tiles),
            }
        )
    ms = {name: 1000 * spent / _TILES for name, spent in taken.items()}
    yield {
        "tiles": _TILES,
        "equal_colours": COLOURS,
        "build_seconds": build,
        **{f"{name}_ms": spent for name, spent in ms.items()},
        "vs_convolution": ms["convolution"] / ms["table"],
        "vs_without_table": ms["without_table"] / ms["table"],
        "pays_from_tiles": 1000 * build / (ms["without_table"] - ms["table"]),
    }


def _each(normalise: Callable[[NDArray[np.uint8]], object], tiles: NDArray[np.uint8]) -> None:
    """Batch by batch, each forgotten when the next comes, as the pipeline does."""
    for start in range(0, len(tiles), _BATCH):
        normalise(tiles[start : start + _BATCH])


@torch.inference_mode()
def _convolved(net: StainNet, tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    x = torch.tensor(tile).permute(2, 0, 1)[None].float() / 127.5 - 1
    y = ((net(x) * 0.5 + 0.5) * 255).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(y[0].permute(1, 2, 0).numpy())

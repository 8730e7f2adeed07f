"""StainNet: stain normalisation as a small network that maps one pixel's colour to one colour.

Kang et al., StainNet: A Fast and Robust Stain Normalization Network, Frontiers in Medicine 2021, doi:10.3389/fmed.2021.746307.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from udfs.wsi.store import StorageOptions, public_uri
from udfs.wsi.weights.checkpoint import CheckpointError, fingerprint, load_state_dict

_STRIP_PX = 2**14


class StainNet(nn.Module):
    """Three 1x1 convolutions 3-32-32-3 with ReLU between, named as published checkpoints name them (`rgb_trans.0/.2/.4`)."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb_trans = nn.Sequential(
            nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps float [n, 3, h, w] to the same, both scaled as ``x / 127.5 - 1``."""
        result: torch.Tensor = self.rgb_trans(x)
        return result

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint(self.state_dict())

    @torch.inference_mode()
    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Normalises uint8 [..., 3]: input ``x / 127.5 - 1``, output ``(y * 0.5 + 0.5) * 255`` rounded and cut to 0..255.

        A colour becomes the same whatever surrounds it and however many threads torch has: each layer is a matrix product,
        bit for bit torch's convolution on one thread. On several threads, torch's convolution rounds some colours otherwise.
        Strips that stay in the cache take a quarter of the time of a whole tile. Runs on the CPU, wherever the weights are.
        """
        layers = [
            (layer.weight.cpu().flatten(1), layer.bias.cpu()[:, None])
            for layer in self.rgb_trans
            if isinstance(layer, nn.Conv2d) and layer.bias is not None
        ]
        flat = pixels.reshape(-1, 3)
        result = np.empty_like(flat)
        for start in range(0, len(flat), _STRIP_PX):
            x = torch.tensor(flat[start : start + _STRIP_PX]).T.float() / 127.5 - 1
            for weight, bias in layers[:-1]:
                x = torch.addmm(bias, weight, x).relu_()
            weight, bias = layers[-1]
            y = (torch.addmm(bias, weight, x) * 0.5 + 0.5) * 255
            result[start : start + _STRIP_PX] = y.round_().clamp_(0, 255).to(torch.uint8).T.numpy()
        return result.reshape(pixels.shape)


def load_stainnet(uri: str, storage_options: StorageOptions | None = None) -> StainNet:
    """Returns a StainNet from a checkpoint in the published layout.

    Raises CheckpointError if tensors are missing, unknown or of another shape; the message names them.
    """
    tensors = load_state_dict(uri, storage_options)
    net = StainNet()
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        differ = [n for n in wanted if wanted[n] != found.get(n)] + [n for n in found if n not in wanted]
        raise CheckpointError(
            f"{public_uri(uri)} is no StainNet: {', '.join(differ[:4])} missing, unknown or of another shape; it must hold "
            "rgb_trans.0, .2 and .4 of a 3-32-32-3 network"
        )
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)

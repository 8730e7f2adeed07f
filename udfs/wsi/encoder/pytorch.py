"""The encoder by PyTorch, on any device."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.network import Network

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """A network on a device."""

    def __init__(self, network: Network, device: torch.device, precision: Precision) -> None:
        """Move the network there; it is changed if the precision is not fp32.

        Raises:
            ValueError: the device or the model does not calculate in this precision.
        """
        if precision == "fp16" and device.type == "cpu":
            raise ValueError("inference.precision = fp16 needs a GPU: set it to fp32 or bf16")
        self.device = device
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # on by default, and with its 10 bits no fp32
        self._network = network.to(device)  # first: a GPU lowers it without a copy in the host's memory
        if precision != "fp32":
            _lower(network, _TYPES[precision], device)
        self._network.to(memory_format=torch.channels_last)
        try:
            self.forward(_blank(network, device))
        except RuntimeError as error:
            if precision == "fp32":
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"inference.precision = {precision}: the model does not run in it ({reason}): use fp32"
            ) from None

    def __call__(self, images: NDArray[np.float32], batch_size: int) -> tuple[NDArray[np.float32], ...]:
        """Images of at most a batch through the network, see `Network.forward`."""
        return tuple(each.cpu().numpy() for each in self.forward(torch.from_numpy(images).to(self.device)))

    def run_blank(self, batch_size: int) -> None:
        """Run a batch of blank images that are on the device, and return when it is done."""
        self.forward(_blank(self._network, self.device, batch_size))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same on the device that the images are on; returns before a GPU is done."""
        result: tuple[torch.Tensor, ...] = self._network(images)
        return result


def _lower(network: Network, dtype: torch.dtype, device: torch.device) -> None:
    """Convolutions and linear layers in a lower precision, but for those at half of the input's resolution and above.

    Rounding costs the most there, and in normalisation, which stays in fp32 as well: with all of EfficientNet-Lite0 in bf16
    the cosine to fp32 is 0.9970 in the mean over tiles of tissue, its border and glass, so 0.9992, and no slower.
    """
    for module in _at_lower_resolution(network, device):
        module.to(dtype)
    for module in network.modules():
        takes_any = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not takes_any:
            module.register_forward_pre_hook(_in_own_type)


def _in_own_type(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = module.weight
    return (inputs[0].to(weight.dtype), *inputs[1:])


@torch.inference_mode()
def _at_lower_resolution(network: Network, device: torch.device) -> list[nn.Module]:
    found: list[nn.Module] = []

    def look(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        if output.ndim != 4 or 2 * min(output.shape[2:]) < network.input_px:  # [n, dim, h, w]
            found.append(module)

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    network(_blank(network, device))
    for hook in hooks:
        hook.remove()
    return found


def _blank(network: Network, device: torch.device, n: int = 1) -> torch.Tensor:
    """Return n images for the network."""
    return torch.zeros(n, network.input_px, network.input_px, 3, device=device)

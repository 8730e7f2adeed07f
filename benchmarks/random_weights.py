"""Networks without published weights: random numbers with which every layer changes the vector. As fast as with real ones."""

import torch

from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.timm_network import TimmNetwork, random_network
from udfs.wsi.stain.stain_network import StainNet
from udfs.wsi.weights.filling import NoInitialValues


def network_of(spec: EncoderSpec) -> TimmNetwork:
    """Return the network of a spec, always with the same numbers."""
    with NoInitialValues():
        network = random_network(spec)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim == 1 and not name.endswith(("bias", "running_mean")):  # scales and variances
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = tensor[0].numel() if tensor.ndim in (2, 4) else 400
            tensor.normal_(0, fan_in**-0.5, generator=generator)
    return network.eval().requires_grad_(False)


def stainnet() -> StainNet:
    """Return a StainNet that tints a little, so that tissue goes on looking like tissue."""
    torch.manual_seed(0)
    net = StainNet()
    first, second, third = (net.get_parameter(f"rgb_trans.{i}.weight").data[:, :, 0, 0].mul_(0.1) for i in (0, 2, 4))
    halves = torch.cat([torch.eye(3), -torch.eye(3)])  # x is relu(x) - relu(-x)
    first[:6] += halves
    second[:6, :6] += torch.eye(6)
    third[:, :6] += halves.T
    return net.eval()

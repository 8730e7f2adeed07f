"""Layers of published encoders that are not timm's, and layers by their names."""

import re
from contextlib import suppress
from functools import partial
from typing import Any

import timm.layers
import torch
from torch import nn

_WITH_EPS = re.compile(r"(\w+)\(eps=([\d.]+(?:e-?\d+)?)\)")


class ConvStem(nn.Module):
    """The patch embedding of CTransPath: two convolutions of stride 2, then one of 1x1, channels last (Wang et al. 2022)."""

    def __init__(self, img_size: Any, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 96, **_: Any) -> None:
        super().__init__()
        height, width = timm.layers.to_2tuple(img_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        before = in_chans
        for after in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.proj = nn.Sequential(*layers, nn.Conv2d(before, embed_dim, 1))
        self.norm = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, c, h, w] to [n, h / 4, w / 4, embed_dim]."""
        projected: torch.Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return projected


class UnitProjection(nn.Sequential):
    """The head of KEEP: two linear layers with a GELU between; its vectors have length 1."""

    def __init__(self, dim: int, projected_dim: int) -> None:
        super().__init__(nn.Linear(dim, projected_dim), nn.GELU(), nn.Linear(projected_dim, projected_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, dim] to [n, projected_dim]."""
        for layer in self:
            x = layer(x)
        return nn.functional.normalize(x, dim=-1)


def layer_named(name: str, argument: str = "") -> Any:
    """Return the class of a layer: of this module, of timm or of torch.

    Args:
        name: of a class, such as ``SiLU`` or ``LayerNorm(eps=1e-12)``; or, for an activation or a norm, timm's own name, such
            as ``quick_gelu``.
        argument: which takes the layer, such as ``act_layer``.

    Raises:
        ValueError: none of them has a layer of this name.
    """
    if with_eps := _WITH_EPS.fullmatch(name):
        return partial(layer_named(with_eps[1], argument), eps=float(with_eps[2]))
    for module in ({"ConvStem": ConvStem}, vars(timm.layers), vars(nn)):
        layer = module.get(name)
        if isinstance(layer, partial) or (isinstance(layer, type) and issubclass(layer, nn.Module)):
            return layer
    factories = {"act_layer": timm.layers.get_act_layer, "norm_layer": timm.layers.get_norm_layer}
    if argument in factories:
        with suppress(KeyError):  # not one of timm's names
            return factories[argument](name)
    raise ValueError(f"{name} is no layer of timm or PyTorch: give a name such as SwiGLUPacked, SiLU or quick_gelu")

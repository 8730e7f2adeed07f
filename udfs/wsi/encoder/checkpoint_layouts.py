"""Tensors of checkpoints to timm's names: from wrappers, transformers' ViT and DINOv2, and the code of DINOv2 and KEEP."""

import re
from collections import Counter
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from udfs.wsi.weights.checkpoint import StateDict

_RENAMES_OF_TRANSFORMERS = (
    (r"\bembeddings\.(cls_token|mask_token)", r"\1"),
    (r"\bembeddings\.register_tokens", "reg_token"),
    (r"\bembeddings\.position_embeddings", "pos_embed"),
    (r"\bembeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\b(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\blayernorm\.", "norm."),
)
_RENAMES_OF_AUTHORS = (
    (r"\bregister_tokens$", "reg_token"),  # DINOv2
    (r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2, its blocks in chunks
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.ls([12])\.weight$", r".ls\1.gamma"),  # KEEP
    (r"\bvisual_head\.", "visual.head."),
)
_OF_TRAINING = re.compile(r"(mask_token$|pooler\.|dino_head\.|ibot_head\.|.*\b(relative_position_index|attn_mask)$)")


def to_timm(tensors: Mapping[str, torch.Tensor], model: nn.Module, *, other_grid: bool) -> StateDict:
    """Return the tensors of a checkpoint under the names of a timm model, without wrappers, heads and other networks.

    What the model does not have stays, and what it misses is not made up: whoever fills the model compares.

    Args:
        tensors: of the file.
        model: of timm, without a classifier.
        other_grid: whether position embeddings of another input size are resampled to the model's.
    """
    expected = model.state_dict()
    is_of_transformers = any("embeddings.patch_embeddings.projection" in name for name in tensors)
    if is_of_transformers:
        renamed = _with_fused_qkv({_renamed(name, _RENAMES_OF_TRANSFORMERS): each for name, each in tensors.items()})
    else:  # EfficientNet has blocks like DINOv2's chunks: only what the model does not have gets another name
        renamed = {
            name if _prefixes(name, expected) else _renamed(name, _RENAMES_OF_AUTHORS): each
            for name, each in tensors.items()
        }
    unwrapped = _unwrapped(renamed, expected)
    dropped = _classifiers(model)
    found = {
        name: tensor
        for name, tensor in unwrapped.items()
        if name in expected or not (name.startswith(dropped) or _OF_TRAINING.match(name))
    }
    return _with_positions(found, model, other_grid=other_grid, antialias=not is_of_transformers)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _with_fused_qkv(tensors: StateDict) -> StateDict:
    """Query, key and value, which transformers keeps apart, as the one tensor of timm."""
    fused: StateDict = {}
    for name, tensor in tensors.items():
        stem, found, kind = name.rpartition(".attn.query.")
        if found:
            parts = [tensors.get(f"{stem}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            fused[f"{stem}.attn.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
        elif ".attn.key." not in name and ".attn.value." not in name:
            fused[name] = tensor
    return fused


def _prefixes(name: str, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """What stands before a name of the model in this name."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    return [name[:start] for start in starts if name[start:] in expected]


def _unwrapped(tensors: StateDict, expected: Mapping[str, torch.Tensor]) -> StateDict:
    """Those behind the prefix under which most of the model's names are, such as `teacher.backbone.`, without it."""
    prefixes = Counter(prefix for name in tensors for prefix in _prefixes(name, expected))
    # Of a student and its teacher, the teacher is what is published; of equals, the shortest.
    best = max(prefixes, key=lambda prefix: (prefixes[prefix], "teacher" in prefix, -len(prefix)), default="")
    return {name.removeprefix(best): tensor for name, tensor in tensors.items() if name.startswith(best)}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in (*names, "head", "fc", "classifier"))


def _with_positions(tensors: StateDict, model: nn.Module, *, other_grid: bool, antialias: bool) -> StateDict:
    """Position embeddings as the model has them: that of the class token added to the token, and of the model's grid."""
    pos_embed, wanted = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if pos_embed is None or wanted is None or grid is None or pos_embed.ndim != 3:
        return tensors
    tensors = dict(tensors)
    n_prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    if not n_prefix and not _is_square(pos_embed.shape[1]) and _is_square(pos_embed.shape[1] - 1):
        tensors["cls_token"] = tensors["cls_token"] + pos_embed[:, :1]
        pos_embed = pos_embed[:, 1:]
    if other_grid and pos_embed.shape[1] != wanted.shape[1] and _is_square(pos_embed.shape[1] - n_prefix):
        pos_embed = resample_abs_pos_embed(
            pos_embed, list(grid), num_prefix_tokens=n_prefix, interpolation="bicubic", antialias=antialias
        )
    tensors["pos_embed"] = pos_embed
    return tensors


def _is_square(n: int) -> bool:
    return n > 0 and isqrt(n) ** 2 == n

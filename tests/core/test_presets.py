"""The table of presets: each row names an architecture that timm builds, with a vector of the length that the row says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.agreement import cosines
from benchmarks.random_weights import network_of
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.preset import Preset
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.pytorch import TorchRuntime

AVAILABLE = [preset for preset in PRESETS.values() if preset.unavailable is None]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_row_is_whole(preset: Preset) -> None:
    assert timm.is_model(preset.architecture)
    assert not timm.is_model(preset.name)
    assert preset.repository.count("/") == 1
    assert preset.sources
    assert preset.revision is None or len(preset.revision) == 40
    assert preset.sha256 is None or len(preset.sha256) == 64
    assert preset.crop_px is None or preset.crop_px < preset.input_px


def test_the_documentation_has_every_preset() -> None:
    lines = (Path(__file__).parents[2] / "docs/encoders.md").read_text().splitlines()
    for preset in PRESETS.values():
        [row] = [line for line in lines if line.startswith(f"| `{preset.name}` |")]
        assert f"| {preset.dim} |" in row
        assert preset.licence.name in row
        first, also = preset.mpps[:1], ", ".join(f"{mpp:g}" for mpp in preset.mpps[1:])
        scale = "".join(f" at {mpp:g} um/px" for mpp in first) + (f", also {also}" if also else "")
        assert f"| {preset.tile_px} px{scale} |" in row
        assert preset.unavailable is None or f"- `{preset.name}`: {preset.unavailable}." in lines


class _Calls(TorchFunctionMode):
    """How often a function of torch is called."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.count = function, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.function
        return func(*args, **(kwargs or {}))


def shrunk(name: str, precision: Precision = "fp32") -> EncoderSpec:
    """A preset with one block, if it has blocks that are all alike."""
    kwargs = () if name in ("retccl", "ctranspath") else (("depth", 1),)
    return EncoderSpec(name, None, precision=precision, kwargs=kwargs)


@pytest.mark.parametrize("preset", AVAILABLE, ids=lambda preset: preset.name)
def test_attention_is_torchs_own(preset: Preset) -> None:
    """It has the fast kernels of GPUs; written out, attention takes several times as long there."""
    with torch.device("meta"):
        network = network_of(shrunk(preset.name))
    images = torch.zeros(1, network.input_px, network.input_px, 3, device="meta")
    with _Calls(functional.scaled_dot_product_attention) as calls, torch.inference_mode():
        network(images)
    has_none = preset.name in ("retccl", "ctranspath")  # convolutions; windows with a bias, in fp32 alone
    assert calls.count == (0 if has_none else 1)


@pytest.mark.parametrize("name", ["uni2-h", "virchow2", "keep", "dinov3-s", "retccl"])
def test_presets_run_in_a_lower_precision(name: str) -> None:
    network = network_of(shrunk(name))
    images = np.random.default_rng(0).integers(0, 256, (2, network.input_px, network.input_px, 3)).astype(np.float32)
    cpu = torch.device("cpu")
    expected = TorchRuntime(network, cpu, "fp32")(images, 2)
    found = TorchRuntime(network, cpu, "bf16")(images, 2)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() > 0
        assert cosines(ours, theirs).min() >= 0.999

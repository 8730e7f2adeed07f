"""The table of presets: each row names an architecture that timm builds, with a vector of the length that the row says."""

from pathlib import Path

import pytest
import timm

from udfs.wsi.encoder.preset import Preset
from udfs.wsi.encoder.presets import PRESETS

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

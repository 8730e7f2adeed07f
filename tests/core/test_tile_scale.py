"""A preset runs on tiles of a scale and a field of view that it is recommended for; others are refused with a remedy."""

import re
from typing import Any

import pytest

from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.tile_scale import check_tile_scale


def spec(name: str, **settings: Any) -> EncoderSpec:
    return EncoderSpec(name, None, **settings)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_tiles_of_every_scale_of_a_preset_agree(preset: Any) -> None:
    check_tile_scale(spec(preset.name), preset.tile_px, preset.mpp)
    for mpp in preset.mpps:
        check_tile_scale(spec(preset.name), preset.tile_px, mpp)


@pytest.mark.parametrize(
    ("name", "mpps"),
    [
        ("virchow2", (0.25, 0.5, 1.0, 2.0)),  # its card
        ("midnight-12k", (0.25, 0.5, 1.0, 2.0)),  # its paper, arXiv:2504.05186
        ("lunit-vits8", (0.25, 0.5)),  # its paper, arXiv:2212.04690: 40x and 20x
        ("lunit-vits16", (0.25, 0.5)),
        ("ctranspath", (0.5, 1.0)),
    ],
)
def test_every_scale_that_the_authors_name_is_accepted_and_one_beyond_refused(
    name: str, mpps: tuple[float, ...]
) -> None:
    for mpp in mpps:
        check_tile_scale(spec(name), 224, mpp)
    for mpp in (mpps[0] / 2, mpps[-1] * 2):
        with pytest.raises(
            ValueError, match=rf"{name} is recommended for tiles .*{224 * mpps[-1]:g} um wide and seen at"
        ):
            check_tile_scale(spec(name), 224, mpp)


@pytest.mark.parametrize(
    ("name", "tile_px", "mpp"),
    [("uni2-h", 448, 0.25), ("uni2-h", 224, 0.499), ("uni2-h", 240, 0.5), ("ctranspath", 448, 0.5)],
)
def test_the_same_region_read_finer_agrees(name: str, tile_px: int, mpp: float) -> None:
    check_tile_scale(spec(name), tile_px, mpp)


@pytest.mark.parametrize(
    ("name", "tile_px", "mpp", "here"),
    [
        ("uni2-h", 224, 1.0, "tiles are 224 um wide and seen at 1 um/px"),
        ("uni2-h", 448, 0.5, "tiles are 224 um wide and seen at 1 um/px"),
        ("uni2-h", 224, 0.25, "tiles are 56 um wide and seen at 0.25 um/px"),
        ("uni2-h", 250, 0.5, "tiles are 125 um wide and seen at 0.558036 um/px"),
        ("uni2-h", 448, None, "tiles of 448 px have the scale of each slide, because tiling.mpp is null"),
        ("retccl", 256, 0.5, "tiles are 128 um wide and seen at 0.5 um/px"),
    ],
)
def test_tiles_of_another_scale_are_refused_with_settings_that_agree(
    name: str, tile_px: int, mpp: float | None, here: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(here)) as refused:
        check_tile_scale(spec(name), tile_px, mpp)
    remedy = re.search(r"tiling\.tile_px to (\d+) and tiling\.mpp to ([\d.]+), or its allow_other", str(refused.value))
    assert remedy
    check_tile_scale(spec(name), int(remedy[1]), float(remedy[2]))


def test_a_set_input_size_counts() -> None:
    check_tile_scale(spec("uni2-h"), 224, 0.5)
    with pytest.raises(ValueError, match=r"112 um wide and seen at 0\.25 um/px"):
        check_tile_scale(spec("uni2-h", input_px=448), 224, 0.5)


@pytest.mark.parametrize("name", ["efficientnet_b0", "dinov2-s", "keep"])
def test_models_without_a_recommended_scale_take_all_tiles(name: str) -> None:
    for tile_px, mpp in [(448, None), (64, 2.0)]:
        check_tile_scale(spec(name), tile_px, mpp)

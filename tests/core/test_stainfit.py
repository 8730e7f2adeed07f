"""The teacher is Reinhard's transfer in CIELAB, and a fitted StainNet does nearly as the teacher does."""

import numpy as np
import pytest
import skimage.color

from tests.slides.make import Pixels, stain_shift
from udfs.wsi.stain.fitting import Teacher, fit_stainnet, split_tiles, teacher_gaps
from udfs.wsi.stain.reinhard import Appearance, appearance, transfer
from udfs.wsi.tissue.brightness import Brightness

CENTERS = {"reference": "north", "shifted": "south"}


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> dict[str, Pixels]:
    """Tissue of one centre and the same stained as another does."""
    corners = [(x, y) for y in (896, 1120, 1344, 1568, 1792) for x in (896, 1120)]
    own = np.stack([pixels[y : y + 112, x : x + 112] for x, y in corners])
    shifted = stain_shift(own.reshape(-1, 112, 3)).reshape(own.shape)
    return {"reference": own, "shifted": shifted}


@pytest.fixture(scope="module")
def teacher(tiles: dict[str, Pixels]) -> Teacher:
    return Teacher(tiles, CENTERS, "reference", Brightness())


SAME = Appearance(np.array([50.0, 0.0, 0.0]), np.ones(3))


@pytest.mark.filterwarnings("error")
def test_every_colour_comes_back_from_cielab() -> None:
    steps = np.arange(0, 256, 5, dtype=np.uint8)
    every = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    np.testing.assert_array_equal(transfer(every, SAME, SAME), every)


@pytest.mark.filterwarnings("error")
def test_colours_beyond_srgb_are_cut_to_it() -> None:
    grey = np.full((1, 3), 119, np.uint8)  # L is 50.03
    beyond = [[120.0, 0.0, 0.0], [-5.0, 0.0, 0.0], [50.0, 150.0, -150.0], [30.0, 0.0, 150.0]]
    cut = [transfer(grey, SAME, Appearance(np.array(mean), np.ones(3)))[0].tolist() for mean in beyond]
    assert cut[:2] == [[255, 255, 255], [0, 0, 0]]
    assert cut[2][1] == 0 and cut[3][2] == 0


def test_a_slide_given_its_own_appearance_stays_as_it_is(tiles: dict[str, Pixels]) -> None:
    own = appearance(tiles["reference"])
    np.testing.assert_array_equal(transfer(tiles["reference"], own, own), tiles["reference"])


def test_a_transfer_gives_the_targets_mean_and_spread(tiles: dict[str, Pixels]) -> None:
    """Means and deviations by scikit-image; colours cut at the edge of sRGB move them a little."""
    source, target = appearance(tiles["shifted"]), appearance(tiles["reference"])
    moved = skimage.color.rgb2lab(transfer(tiles["shifted"], source, target)).reshape(-1, 3)
    wanted = skimage.color.rgb2lab(tiles["reference"]).reshape(-1, 3)
    np.testing.assert_allclose(moved.mean(axis=0), wanted.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(moved.std(axis=0), wanted.std(axis=0), atol=0.5)


@pytest.mark.parametrize(
    "pixels_", [np.zeros((0, 3), np.uint8), np.full((1, 3), 9, np.uint8), np.full((9, 3), 9, np.uint8)]
)
def test_pixels_that_are_all_alike_have_no_appearance(pixels_: Pixels) -> None:
    with pytest.raises(ValueError, match="no appearance"):
        appearance(pixels_)


def test_the_teacher_brings_one_centre_to_the_other(tiles: dict[str, Pixels], teacher: Teacher) -> None:
    wanted = tiles["reference"].astype(int)
    before = np.abs(tiles["shifted"] - wanted).mean()
    after = np.abs(teacher.normalise("shifted", tiles["shifted"]) - wanted).mean()
    assert after < before / 2
    np.testing.assert_array_equal(teacher.normalise("reference", tiles["reference"]), tiles["reference"])


def test_every_fifth_tile_is_held_out(tiles: dict[str, Pixels]) -> None:
    fit, held = split_tiles(tiles | {"single": tiles["reference"][:1]})
    assert [len(fit[name]) for name in fit] == [8, 8, 1]
    assert [len(held[name]) for name in held] == [2, 2, 0]
    np.testing.assert_array_equal(held["shifted"], tiles["shifted"][[1, 6]])


def test_the_student_is_nearer_to_the_teacher_than_the_untouched_tiles(
    tiles: dict[str, Pixels], teacher: Teacher
) -> None:
    fit, held = split_tiles(tiles)
    gaps = {gap.image_id: gap for gap in teacher_gaps(fit_stainnet(fit, teacher, 300, 0), held, teacher)}
    assert {name: gap.tiles for name, gap in gaps.items()} == {"reference": 2, "shifted": 2}
    assert gaps["shifted"].student < gaps["shifted"].untouched / 2
    assert gaps["reference"].untouched == 0


def test_the_same_seed_gives_the_same_network(tiles: dict[str, Pixels], teacher: Teacher) -> None:
    one, same, other = (fit_stainnet(tiles, teacher, 20, seed).fingerprint for seed in (0, 0, 1))
    assert one == same
    assert one != other

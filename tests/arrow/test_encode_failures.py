"""What goes wrong with one work unit is a row that names it, and the next unit goes on."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from numpy.typing import NDArray

from tests.arrow.units import CORNERS, ENCODER, encode, indexed, unit
from tests.slides.damage import BAD_SLIDES
from udfs import failures
from udfs.encode_tiles import FeatureSpec, load_models
from udfs.wsi.encoder import Encoder
from udfs.wsi.weights.checkpoint import CheckpointError


def test_a_slide_that_does_not_decode_is_one_row_and_the_next_goes_on(
    spec: FeatureSpec, small_slides: Path, tmp_path: Path
) -> None:
    good = small_slides / "a1.tif"
    bad = BAD_SLIDES["flipped_tile_data"](good, tmp_path, "bad")
    corners = np.array([[x, y] for y in range(0, 1792, 448) for x in range(0, 1344, 448)])
    rows, ends = encode(spec, unit(bad, corners), unit(tmp_path / "gone.tif", corners), unit(good, corners))
    assert [end["error_code"] for end in ends] == ["tile_data_corrupt", "file_missing", None]
    assert all("upload" in end["error_message"] or "check" in end["error_message"] for end in ends[:2])
    assert [end["work"] is None for end in ends] == [False, True, False]
    assert sum(row["image_id"] == "a1" for row in rows) == len(corners)


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [("fp32", "give other weights in encoders.e.weights"), ("bf16", "set inference.precision to fp32")],
)
def test_a_slide_whose_embeddings_are_not_finite_fails_and_the_next_goes_on(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, remedy: str
) -> None:
    """The third tile alone overflows, in the middle of a unit; the unit after it is as ever."""
    spec = replace(spec, encoders={ENCODER: replace(spec.encoders[ENCODER], batch_size=2, precision=precision)})
    embed, calls = Encoder.embed, [0]

    def overflowing(self: Encoder, tiles: NDArray[np.uint8]) -> Any:
        average, maximum = embed(self, tiles)
        if len(tiles) and not calls[0]:
            maximum[2, 3] = np.inf
        calls[0] += len(tiles)
        return average, maximum

    monkeypatch.setattr(Encoder, "embed", overflowing)
    corners = np.array([[x, y] for y in range(0, 1344, 448) for x in range(0, 1344, 448)])
    first, second = small_slides / "a1.tif", small_slides / "b1.tif"
    rows, ends = encode(spec, unit(first, corners), unit(second, corners))
    assert [(end["encoder"], end["error_code"]) for end in ends] == [
        (ENCODER, "embedding_not_finite"),
        (None, None),
        (None, None),
    ]
    message = ends[0]["error_message"]
    assert message == (
        f"{first}: vectors of encoder e for 1 of 9 tiles are NaN or infinite in {precision}: {remedy}, then run with "
        "--retry-failed"
    )
    good = [row["embedding_max"] for row in rows if row["image_id"] == "b1"]
    assert len(good) == 9 and np.isfinite(good).all()


def test_weights_that_are_not_the_drivers_end_the_run_and_fail_no_slide(
    spec: FeatureSpec, small_slides: Path, encoder_weights: Path, tmp_path: Path
) -> None:
    """The file is replaced after the driver loaded it; then another run begins, in the same worker."""
    path, image = tmp_path / "weights.safetensors", unit(small_slides / "a1.tif", CORNERS)
    shutil.copy(encoder_weights, path)
    spec = replace(spec, encoders={ENCODER: replace(spec.encoders[ENCODER], weights=str(path))})
    first = load_models(spec).identities
    before, _ = encode(replace(spec, models=first), image)
    changed = {name: tensor * 1.5 for name, tensor in safetensors.torch.load_file(encoder_weights).items()}
    safetensors.torch.save_file(changed, path)
    second = load_models(spec).identities
    after, [end] = encode(replace(spec, models=second), image)
    assert end["error_code"] is None
    assert [row["embedding"] for row in after] != [row["embedding"] for row in before]
    with pytest.raises(CheckpointError, match=r"are not the driver's: encoder\.weights=\w+, and .*; then run again$"):
        encode(replace(spec, models=first), image)
    stain = {ENCODER: (*second[ENCODER][:-1], "stain.weights=0123")}
    with pytest.raises(
        CheckpointError, match=r"the driver's: stain\.weights=null, and the driver has stain\.weights=0123"
    ):
        encode(replace(spec, models=stain), image)


def test_a_slide_that_killed_its_worker_twice_is_given_up(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(attemptNumber=lambda: 2)
    monkeypatch.setattr(failures, "TaskContext", SimpleNamespace(get=lambda: context))
    units = [unit(small_slides / "a1.tif", np.array([[0, 0], [448, 0]])) for _ in range(2)]
    rows, ends = encode(spec, *units)
    assert rows == [] and [end["error_code"] for end in ends] == ["worker_died", "worker_died"]
    assert all("--retry-failed" in end["error_message"] for end in ends)


def test_an_error_nobody_foresaw_is_a_row_without_secrets(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(uri: str, options: Any, **how: Any) -> None:
        raise RuntimeError(f"refused {options['key']}")

    monkeypatch.setattr("udfs.encode_tiles.open_slide", broken)
    secret = FeatureSpec(spec.encoders, None, 16, storage_options={"key": "topsecretkey"})
    _, [row] = encode(secret, unit(small_slides / "a1.tif", np.array([[0, 0]])))
    assert row["error_code"] == "internal_error"
    assert "refused ***" in row["error_message"] and "topsecretkey" not in str(row)
    assert "topsecretkey" not in repr(secret)


def test_a_file_that_is_not_the_one_of_the_index_is_an_error_and_no_pixel_of_it_is_used(
    spec: FeatureSpec, small_slides: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a1.tif"
    shutil.copy(small_slides / "a1.tif", path)
    row = indexed(path, CORNERS)
    shutil.copy(small_slides / "a2.tif", path)
    rows, [end] = encode(spec, row)
    assert (rows, end["error_code"]) == ([], "file_changed")
    assert "run again" in end["error_message"]

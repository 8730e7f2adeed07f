"""What the doctor measures is the run's own work: its tiles, by its mask and spacing, in every way that is there."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from tests.slides.damage import BAD_SLIDES
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.find_tissue import TissueSpec, find_tissue
from udfs.sample_cohort import measure_runtimes
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.tissue.brightness import Brightness


@pytest.fixture(scope="module")
def features(encoder_weights: Path) -> FeatureSpec:
    encoder = EncoderSpec("test_efficientnet", str(encoder_weights), 96, "area", 4, "cpu", "openvino", "bf16")
    return FeatureSpec({"e": encoder}, None, 16)


def test_each_way_encodes_the_tiles_that_the_run_would(
    features: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        encode = encode_tiles(*arguments, **options)

        def run(batches: Any) -> Any:
            units = list(batches)
            seen.extend(pa.Table.from_batches(units).to_pylist())
            return encode(units)

        return run

    monkeypatch.setattr("udfs.sample_cohort.encode_tiles", watched)
    slides = [(str(small_slides / "gone.tif"), None), (str(small_slides / "a1.tif"), 0.5)]
    tissue = TissueSpec(256, 1.0, 16, Brightness(190), 0.9)
    measured = measure_runtimes(slides, tissue, features, 0.0)
    ways = [(way.runtime, way.precision) for way in measured]
    assert ways[0] == ("torch", "fp32") and ("openvino", "fp32") in ways
    assert all(way.tiles_per_s > 0 and way.cosine > 0.99 for way in measured)
    assert all(way.cosine > 0.99999 for way in measured if way.precision == "fp32")
    record = {"image_id": "a1", "patient_id": "001", "uri": slides[1][0], "mpp": 0.5, "params_hash": ""}
    [found] = pd.concat(find_tissue(tissue, "run")([pd.DataFrame([record], dtype=object)])).to_dict("records")
    [corners] = {(tuple(unit["x_px"]), tuple(unit["y_px"])) for unit in seen}
    assert sorted(zip(*corners, strict=True)) == sorted(zip(found["x_px"], found["y_px"], strict=True))
    assert {(unit["uri"], unit["downsample"], unit["tile_px"]) for unit in seen} == {(slides[1][0], 2.0, 256)}
    assert measure_runtimes(slides, TissueSpec(256, 1.0, 16, Brightness(0), 0.0), features, 0.0) == []  # no tissue


def test_what_is_not_there_is_left_out_and_what_overflows_has_no_cosine(
    features: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bf16, the maximum alone is no number: the other vector keeps its cosine."""
    embed = Encoder.embed

    def overflowing(self: Encoder, tiles: NDArray[np.uint8]) -> Any:
        average, maximum = embed(self, tiles)
        return average, np.full_like(maximum, np.nan) if self.spec.precision == "bf16" else maximum

    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    monkeypatch.setattr(Encoder, "embed", overflowing)
    tissue = TissueSpec(448, None, 16, Brightness(190), 0.5)
    measured = measure_runtimes([(str(small_slides / "c1.tif"), None)], tissue, features, 0.0)
    assert {way.precision: bool(np.isfinite(way.cosine)) for way in measured} == {"fp32": True, "bf16": False}


def test_a_slide_that_does_not_decode_measures_nothing(
    features: FeatureSpec, small_slides: Path, tmp_path: Path
) -> None:
    bad = BAD_SLIDES["flipped_tile_data"](small_slides / "a1.tif", tmp_path, "bad")
    assert measure_runtimes([(str(bad), None)], TissueSpec(448, None, 16, Brightness(190), 1.0), features, 0.0) == []

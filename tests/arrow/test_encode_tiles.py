"""The features pass on plain record batches, held against tifffile's pixels, timm, torch's convolutions and NumPy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tifffile
import timm
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from tests.slides.damage import BAD_SLIDES
from udfs import failures
from udfs.features import FeatureSpec, encode_tiles
from udfs.schemas import ENCODED
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.stain import StainNet

TILE_PX, INPUT_PX = 448, 96
COSINE = 0.99999
CORNERS = np.array([[896, 448], [0, 0], [448, 448], [7, 11], [0, 896], [960, 1408]])  # tissue, glass and off the grid


@pytest.fixture(scope="session")
def stainnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout that moves every colour."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("stain") / "stainnet.pth"
    torch.save(StainNet().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def spec(encoder_weights: Path) -> FeatureSpec:
    encoder = EncoderSpec("test_efficientnet", str(encoder_weights), INPUT_PX, "area", 4, "cpu")
    return FeatureSpec(encoder, None, 16)


def unit(path: Path, corners: NDArray[np.int64], **reading: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"image_id": path.stem, "patient_id": "007", "uri": str(path), "tile_px": TILE_PX}
    row |= {"level_read": 0, "downsample": 1.0, "params_hash": "p"} | reading
    return row | {"x_px": corners[:, 0].tolist(), "y_px": corners[:, 1].tolist()}


def encode(spec: FeatureSpec, *units: dict[str, Any]) -> list[dict[str, Any]]:
    """What the UDF gives; every batch must have the schema to the letter, for Spark checks nothing."""
    batches = list(encode_tiles(spec, "run")([pa.RecordBatch.from_pylist(list(units))]))
    assert all(batch.schema.equals(ENCODED) for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    rows: list[dict[str, Any]] = pa.Table.from_batches(batches).to_pylist()
    return rows


def dense(sparse: dict[str, Any], bins: int = 16) -> NDArray[np.int64]:
    assert sparse["bin"] == sorted(set(sparse["bin"])) and all(sparse["count"])
    histogram = np.zeros(bins**3, np.int64)
    histogram[sparse["bin"]] = sparse["count"]
    return histogram


def histogram_by_numpy(tile: NDArray[np.uint8]) -> NDArray[np.int64]:
    counts, _ = np.histogramdd(tile.reshape(-1, 3), bins=16, range=[(0, 256)] * 3)
    return counts.reshape(-1).astype(np.int64)


def normalised_by_torch(checkpoint: Path, tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    weights = torch.load(checkpoint, weights_only=True)
    x = torch.from_numpy(tile.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    for layer in (0, 2, 4):
        x = functional.conv2d(x, weights[f"rgb_trans.{layer}.weight"], weights[f"rgb_trans.{layer}.bias"])
        x = x.relu() if layer < 4 else x
    return ((x * 0.5 + 0.5) * 255).round().clamp(0, 255)[0].permute(1, 2, 0).byte().numpy()


def embedded_by_timm(weights: Path, tile: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, global_pool="").eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    data = timm.data.resolve_model_data_config(model)
    x = torch.from_numpy(tile.copy()).permute(2, 0, 1)[None].float()
    x = functional.interpolate(x, size=(INPUT_PX, INPUT_PX), mode="area") / 255
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        features = model.forward_features((x - mean) / std)[0]
    return features.mean(dim=(1, 2)).numpy(), features.amax(dim=(1, 2)).numpy()


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def tile_at(pixels: NDArray[np.uint8], row: dict[str, Any], edge: int = TILE_PX) -> NDArray[np.uint8]:
    return pixels[row["y_px"] : row["y_px"] + edge, row["x_px"] : row["x_px"] + edge]


@pytest.mark.parametrize("name", ["a2", "b1", "d1"])
@pytest.mark.parametrize("stained", [False, True])
def test_each_tile_is_normalised_counted_and_embedded(
    spec: FeatureSpec, small_slides: Path, encoder_weights: Path, stainnet: Path, name: str, stained: bool
) -> None:
    path = small_slides / f"{name}.tif"
    pixels = tifffile.imread(path, key=0)
    rows = encode(FeatureSpec(spec.encoder, str(stainnet) if stained else None, 16), unit(path, CORNERS))
    assert sorted([row["x_px"], row["y_px"]] for row in rows) == sorted(CORNERS.tolist())
    for row in rows:
        tile = tile_at(pixels, row)
        tile = normalised_by_torch(stainnet, tile) if stained else tile
        histogram = dense(row["color_histogram"])
        assert histogram.sum() == TILE_PX**2
        assert np.array_equal(histogram, histogram_by_numpy(tile))
        average, maximum = embedded_by_timm(encoder_weights, tile)
        assert cosine(row["embedding_avg"], average) >= COSINE
        assert cosine(row["embedding_max"], maximum) >= COSINE
        assert (row["image_id"], row["patient_id"], row["params_hash"], row["run_id"]) == (name, "007", "p", "run")
        assert row["error_code"] is None and row["error_message"] is None


def test_at_a_target_mpp_a_fractional_region_is_brought_to_the_tile(spec: FeatureSpec, small_slides: Path) -> None:
    path = small_slides / "a2.tif"
    pixels = tifffile.imread(path, key=0)
    rows = encode(spec, unit(path, np.array([[0, 0], [3, 716]]), downsample=1.6))
    for row in rows:
        region = Image.fromarray(tile_at(pixels, row, 717))  # 448 x 1.6 = 716.8
        tile = np.asarray(region.resize((TILE_PX, TILE_PX), Image.Resampling.BOX))
        assert np.array_equal(dense(row["color_histogram"]), histogram_by_numpy(tile))


def test_a_coarser_level_is_read_where_the_plan_says_so(spec: FeatureSpec, small_slides: Path) -> None:
    path = small_slides / "a1.tif"
    [row] = encode(spec, unit(path, np.array([[40, 80]]), level_read=1, downsample=4.0, tile_px=96))
    level = tifffile.imread(path, key=1)
    expected = histogram_by_numpy(level[20:116, 10:106])
    # two JPEG decoders may differ by a grey level and so move a pixel over the edge of a bin
    assert np.abs(dense(row["color_histogram"]) - expected).sum() <= 0.1 * 96**2
    assert sum(row["color_histogram"]["count"]) == 96**2


def test_a_slide_that_does_not_decode_is_one_row_and_the_next_goes_on(
    spec: FeatureSpec, small_slides: Path, tmp_path: Path
) -> None:
    good = small_slides / "a1.tif"
    bad = BAD_SLIDES["flipped_tile_data"](good, tmp_path, "bad")
    corners = np.array([[x, y] for y in range(0, 1792, 448) for x in range(0, 1344, 448)])
    rows = encode(spec, unit(bad, corners), unit(tmp_path / "gone.tif", corners), unit(good, corners))
    errors = [row for row in rows if row["error_code"]]
    assert [(row["image_id"], row["error_code"]) for row in errors] == [
        ("bad", "tile_data_corrupt"),
        ("gone", "file_missing"),
    ]
    assert all(row["embedding_avg"] is None and row["x_px"] is None for row in errors)
    assert all("upload" in row["error_message"] or "check" in row["error_message"] for row in errors)
    assert sum(row["image_id"] == "a1" for row in rows) == len(corners)


def test_a_slide_that_killed_its_worker_twice_is_given_up(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(attemptNumber=lambda: 2)
    monkeypatch.setattr(failures, "TaskContext", SimpleNamespace(get=lambda: context))
    [row] = encode(spec, unit(small_slides / "a1.tif", np.array([[0, 0], [448, 0]])))
    assert (row["image_id"], row["error_code"]) == ("a1", "worker_died")
    assert "--retry-failed" in row["error_message"]


def test_an_error_nobody_foresaw_is_a_row_without_secrets(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(uri: str, options: Any) -> None:
        raise RuntimeError(f"refused {options['key']}")

    monkeypatch.setattr("udfs.features.open_slide", broken)
    secret = FeatureSpec(spec.encoder, None, 16, {"key": "topsecretkey"})
    [row] = encode(secret, unit(small_slides / "a1.tif", np.array([[0, 0]])))
    assert row["error_code"] == "internal_error"
    assert "refused ***" in row["error_message"] and "topsecretkey" not in str(row)
    assert "topsecretkey" not in repr(secret)


def test_progress_counts_tiles(spec: FeatureSpec, small_slides: Path) -> None:
    counted: list[int] = []
    batch = pa.RecordBatch.from_pylist([unit(small_slides / "c1.tif", np.array([[0, 0], [448, 0], [896, 0]]))])
    list(encode_tiles(spec, "run", counted.append)([batch]))
    assert sum(counted) == 3

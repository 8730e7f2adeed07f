"""The features pass on plain record batches, held against tifffile's pixels, timm, torch's convolutions and NumPy."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tifffile
import timm
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

import udfs.wsi.encoder as encoder_folder
from tests.arrow.units import CORNERS, ENCODER, INPUT_PX, TILE_PX, dense, encode, histogram_by_numpy, tile_at, unit
from tests.slides.foreign import write_mirax
from tests.slides.make import write_slide
from udfs.encode_tiles import FeatureSpec
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.stain.stain_network import StainNet

COSINE = 0.99999


@pytest.fixture(scope="session")
def stainnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout that moves every colour."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("stain") / "stainnet.pth"
    torch.save(StainNet().state_dict(), path)
    return path


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


@pytest.mark.parametrize("name", ["a2", "b1", "d1"])
@pytest.mark.parametrize("stained", [False, True])
def test_each_tile_is_normalised_counted_and_embedded(
    spec: FeatureSpec, small_slides: Path, encoder_weights: Path, stainnet: Path, name: str, stained: bool
) -> None:
    path = small_slides / f"{name}.tif"
    pixels = tifffile.imread(path, key=0)
    begun = perf_counter()
    rows, [end] = encode(FeatureSpec(spec.encoders, str(stainnet) if stained else None, 16), unit(path, CORNERS))
    taken = perf_counter() - begun
    assert sorted([row["x_px"], row["y_px"]] for row in rows) == sorted(CORNERS.tolist())
    for row in rows:
        tile = tile_at(pixels, row)
        tile = normalised_by_torch(stainnet, tile) if stained else tile
        histogram = dense(row["color_histogram"])
        assert histogram.sum() == TILE_PX**2
        assert np.array_equal(histogram, histogram_by_numpy(tile))
        average, maximum = embedded_by_timm(encoder_weights, tile)
        assert cosine(row["embedding"], average) >= COSINE
        assert cosine(row["embedding_max"], maximum) >= COSINE
        assert (row["image_id"], row["patient_id"], row["params_hash"], row["run_id"]) == (name, "007", "p", "run")
        assert row["error_code"] is None and row["error_message"] is None
    assert (end["n_tiles"], end["error_code"], end["size_bytes"]) == (len(CORNERS), None, path.stat().st_size)
    work = end["work"]
    assert work["requests"] >= 1 and 0 < work["bytes"] <= 1.2 * end["size_bytes"]
    assert min(work["decoded_s"], work["encoded_s"]) > 0
    assert work["waited_s"] + work["decoded_s"] + work["encoded_s"] < taken, "no second counts twice"


def test_at_a_target_mpp_a_fractional_region_is_brought_to_the_tile(spec: FeatureSpec, small_slides: Path) -> None:
    path = small_slides / "a2.tif"
    pixels = tifffile.imread(path, key=0)
    rows, _ = encode(spec, unit(path, np.array([[0, 0], [3, 716]]), downsample=1.6))
    for row in rows:
        region = Image.fromarray(tile_at(pixels, row, 717))  # 448 x 1.6 = 716.8
        tile = np.asarray(region.resize((TILE_PX, TILE_PX), Image.Resampling.BOX))
        assert np.array_equal(dense(row["color_histogram"]), histogram_by_numpy(tile))


def test_a_coarser_level_is_read_where_the_plan_says_so(spec: FeatureSpec, small_slides: Path) -> None:
    path = small_slides / "a1.tif"
    [row], _ = encode(spec, unit(path, np.array([[40, 80]]), level_read=1, downsample=4.0, tile_px=96))
    level = tifffile.imread(path, key=1)
    expected = histogram_by_numpy(level[20:116, 10:106])
    # two JPEG decoders may differ by a grey level and so move a pixel over the edge of a bin
    assert np.abs(dense(row["color_histogram"]) - expected).sum() <= 0.1 * 96**2
    assert sum(row["color_histogram"]["count"]) == 96**2


MEAN_COLOUR = '''
"""The mean colour of a tile: the whole of another encoder."""

from udfs.wsi.encoder.network import Network, encoder_named


@encoder_named("mean-colour")
class MeanColour(Network):
    def __init__(self, spec, storage_options):
        super().__init__(spec, (("embedding", 3),), weights="none")

    def forward(self, images):
        return (images.mean(dim=(1, 2)),)
'''


@pytest.fixture
def mean_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file more in udfs/wsi/encoder, and nothing else."""
    (tmp_path / "mean_colour.py").write_text(MEAN_COLOUR)
    monkeypatch.setattr(encoder_folder, "__path__", [*encoder_folder.__path__, str(tmp_path)])


@pytest.mark.usefixtures("mean_colour")
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_another_encoder_is_a_file_in_its_folder(small_slides: Path, runtime: Any) -> None:
    path = small_slides / "a2.tif"
    spec = FeatureSpec({ENCODER: EncoderSpec("mean-colour", None, 224, device="cpu", runtime=runtime)}, None, 16)
    rows, _ = encode(spec, unit(path, CORNERS))
    pixels = tifffile.imread(path, key=0)
    assert len(rows) == len(CORNERS)
    for row in rows:
        assert row["embedding"] == pytest.approx(tile_at(pixels, row).mean(axis=(0, 1)), rel=1e-4)
        assert row["embedding_max"] is None


def test_several_encoders_share_a_read_and_give_what_each_gives_alone(
    spec: FeatureSpec, stainnet: Path, small_slides: Path
) -> None:
    """The second unit is for one of the two alone, as if the other had its rows."""
    [small] = spec.encoders.values()
    encoders = {"a": small, "b": replace(small, input_px=64, pooling="pooled", batch_size=2)}
    paths = small_slides / "a1.tif", small_slides / "b1.tif"
    wanted = [{"encoder": name, "params_hash": f"hash of {name}"} for name in encoders]
    units = unit(paths[0], CORNERS, encoders=wanted), unit(paths[1], CORNERS, encoders=wanted[1:])
    together, ends = encode(FeatureSpec(encoders, str(stainnet), 16), *units)
    counts = Counter((row["image_id"], row["encoder"]) for row in together)
    assert counts == {("a1", "a"): 6, ("a1", "b"): 6, ("b1", "b"): 6}
    assert [end["n_tiles"] for end in ends] == [6, 6]
    for name, encoder in encoders.items():
        alone, alone_ends = encode(
            FeatureSpec({ENCODER: encoder}, str(stainnet), 16), *(unit(p, CORNERS) for p in paths)
        )
        found = [row for row in together if row["encoder"] == name]
        assert {row["params_hash"] for row in found} == {f"hash of {name}"}
        expected = [row for row in alone if name == "b" or row["image_id"] == "a1"]
        for row, other in zip(found, expected, strict=True):
            same = ("image_id", "x_px", "y_px", "color_histogram")
            assert [row[column] for column in same] == [other[column] for column in same]
            np.testing.assert_allclose(row["embedding"], other["embedding"], rtol=1e-5, atol=1e-6)
            assert (row["embedding_max"] is None) == (name == "b")
        reads = [[end["work"][count] for count in ("requests", "bytes")] for end in ends]
        assert reads == [[end["work"][count] for count in ("requests", "bytes")] for end in alone_ends]


def test_a_slide_that_openslide_reads_gives_the_rows_of_a_tiff_of_the_same_pixels(
    spec: FeatureSpec, pixels: NDArray[Any], tmp_path: Path
) -> None:
    same = pixels[1408:2944, 768:1792]
    foreign = write_mirax(tmp_path / "a.mrxs", same)
    (tmp_path / "tiff").mkdir()
    tiff = write_slide(tmp_path / "tiff" / "a.tif", same, compression="deflate")
    rows, ends = encode(spec, unit(foreign, CORNERS[:4]), unit(tiff, CORNERS[:4]))
    assert [end["error_code"] for end in ends] == [None, None]
    found = {
        key: [row["color_histogram"] for row in rows if (row["x_px"], row["y_px"]) == key]
        for key in map(tuple, CORNERS[:4].tolist())
    }
    assert all(len(two) == 2 and two[0] == two[1] for two in found.values())

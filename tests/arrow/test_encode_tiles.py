"""The features pass on plain record batches, held against tifffile's pixels, timm, torch's convolutions and NumPy."""

import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

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

import udfs.wsi.encoder as encoder_folder
from tests.slides.damage import BAD_SLIDES
from tests.slides.foreign import write_mirax
from tests.slides.make import write_slide
from udfs import failures
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.schemas import ENCODED
from udfs.wsi import open_slide
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.stain.stain_network import StainNet

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
    row |= {"level_read": 0, "downsample": 1.0, "params_hash": "p", "index": None} | reading
    return row | {"x_px": corners[:, 0].tolist(), "y_px": corners[:, 1].tolist()}


Rows = list[dict[str, Any]]


def encode(spec: FeatureSpec, *units: dict[str, Any]) -> tuple[Rows, Rows]:
    """The UDF's rows of tiles, and its rows on how units went; each batch must have the schema to the letter, for Spark
    checks nothing.
    """
    batches = list(encode_tiles(spec, "run")([pa.RecordBatch.from_pylist(list(units))]))
    assert all(batch.schema.equals(ENCODED) for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    rows: Rows = pa.Table.from_batches(batches).to_pylist()
    tiles = [row for row in rows if row["x_px"] is not None]
    ends = [row for row in rows if row["x_px"] is None]
    assert [end["image_id"] for end in ends] == [unit["image_id"] for unit in units]
    assert all(end["embedding_avg"] is None and end["run_id"] == "run" for end in ends)
    assert sum(end["n_tiles"] for end in ends) == len(tiles)
    return tiles, ends


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
    begun = perf_counter()
    rows, [end] = encode(FeatureSpec(spec.encoder, str(stainnet) if stained else None, 16), unit(path, CORNERS))
    taken = perf_counter() - begun
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
    ("precision", "remedy"), [("fp32", "give other encoder.weights"), ("bf16", "set encoder.precision to fp32")]
)
def test_a_slide_whose_embeddings_are_not_finite_fails_and_the_next_goes_on(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, remedy: str
) -> None:
    """The third tile alone overflows, in the middle of a unit; the unit after it is as ever."""
    spec = replace(spec, encoder=replace(spec.encoder, batch_size=2, precision=precision))
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
    assert [end["error_code"] for end in ends] == ["embedding_not_finite", None]
    message = ends[0]["error_message"]
    assert message == (
        f"{first}: embeddings of 1 of 9 tiles are NaN or infinite in {precision}: {remedy}, then run with --retry-failed"
    )
    good = [row["embedding_max"] for row in rows if row["image_id"] == "b1"]
    assert len(good) == 9 and np.isfinite(good).all()


MEAN_COLOUR = '''
"""The mean colour of a tile: the whole of another encoder."""

from udfs.wsi.encoder.network import Network, encoder_named


@encoder_named("mean-colour")
class MeanColour(Network):
    def __init__(self, spec, storage_options):
        super().__init__(spec, (("avg", 3),), weights="none")

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
    spec = FeatureSpec(EncoderSpec("mean-colour", None, 224, device="cpu", runtime=runtime), None, 16)
    rows, _ = encode(spec, unit(path, CORNERS))
    pixels = tifffile.imread(path, key=0)
    assert len(rows) == len(CORNERS)
    for row in rows:
        assert row["embedding_avg"] == pytest.approx(tile_at(pixels, row).mean(axis=(0, 1)), rel=1e-4)
        assert row["embedding_max"] is None


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
    secret = FeatureSpec(spec.encoder, None, 16, storage_options={"key": "topsecretkey"})
    _, [row] = encode(secret, unit(small_slides / "a1.tif", np.array([[0, 0]])))
    assert row["error_code"] == "internal_error"
    assert "refused ***" in row["error_message"] and "topsecretkey" not in str(row)
    assert "topsecretkey" not in repr(secret)


def test_progress_counts_tiles(spec: FeatureSpec, small_slides: Path) -> None:
    counted: list[int] = []
    batch = pa.RecordBatch.from_pylist([unit(small_slides / "c1.tif", np.array([[0, 0], [448, 0], [896, 0]]))])
    list(encode_tiles(spec, "run", counted.append)([batch]))
    assert sum(counted) == 3


def indexed(path: Path, corners: NDArray[np.int64], **reading: Any) -> dict[str, Any]:
    """The unit with the whole index of its slide."""
    with open_slide(str(path)) as slide:
        assert slide.index is not None
        return unit(path, corners, index=slide.index.to_bytes(), **reading)


def test_with_an_index_no_header_is_read_and_the_rows_are_the_same(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [small_slides / f"{name}.tif" for name in ("a1", "a2", "b1", "d1")]
    units = [indexed(path, CORNERS) for path in paths]
    expected, ends = encode(spec, *(unit(path, CORNERS) for path in paths))
    monkeypatch.setattr("udfs.wsi.reading.slide.read_index", None)  # to call it would be an error
    rows, ends_by_index = encode(spec, *units)
    assert rows == expected
    for end, by_index in zip(ends, ends_by_index, strict=True):
        assert by_index["work"]["bytes"] < end["work"]["bytes"]


def test_an_index_of_another_version_is_passed_over(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = indexed(small_slides / "a1.tif", CORNERS)
    monkeypatch.setattr("udfs.wsi.tiff.index.FORMAT", 99)
    rows, [end] = encode(spec, row)
    assert (len(rows), end["error_code"]) == (len(CORNERS), None)


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


class Watched:
    """Stands in for `open_slide`; logs when tiles of a slide are asked for and when it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.open = 0
        self.most_open = 0
        monkeypatch.setattr("udfs.encode_tiles.open_slide", self._open_slide)

    def _open_slide(self, uri: str, *arguments: Any, **options: Any) -> Any:
        slide: Any = open_slide(uri, *arguments, **options)
        name = Path(uri).stem
        read_tiles, close = slide.read_tiles, slide.close
        self.open += 1
        self.most_open = max(self.most_open, self.open)

        def reading(*of: Any) -> Any:
            self.log.append(f"ask {name}")
            return read_tiles(*of)

        def closing() -> None:
            self.open -= 1
            self.log.append(f"close {name}")
            close()

        slide.read_tiles, slide.close = reading, closing
        return slide


def test_the_next_unit_is_asked_for_before_this_one_is_encoded_and_at_most_two_are_open(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [indexed(small_slides / f"{name}.tif", CORNERS) for name in ("a1", "a2", "b1", "d1")]
    watched = Watched(monkeypatch)
    batches = (pa.RecordBatch.from_pylist([row]) for row in units)  # units come in any number of batches
    for batch in encode_tiles(spec, "run")(batches):
        ended = batch["x_px"][0].as_py() is None
        watched.log.append(f"{'end' if ended else 'tiles'} {batch['image_id'][0].as_py()}")
    seen = list(dict.fromkeys(watched.log))
    assert seen[:7] == ["ask a1", "ask a2", "tiles a1", "end a1", "close a1", "ask b1", "tiles a2"]
    assert seen[-3:] == ["tiles d1", "end d1", "close d1"]
    assert (watched.most_open, watched.open) == (2, 0)


def test_whatever_ends_a_task_closes_what_it_opened(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [indexed(small_slides / f"{name}.tif", CORNERS) for name in ("a1", "a2", "b1")]
    batch = pa.RecordBatch.from_pylist(units)
    watched = Watched(monkeypatch)
    stopped = cast(Generator[pa.RecordBatch, None, None], encode_tiles(spec, "run")([batch]))
    next(stopped)
    assert watched.open == 2
    stopped.close()
    assert watched.open == 0

    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("udfs.wsi.inference.color_histograms", exhausted)
    with pytest.raises(MemoryError):  # Spark tries the task again
        list(encode_tiles(spec, "run")([batch]))
    assert watched.open == 0

"""Every runtime and precision of an encoder beside timm in fp32, on real tiles; batch sizes, shared work, want of memory."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray

from tests.slides.demo import WEIGHTS_NAME
from tests.slides.make import Pixels
from udfs.wsi import host_cache as cache
from udfs.wsi.encoder import Encoder, EncoderSpec, batch_size, encoder, openvino
from udfs.wsi.encoder.encoder_spec import Precision, Runtime
from udfs.wsi.encoder.network import load_network

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDELAKE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def lite0(demo_cohort: Path) -> EncoderSpec:
    return EncoderSpec(LITE0, str(demo_cohort / "weights" / WEIGHTS_NAME), 224, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> Pixels:
    """48 of tissue, its border and glass, uint8 [n, 448, 448, 3]."""
    corners = [(y, x) for y in range(448, 2300, 300) for x in range(300, 1700, 200)][:48]
    return np.stack([pixels[y : y + 448, x : x + 448] for y, x in corners])


def by_timm(spec: EncoderSpec, tiles: Pixels) -> NDArray[Any]:
    """[2, n, dim] by timm, torch and NumPy alone."""
    network = timm.create_model(spec.name, pretrained=False).eval()
    network.load_state_dict(safetensors.torch.load_file(str(spec.weights)), strict=False)
    mean, std = (torch.tensor(network.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    halved = tiles.reshape(-1, 224, 2, 224, 2, 3).mean(axis=(2, 4), dtype=np.float32)
    with torch.inference_mode():
        features = network.forward_features((torch.from_numpy(halved).permute(0, 3, 1, 2) / 255 - mean) / std)
    both: NDArray[Any] = torch.stack([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))]).numpy()
    return both


def random_model(folder: Path, name: str) -> EncoderSpec:
    """A small model with seeded weights."""
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    edge = model.default_cfg["input_size"][-1]
    return EncoderSpec(name, str(folder / "weights.safetensors"), edge, batch_size=4, device="cpu")


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    result: NDArray[Any] = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return result


def neighbours(vectors: NDArray[Any]) -> NDArray[Any]:
    """[n, n]: the rank of each tile among the neighbours of each other one, by cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ranks: NDArray[Any] = (unit @ unit.T).argsort(axis=1).argsort(axis=1)
    return ranks


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's, the mean over the tiles."""
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(neighbours(a), neighbours(b), strict=True)]))


@pytest.mark.parametrize(
    ("runtime", "precision", "least_mean", "least", "most_apart"),
    [
        ("torch", "fp32", 0.99999, 0.99999, 1e-3),
        ("openvino", "fp32", 0.99999, 0.99999, 1e-3),
        ("openvino", "bf16", 0.999, 0.995, 1.0),
        ("torch", "bf16", 0.999, 0.995, 1.0),
    ],
)
def test_embeddings_are_timms(
    lite0: EncoderSpec,
    tiles: Pixels,
    runtime: Runtime,
    precision: Precision,
    least_mean: float,
    least: float,
    most_apart: float,
) -> None:
    expected = by_timm(lite0, tiles)
    found = np.stack(Encoder(replace(lite0, runtime=runtime, precision=precision)).embed(tiles))
    assert found.dtype == np.float32
    cosine = cosines(found, expected)
    apart = np.abs(found - expected).max()
    ranks = [rank_correlation(found[i], expected[i]) for i in (0, 1)]
    print(
        f"{runtime} {precision}: cosine min {cosine.min():.6f} mean {cosine.mean():.6f} apart {apart:.2g} ranks {ranks}"
    )
    assert cosine.mean(axis=1).min() >= least_mean
    assert cosine.min() >= least
    assert apart <= most_apart
    assert min(ranks) >= 0.99


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_openvino_runs_every_kind_of_model(tmp_path: Path, tiles: Pixels, name: str) -> None:
    spec = random_model(tmp_path, name)
    crops = np.ascontiguousarray(tiles[:6, : spec.input_px, : spec.input_px])
    expected = np.stack(Encoder(spec).embed(crops))
    found = np.stack(Encoder(replace(spec, runtime="openvino")).embed(crops))
    assert cosines(found, expected).min() >= 0.99999


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_results_do_not_depend_on_the_batch_size_beyond_rounding(
    lite0: EncoderSpec, tiles: Pixels, runtime: Runtime
) -> None:
    one = np.stack(Encoder(replace(lite0, runtime=runtime, batch_size=1)).embed(tiles[:7]))
    for size in (3, 4, 16):
        found = np.stack(Encoder(replace(lite0, runtime=runtime, batch_size=size)).embed(tiles[:7]))
        np.testing.assert_allclose(found, one, rtol=1e-3, atol=1e-4)


def test_a_short_batch_gives_the_same_bytes_as_a_whole_one_with_openvino(lite0: EncoderSpec, tiles: Pixels) -> None:
    runs = Encoder(replace(lite0, runtime="openvino", precision="bf16"))
    whole = np.stack(runs.embed(tiles[:4]))
    np.testing.assert_array_equal(np.stack(runs.embed(tiles[:3])), whole[:, :3])


@pytest.mark.parametrize("damaged", [".xml", ".bin"])
def test_a_model_is_converted_once_per_host(
    tiles: Pixels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damaged: str
) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    spec = replace(random_model(tmp_path, "test_efficientnet"), runtime="openvino")
    expected = np.stack(Encoder(spec).embed(tiles[:4]))
    files = [path for path in tmp_path.glob("openvino-*") if path.suffix != ".lock"]
    assert sorted(path.suffix for path in files) == [".bin", ".xml"]

    def not_again(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(openvino, "_convert", not_again)
    np.testing.assert_array_equal(np.stack(Encoder(spec).embed(tiles[:4])), expected)
    monkeypatch.undo()
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    [path] = [path for path in files if path.suffix == damaged]
    path.write_bytes(path.read_bytes()[:1000])
    for _ in range(2):  # converted for this process, and then for all
        np.testing.assert_array_equal(np.stack(Encoder(spec).embed(tiles[:4])), expected)
    assert path.stat().st_size > 1000


def test_models_of_one_weight_and_two_names_are_two(tiles: Pixels, tmp_path: Path) -> None:
    """efficientnet_lite0 has the tensors of tf_efficientnet_lite0, but other padding and normalisation."""
    torch.manual_seed(4)
    model = timm.create_model("efficientnet_lite0", pretrained=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for name in ("efficientnet_lite0", LITE0):
        spec = EncoderSpec(name, str(tmp_path / "weights.safetensors"), 224, batch_size=2, device="cpu")
        expected = np.stack(Encoder(spec).embed(tiles[:2]))
        found = np.stack(Encoder(replace(spec, runtime="openvino")).embed(tiles[:2]))
        assert cosines(found, expected).min() >= 0.99999


def test_a_cache_that_cannot_be_used_is_done_without(
    lite0: EncoderSpec, tiles: Pixels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "file"))
    found = Encoder(replace(lite0, runtime="openvino", batch_size=None))
    assert found.batch_size >= 1
    assert np.stack(found.embed(tiles[:2])).shape == (2, 2, 1280)


def costs(
    seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch, sizes: list[int] | None = None
) -> Callable[[int], None]:
    """A run of a batch that takes as long as `seconds` says by size; if it says nothing, memory is out."""
    clock = [0.0]
    monkeypatch.setattr("udfs.wsi.encoder.batch_size.time.perf_counter", lambda: clock[0])

    def run(size: int) -> None:
        if size not in seconds:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if sizes is not None:
            sizes.append(size)
        clock[0] += seconds[size]

    return run


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({4: 0.04, 8: 0.07, 16: 0.139, 32: 0.27}, 8),  # 16 is hardly faster than 8, and so is 32
        ({4: 0.04, 8: 0.07, 16: 0.139, 32: 0.2}, 32),  # 16 is not, but 32 is
        ({4: 0.04, 8: 0.09, 16: 0.18}, 4),
        ({4: 0.04, 8: 0.041, 16: 0.042, 32: 0.043}, 32),
        ({4: 0.04, 8: 0.041}, 8),  # then memory is out
        ({1: 0.01, 2: 0.011}, 2),  # as it is with the first size
    ],
)
def test_a_batch_grows_while_that_pays_and_fits(
    seconds: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    assert batch_size.measured_batch_size(costs(seconds, monkeypatch), 4, 32, "key") == best

    def not_again(size: int) -> None:
        raise AssertionError("measured again")

    assert batch_size.measured_batch_size(not_again, 4, 32, "key") == best
    (tmp_path / "batch-size-key.json").write_text("junk")
    assert batch_size.measured_batch_size(costs(seconds, monkeypatch), 4, 32, "key") == best


def test_a_model_that_takes_long_is_measured_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    for seconds, expected in (({2: 24.0, 4: 40.0}, [2] * 2), ({2: 0.6, 4: 1.1, 8: 1.9}, [2] * 3 + [4] * 2)):
        sizes: list[int] = []
        key = str(len(seconds))
        assert batch_size.measured_batch_size(costs(seconds, monkeypatch, sizes), 2, 32, key) == expected[-1]
        assert sizes == expected


def test_other_errors_than_want_of_memory_are_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))

    def broken(size: int) -> None:
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        batch_size.measured_batch_size(broken, 4, 32, "key")
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_size.measured_batch_size(costs({}, monkeypatch), 4, 32, "key")  # not even one tile fits


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_halves_the_batch_and_loses_no_tile(
    lite0: EncoderSpec, tiles: Pixels, error: Exception
) -> None:
    limited = Encoder(replace(lite0, batch_size=16))
    expected = np.stack(limited.embed(tiles[:11]))
    runtime, sizes = limited.runtime, []

    def small(images: NDArray[np.float32], size: int) -> Any:
        sizes.append(len(images))
        if len(images) > 4:
            raise error
        return runtime(images, size)

    limited.runtime = small  # type: ignore[assignment]
    np.testing.assert_allclose(np.stack(limited.embed(tiles[:11])), expected, rtol=1e-3, atol=1e-4)
    assert sizes == [11, 8, 4, 4, 3]
    assert limited.batch_size == 4
    limited.embed(tiles[:4])
    assert sizes[-1] == 4  # and it stays so

    def none_at_all(images: NDArray[np.float32], size: int) -> Any:
        raise error

    limited.runtime = none_at_all  # type: ignore[assignment]
    with pytest.raises(type(error)):
        limited.embed(tiles[:4])


def _batch_size_of(spec: EncoderSpec, measured: Any) -> None:
    def counted(run: Callable[[int], object], smallest: int, most: int) -> int:
        measured.put(os.getpid())
        return find(run, smallest, most)

    find, batch_size._find = batch_size._find, counted
    Encoder(spec).batch_size  # noqa: B018


def test_processes_that_start_together_measure_once(
    encoder_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    spec = EncoderSpec("test_efficientnet", str(encoder_weights), 96, device="cpu")
    context = multiprocessing.get_context("fork")
    measured = context.Queue()
    processes = [context.Process(target=_batch_size_of, args=(spec, measured)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert measured.get(timeout=5)
    assert measured.empty()
    [kept] = tmp_path.glob("batch-size-*.json")
    assert Encoder(spec).batch_size == json.loads(kept.read_text())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"])
def test_every_kind_of_model_runs_in_bf16(tmp_path: Path, tiles: Pixels, name: str) -> None:
    spec = random_model(tmp_path, name)
    crops = np.ascontiguousarray(tiles[:6, : spec.input_px, : spec.input_px])
    expected = np.stack(Encoder(spec).embed(crops))
    found = np.stack(Encoder(replace(spec, precision="bf16")).embed(crops))
    assert np.abs(found - expected).max() > 0
    assert cosines(found, expected).mean() >= 0.999


def test_what_cannot_run_is_refused(lite0: EncoderSpec) -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        Encoder(replace(lite0, precision="fp16"))
    with pytest.raises(ValueError, match="no GPU that PyTorch can use: set it to auto or cpu"):
        Encoder(replace(lite0, device="cuda"))
    with pytest.raises(ValueError, match="runs on processors"):
        Encoder(replace(lite0, runtime="openvino"), device=torch.device("cuda", 1))


def test_the_network_traces_on_any_device(lite0: EncoderSpec) -> None:
    """On torch's meta device, which holds no numbers: nothing in the network is tied to the processor."""
    network = load_network(lite0).to("meta")
    average, maximum = network(torch.zeros(2, 224, 224, 3, device="meta"))
    assert average.device.type == maximum.device.type == "meta"
    assert average.shape == maximum.shape == (2, 1280)


def test_the_cache_is_a_folder_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLIDELAKE_CACHE")
    monkeypatch.setattr("udfs.wsi.host_cache.tempfile.gettempdir", lambda: str(tmp_path))
    folder = cache.cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("udfs.wsi.host_cache.os.getuid", lambda: folder.stat().st_uid + 1)
    (tmp_path / f"slidelake-cache-{folder.stat().st_uid + 1}").mkdir()
    with pytest.raises(PermissionError, match="another user"):
        cache.cache_folder()
    assert encoder.device_of(EncoderSpec("any", None, 224, device="cpu")).type == "cpu"

"""StainNet equals torch's own convolutions, whatever file its weights came in."""

import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from tests.slides.make import Pixels
from udfs.wsi.quality.colours import rgb
from udfs.wsi.stain.stain_network import StainNet, load_stainnet
from udfs.wsi.weights.checkpoint import CheckpointError, fingerprint, load_state_dict

SHAPES = {
    "rgb_trans.0.weight": (32, 3, 1, 1),
    "rgb_trans.0.bias": (32,),
    "rgb_trans.2.weight": (32, 32, 1, 1),
    "rgb_trans.2.bias": (32,),
    "rgb_trans.4.weight": (3, 32, 1, 1),
    "rgb_trans.4.bias": (3,),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Weights in the published layout, strong enough that outputs reach both ends of 0 to 255."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.35 for name, shape in SHAPES.items()}


def by_hand(tensors: Tensors, pixels: Pixels) -> Pixels:
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    for layer in (0, 2, 4):
        x = functional.conv2d(x, tensors[f"rgb_trans.{layer}.weight"], tensors[f"rgb_trans.{layer}.bias"])
        x = functional.relu(x) if layer < 4 else x
    return ((x * 0.5 + 0.5) * 255).round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def test_every_pixel_is_what_torchs_convolutions_make_of_it(tensors: Tensors, tmp_path: Path, pixels: Pixels) -> None:
    net = load_stainnet(saved(tmp_path / "stainnet.pth", tensors))
    random = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    for tile in (pixels[896:1344, 896:1344], pixels[::7, ::5], random):
        normalised = net.normalise(tile)
        assert normalised.dtype == np.uint8
        np.testing.assert_array_equal(normalised, by_hand(tensors, np.ascontiguousarray(tile)))
    assert (by_hand(tensors, random) == 0).any()
    assert (by_hand(tensors, random) == 255).any()


def test_it_maps_colours_one_by_one(tensors: Tensors, tmp_path: Path) -> None:
    net = load_stainnet(saved(tmp_path / "stainnet.pth", tensors))
    colours = np.random.default_rng(1).integers(0, 256, (150 * 151, 3), np.uint8)
    normalised = net.normalise(colours)
    shuffled = np.random.default_rng(2).permutation(len(colours))
    np.testing.assert_array_equal(net.normalise(colours[shuffled]), normalised[shuffled])
    np.testing.assert_array_equal(net.normalise(colours.reshape(3, 50, 151, 3)), normalised.reshape(3, 50, 151, 3))
    for n in (0, 1, 2, 7, 17, 333):
        np.testing.assert_array_equal(net.normalise(colours[:n]), normalised[:n])


def test_every_colour_becomes_the_same_on_more_threads(tensors: Tensors, tmp_path: Path) -> None:
    """Torch's convolution rounds some hundred of the 2^24 to the number beside, on two threads."""
    net = load_stainnet(saved(tmp_path / "stainnet.pth", tensors))
    every = rgb(0, 2**24)
    normalised = net.normalise(every)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(net.normalise(every), normalised)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["plain", "DataParallel", "state_dict", "model", "both", "safetensors", "legacy"])
def test_weights_load_from_every_usual_file(tensors: Tensors, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights"
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif kind == "legacy":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        contents: dict[str, Any] = {
            "plain": tensors,
            "DataParallel": parallel,
            "state_dict": {"state_dict": tensors, "epoch": 3},
            "model": {"model": tensors, "optimizer": {"lr": 0.1}},
            "both": {"state_dict": parallel},
        }
        torch.save(contents[kind], path)
    net = load_stainnet(str(path))
    assert fingerprint(net.state_dict()) == fingerprint(tensors)


def test_weights_saved_on_a_gpu_load_without_one(tensors: Tensors, tmp_path: Path) -> None:
    """A checkpoint names its device beside each storage: here it says cuda:0, as if it came from a GPU."""
    path = Path(saved(tmp_path / "cuda.pth", tensors))
    legacy = io.BytesIO()
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    # the legacy pickle holds the device as the text "cpu", a length before it
    on_gpu = legacy.getvalue().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert on_gpu != legacy.getvalue()
    path.write_bytes(on_gpu)
    net = load_stainnet(str(path))
    assert fingerprint(net.state_dict()) == fingerprint(tensors)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


def test_weights_load_from_any_fsspec_uri(tensors: Tensors) -> None:
    fsspec.filesystem("memory").pipe("/weights/stainnet.safetensors", safetensors.torch.save(tensors))
    assert load_stainnet("memory://weights/stainnet.safetensors").fingerprint == fingerprint(tensors)


def test_the_fingerprint_tells_weights_apart_and_files_not(tensors: Tensors, tmp_path: Path) -> None:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["rgb_trans.4.bias"][0] += 1e-6
    reordered = dict(reversed(list(tensors.items())))
    assert fingerprint(reordered) == fingerprint(tensors)
    assert fingerprint(changed) != fingerprint(tensors)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rgb_trans.2.weight": torch.zeros(32, 16, 1, 1)}, "rgb_trans.2.weight"),
        ({"rgb_trans.4.bias": None}, "rgb_trans.4.bias"),
        ({"rgb_trans.6.weight": torch.zeros(3)}, "rgb_trans.6.weight"),
    ],
)
def test_weights_of_another_network_are_refused_by_tensor(
    tensors: Tensors, tmp_path: Path, change: dict[str, torch.Tensor | None], named: str
) -> None:
    other = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    path = saved(tmp_path / "other.pth", other)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_stainnet(path)
    assert path in str(caught.value)
    assert "3-32-32-3" in str(caught.value)


class _Dangerous:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code of the checkpoint was run')",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"rgb_trans.0.weight": _Dangerous()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\)"):
        load_stainnet(str(path))


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\)"):
        load_stainnet(saved(tmp_path / "model.pth", StainNet()))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not weights at all, but a note", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", b"PK\x03\x04broken zip"),
        *(
            pickle.dumps([1, 2, 3], 2),
            pickle.dumps({"a": 1}, 2),
            b"\x80\x02",
            bytes(range(256)),
            b"\x08" + b"\0" * 7 + b"{oops!}",
        ),
        b"\xff" * 8 + b"{",
    ],
)
def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_flipped_in_weights_never_raise_anything_else(tensors: Tensors, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, good in {"zip": saved(tmp_path / "zip", tensors), "tensors": None}.items():
        content = Path(good).read_bytes() if good else safetensors.torch.save(tensors)
        for _ in range(60):
            damaged = bytearray(content)
            for place in random.integers(0, 600, 3):
                damaged[place] ^= int(random.integers(1, 256))
            (tmp_path / name).write_bytes(damaged)
            try:
                load_stainnet(str(tmp_path / name))
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at .*gone\.pth"):
        load_stainnet(str(tmp_path / "gone.pth"))
    with pytest.raises(CheckpointError, match=r"is a folder: give the file"):
        load_stainnet(str(tmp_path))

"""Embeddings are timm's own features, held against timm in fp32 by hand; what cannot be used is refused by name."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision.transforms.v2.functional as torchvision_  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tests.slides.demo import WEIGHTS_NAME
from tests.slides.make import Pixels
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.weights.checkpoint import CheckpointError

LITE0 = "tf_efficientnet_lite0"
SMALL = "test_efficientnet"


@pytest.fixture(scope="module")
def spec(demo_cohort: Path) -> EncoderSpec:
    return EncoderSpec(LITE0, str(demo_cohort / "weights" / WEIGHTS_NAME), 224, "area", 4, "cpu")


@pytest.fixture(scope="module")
def encoder(spec: EncoderSpec) -> Encoder:
    return Encoder(spec)


@pytest.fixture(scope="module")
def small(encoder_weights: Path) -> EncoderSpec:
    return EncoderSpec(SMALL, str(encoder_weights), 96, "area", 4, "cpu")


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> Pixels:
    """Tissue, its border and glass: uint8 [7, 448, 448, 3]."""
    corners = [(896, 896), (896, 1344), (1344, 2240), (448, 1344), (0, 0), (900, 1001), (1700, 2400)]
    return np.stack([pixels[y : y + 448, x : x + 448] for x, y in corners])


def by_hand(spec: EncoderSpec, resized: torch.Tensor) -> NDArray[Any]:
    """[2, n, dim]: mean and max over the feature map of timm's whole model, float [n, 3, edge, edge] of 0 to 255 in."""
    model = timm.create_model(spec.name, pretrained=False)
    model.load_state_dict(safetensors.torch.load_file(str(spec.weights)), strict=False)
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        features = model.eval().forward_features((resized / 255 - mean) / std)
    return torch.stack([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))]).numpy()


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    result: NDArray[Any] = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return result


def test_embeddings_are_timms_in_fp32(encoder: Encoder, spec: EncoderSpec, tiles: Pixels) -> None:
    halved = tiles.reshape(-1, 224, 2, 224, 2, 3).mean(axis=(2, 4), dtype=np.float32)
    expected = by_hand(spec, torch.from_numpy(halved).permute(0, 3, 1, 2))
    found = np.stack(encoder.embed(tiles))
    assert found.dtype == np.float32
    assert found.shape == (2, len(tiles), 1280)
    assert encoder.outputs == (("embedding", 1280), ("embedding_max", 1280))
    assert cosines(found, expected).min() >= 0.99999
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_tiles_of_the_models_own_size_are_not_resized(encoder: Encoder, spec: EncoderSpec, tiles: Pixels) -> None:
    crops = tiles[:2, 100:324, 100:324]
    expected = by_hand(spec, torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float())
    assert cosines(np.stack(encoder.embed(crops)), expected).min() >= 0.99999


def test_interpolation_model_is_as_the_model_was_trained(spec: EncoderSpec, tiles: Pixels) -> None:
    """EfficientNet-Lite0 was trained on bicubic images: here by torchvision."""
    x = torch.from_numpy(tiles[:3]).permute(0, 3, 1, 2)
    bicubic = torchvision_.resize(x, [224, 224], torchvision_.InterpolationMode.BICUBIC, antialias=True).float()
    found = np.stack(Encoder(replace(spec, interpolation="model")).embed(tiles[:3]))
    assert cosines(found, by_hand(spec, bicubic)).min() >= 0.99999
    assert cosines(found, np.stack(Encoder(spec).embed(tiles[:3]))).min() < 0.99999


def test_an_embedding_does_not_depend_on_its_batch(small: EncoderSpec, tiles: Pixels) -> None:
    one, four, all_ = (np.stack(Encoder(replace(small, batch_size=n)).embed(tiles)) for n in (1, 4, 64))
    np.testing.assert_allclose(four, one, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(all_, one, rtol=1e-3, atol=1e-4)
    backwards = np.stack(Encoder(small).embed(tiles[::-1]))[:, ::-1]
    np.testing.assert_allclose(backwards, one, rtol=1e-3, atol=1e-4)


def test_the_same_tiles_give_the_same_bytes(small: EncoderSpec, tiles: Pixels) -> None:
    assert np.stack(Encoder(small).embed(tiles)).tobytes() == np.stack(Encoder(small).embed(tiles)).tobytes()


def test_no_tiles_give_no_rows(small: EncoderSpec) -> None:
    average, maximum = Encoder(small).embed(np.zeros((0, 448, 448, 3), np.uint8))
    assert average.shape == maximum.shape == (0, 256)


def test_other_architectures_load_from_a_state_dict_with_their_classifier(tmp_path: Path, tiles: Pixels) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", pretrained=False)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "resnet.pth")
    found = Encoder(EncoderSpec("test_resnet", str(tmp_path / "resnet.pth"), 96, "area", 8, "cpu"))
    x = torch.from_numpy(tiles[:2, :96, :96].copy()).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = model.eval().forward_features((x - mean) / std).mean(dim=(2, 3)).numpy()
    assert cosines(found.embed(tiles[:2, :96, :96])[0], expected).min() >= 0.99999


def test_the_fingerprint_is_of_the_weights(small: EncoderSpec, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(str(small.weights))
    torch.save(weights, tmp_path / "same.pth")
    changed = {k: v + 1 if k.endswith("conv_stem.weight") else v for k, v in weights.items()}
    safetensors.torch.save_file(changed, tmp_path / "other.safetensors")
    own = load_network(small).weights
    assert load_network(replace(small, weights=str(tmp_path / "same.pth"), batch_size=1)).weights == own
    assert load_network(replace(small, weights=str(tmp_path / "other.safetensors"))).weights != own


def test_the_identity_is_of_all_that_shapes_the_vectors_and_of_nothing_else(small: EncoderSpec, tmp_path: Path) -> None:
    shutil.copy(str(small.weights), tmp_path / "same.safetensors")
    own = Encoder(small).identity
    same = replace(small, weights=str(tmp_path / "same.safetensors"), batch_size=2, runtime="openvino")
    assert Encoder(same).identity == own
    others = [{"input_px": 128}, {"interpolation": "model"}, {"pooling": "pooled"}, {"precision": "bf16"}]
    others += [{"precision": "bf16", "runtime": "openvino"}]
    assert len({own, *(load_network(replace(small, **other)).identity for other in others)}) == 1 + len(others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "close"),
    [("efficientnet_b00", "efficientnet_b0"), ("resnt50", "resnet50"), ("effcientnet_b0", "efficientnet_b0")],
)
def test_an_unknown_model_is_told_close_ones(small: EncoderSpec, name: str, close: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is neither a preset nor a timm model: did you mean .*\b{close}\b"):
        Encoder(replace(small, name=name))


def test_a_name_like_no_model_is_refused_without_a_guess(small: EncoderSpec) -> None:
    with pytest.raises(ValueError, match=r"zzzzqqqq is neither a preset nor a timm model$"):
        Encoder(replace(small, name="zzzzqqqq"))


def by_timm(name: str, weights: dict[str, torch.Tensor], tiles: Pixels) -> NDArray[Any]:
    """[n, dim]: timm's own pooled vectors."""
    model = timm.create_model(name, pretrained=False, num_classes=0)
    model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()})
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        vectors: NDArray[Any] = model.eval()(
            (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std
        ).numpy()
    return vectors


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_mambaout", "eva02_tiny_patch14_224"])
def test_a_model_that_gives_one_vector_has_one_output(tmp_path: Path, tiles: Pixels, name: str) -> None:
    torch.manual_seed(2)
    model = timm.create_model(name, pretrained=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    edge = model.default_cfg["input_size"][-1]
    crops = np.ascontiguousarray(tiles[:3, :edge, :edge])
    spec = EncoderSpec(name, str(tmp_path / "weights.safetensors"), edge, batch_size=4, device="cpu", pooling="pooled")
    encoder = Encoder(spec)
    [average] = encoder.embed(crops)
    assert encoder.outputs == (("embedding", average.shape[1]),)
    if name.startswith(
        ("test_vit", "eva02")
    ):  # with averages of its own, not a token: other weights where it does not pool
        np.testing.assert_array_equal(Encoder(replace(spec, pooling="auto")).embed(crops)[0], average)
    assert cosines(average, by_timm(name, model.state_dict(), crops)).min() >= 0.99999


def test_channels_last_feature_maps_are_pooled_over_their_positions(tmp_path: Path, tiles: Pixels) -> None:
    """MambaOut's feature map is [n, h, w, dim], where most models' is [n, dim, h, w]."""
    torch.manual_seed(2)
    model = timm.create_model("test_mambaout", pretrained=False, num_classes=0, global_pool="")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    edge = model.default_cfg["input_size"][-1]
    crops = np.ascontiguousarray(tiles[:3, :edge, :edge])
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        x = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255 - mean) / std
        features = model.eval()(x)
    assert features.shape[1] == features.shape[2] != features.shape[3]
    spec = EncoderSpec("test_mambaout", str(tmp_path / "weights.safetensors"), edge, batch_size=4, device="cpu")
    found = np.stack(Encoder(spec).embed(crops))
    expected = torch.stack([features.mean(dim=(1, 2)), features.amax(dim=(1, 2))]).numpy()
    assert cosines(found, expected).min() >= 0.99999


def test_a_model_without_a_feature_map(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", pretrained=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    edge = model.default_cfg["input_size"][-1]
    spec = EncoderSpec("test_vit", str(tmp_path / "vit.safetensors"), edge, batch_size=4, device="cpu")
    assert [name for name, _ in Encoder(spec).outputs] == ["embedding"]
    with pytest.raises(ValueError, match=r"test_vit yields \[1, \d+, \d+\], not a feature map .*set its pooling"):
        Encoder(replace(spec, pooling="map"))


def test_an_unknown_variant_of_a_model_is_refused_in_one_line(small: EncoderSpec) -> None:
    with pytest.raises(ValueError, match=r"test_efficientnet\.nosuch") as caught:
        Encoder(replace(small, name="test_efficientnet.nosuch"))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused_by_tensor(small: EncoderSpec, spec: EncoderSpec) -> None:
    with pytest.raises(
        CheckpointError, match=r"does not fit test_efficientnet: .*give the checkpoint of that model"
    ) as caught:
        Encoder(replace(small, weights=spec.weights))
    assert str(spec.weights) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [b"\x80\x02}q\x00.junk", b"\x80\x02.", bytes(64)])
def test_junk_in_place_of_weights_is_told_as_such(small: EncoderSpec, tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.pth").write_bytes(junk)
    with pytest.raises(CheckpointError, match=r"junk\.pth .*save model\.state_dict\(\)"):
        Encoder(replace(small, weights=str(tmp_path / "junk.pth")))


@pytest.mark.parametrize(
    ("name", "edge", "told"),
    [
        (
            "vit_tiny_patch16_224",
            96,
            r"96 x 96 px \(Input height \(96\) doesn't match model \(224\)\): set its input_px to 224",
        ),
        ("vit_tiny_patch16_384", 224, r"does not take images of 224 x 224 px .*: set its input_px to 384"),
        ("coatnet_pico_rw_224", 100, r"100 x 100 px .*: set its input_px to 224"),  # by a layer's own error
        ("resnet18", 0, r"0 x 0 px .*: set its input_px to 224"),
    ],
)
def test_a_model_of_another_input_size_is_refused_by_both_sizes_and_the_setting(
    tmp_path: Path, name: str, edge: int, told: str
) -> None:
    safetensors.torch.save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "w.safetensors")
    spec = EncoderSpec(name, str(tmp_path / "w.safetensors"), edge, batch_size=4, device="cpu")
    for pooling in ("auto", "pooled"):
        with pytest.raises(ValueError, match=rf"encoder {name} .*{told}"):
            Encoder(replace(spec, pooling=pooling))

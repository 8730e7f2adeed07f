"""Checkpoints as people have them give the vectors of the plain file, and what does not fit is refused by its tensors."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tests.core.model_cards import CARDS, dinov2, randomised, timm_model
from tests.slides.make import Pixels
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.weights.checkpoint import CheckpointError

State = dict[str, torch.Tensor]
DEEP = (("depth", 2),)


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> Pixels:
    """Tissue: uint8 [2, 160, 160, 3]."""
    return np.stack([pixels[y : y + 160, x : x + 160] for x, y in ((896, 896), (900, 1344))])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(4)
    return randomised(timm.create_model("test_vit", num_classes=0)).eval()


@pytest.fixture
def spec(tmp_path: Path, model: Any) -> EncoderSpec:
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    return EncoderSpec("test_vit", str(tmp_path / "plain.pth"), 160, batch_size=2, device="cpu", pooling="cls")


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "teacher": lambda state: {
        "student": behind("module.backbone.", other(state)),
        "teacher": behind("backbone.", state),
    },
    "module": lambda state: behind("module.", state),
    "encoder": lambda state: behind("encoder.", state),
    "backbone": lambda state: behind("backbone.", state),
    "two prefixes": lambda state: {"state_dict": behind("module.backbone.", state)},
    "lightning": lambda state: {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": behind("model.encoder.", state) | {"model.decoder.weight": torch.ones(2, 2)},
        "optimizer_states": [{"state": {}}],
    },
    "student and teacher": lambda state: {
        "state_dict": behind("student.backbone.", other(state)) | behind("teacher.backbone.", state)
    },
    "classifier of 7 classes": lambda state: state | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)},
    "classifier beside a backbone": lambda state: behind("backbone.", state) | {"fc.weight": torch.ones(7, 64)},
    "heads of a training": lambda state: (
        state | {"dino_head.mlp.0.weight": torch.ones(2, 2), "mask_token": torch.ones(1, 64)}
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_checkpoint_gives_the_vectors_of_the_plain_one(
    tmp_path: Path, model: Any, spec: EncoderSpec, tiles: Pixels, wrap: Callable[[State], Any]
) -> None:
    torch.save(wrap(model.state_dict()), tmp_path / "wrapped.pth")
    wrapped = Encoder(replace(spec, weights=str(tmp_path / "wrapped.pth")))
    np.testing.assert_array_equal(wrapped.embed(tiles)[0], Encoder(spec).embed(tiles)[0])


def test_the_vector_is_made_of_the_tokens_that_the_pooling_says(model: Any, spec: EncoderSpec, tiles: Pixels) -> None:
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.3, 0.1)
    x = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    with torch.inference_mode():
        tokens = model.forward_features(x)
    assert model.num_prefix_tokens == 1
    patches = tokens[:, 1:].mean(dim=1)
    expected = {"cls": tokens[:, 0], "mean": patches, "cls_mean": torch.cat([tokens[:, 0], patches], dim=1)}
    for pooling, vectors in expected.items():
        found = Encoder(replace(spec, pooling=pooling, mean=mean, std=std))  # type: ignore[arg-type]
        [embedding] = found.embed(tiles)
        assert found.outputs == (("embedding", vectors.shape[1]),)
        np.testing.assert_allclose(embedding, vectors.numpy(), rtol=1e-3, atol=1e-4)


def test_the_centre_of_a_resized_tile_is_cropped(spec: EncoderSpec, pixels: Pixels) -> None:
    tile = pixels[None, 896:1088, 896:1088]
    cropped = Encoder(replace(spec, input_px=192, crop_px=160))
    np.testing.assert_array_equal(cropped.embed(tile)[0], Encoder(spec).embed(tile[:, 16:176, 16:176])[0])
    assert cropped.identity != Encoder(spec).identity
    with pytest.raises(ValueError, match=r"encoder test_\w+: crop_px = 192 is larger than input_px = 160"):
        Encoder(replace(spec, crop_px=192))


def test_tokens_are_asked_of_transformers_and_class_tokens_of_those_that_have_one(
    spec: EncoderSpec, encoder_weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"yields \[1, .*\], not tokens \[n, t, dim\]: set its pooling to auto"):
        Encoder(replace(spec, name="test_efficientnet", weights=str(encoder_weights), input_px=96))
    torch.save(timm.create_model("test_vit2", num_classes=0).state_dict(), tmp_path / "registers.pth")
    without = replace(spec, name="test_vit2", weights=str(tmp_path / "registers.pth"), input_px=64)
    with pytest.raises(ValueError, match=r"encoder test_vit2 has no class token: set its pooling to mean, not cls"):
        Encoder(without)


def test_a_timm_model_at_another_size_resamples_its_positions_if_asked(
    model: Any, spec: EncoderSpec, pixels: Pixels
) -> None:
    tile = np.ascontiguousarray(pixels[None, 896:1088, 896:1088])
    fixed = (("dynamic_img_size", False),)
    with pytest.raises(ValueError, match=r"input_px to 160, or its kwargs to \{img_size: 192\}"):
        Encoder(replace(spec, input_px=192, kwargs=fixed))
    dynamic = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = torch.from_numpy(tile).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = dynamic.eval().forward_features((x - 0.5) / 0.5)[:, 0]
    half, sized = (0.5, 0.5, 0.5), (*fixed, ("img_size", 192))
    found = Encoder(replace(spec, input_px=192, kwargs=sized, mean=half, std=half))
    np.testing.assert_allclose(found.embed(tile)[0], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_positions_of_transformers_are_resampled_as_transformers_does(tmp_path: Path, tiles: Pixels) -> None:
    card = replace(CARDS["phikon-v2"], build=dinov2(1024, 16, image_px=448, patch=16))
    model = card.model()
    spec = EncoderSpec("phikon-v2", str(card.save(model, tmp_path)), batch_size=2, device="cpu", kwargs=DEEP)
    np.testing.assert_allclose(Encoder(spec).embed(tiles)[0], card.vectors(model, tiles), rtol=1e-2, atol=1e-3)


def test_the_code_of_dinov2_saves_blocks_in_chunks_below_a_teacher(tmp_path: Path, tiles: Pixels) -> None:
    model = CARDS["gpfm"].model()
    plain, chunked = tmp_path / "plain.pth", tmp_path / "chunked.pth"
    torch.save(model.state_dict(), plain)
    teacher = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): each for name, each in model.state_dict().items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "backbone.mask_token": torch.zeros(1, 1024)}
    torch.save({"teacher": behind("backbone.", teacher) | heads}, chunked)
    spec = EncoderSpec("gpfm", str(plain), batch_size=2, device="cpu", kwargs=DEEP)
    of_chunks = Encoder(replace(spec, weights=str(chunked)))
    np.testing.assert_array_equal(of_chunks.embed(tiles)[0], Encoder(spec).embed(tiles)[0])


def test_weights_of_another_preset_are_refused_by_tensor_and_by_the_presets_that_they_fit(tmp_path: Path) -> None:
    weights = tmp_path / "small.pth"
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), weights)
    with pytest.raises(CheckpointError) as caught:
        Encoder(EncoderSpec("uni", str(weights), device="cpu"))
    text = str(caught.value)
    assert text.startswith(f"{weights} does not fit uni: cls_token is [1, 1, 384], not [1, 1, 1024]; pos_embed is")
    assert re.search(r"; and \d+ more; set its model to kaiko-vits16 or lunit-vits16$", text), text


def test_a_tensor_that_is_missing_or_too_many_is_named(tmp_path: Path, model: Any, spec: EncoderSpec) -> None:
    state = model.state_dict()
    for changed, told in (
        ({name: each for name, each in state.items() if name != "norm.bias"}, "does not fit test_vit: no norm.bias;"),
        (state | {"blocks.0.ls1.gamma": torch.ones(64)}, "test_vit: blocks.0.ls1.gamma is not in the model;"),
    ):
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(CheckpointError, match=re.escape(told)):
            Encoder(replace(spec, weights=str(tmp_path / "changed.pth")))


@pytest.mark.parametrize("name", ["conch", "conch-v1.5", "musk"])
def test_a_preset_that_cannot_be_run_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=rf"encoder {re.escape(name)} cannot be run: it .* Choose another"):
        Encoder(EncoderSpec(name, None, device="cpu"))


def test_layers_are_given_by_name(tmp_path: Path, tiles: Pixels) -> None:
    build = timm_model("test_vit", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
    model = randomised(build())
    torch.save(model.state_dict(), tmp_path / "swiglu.pth")
    kwargs = (("act_layer", "SiLU"), ("depth", 2), ("mlp_layer", "SwiGLUPacked"))
    spec = EncoderSpec("test_vit", str(tmp_path / "swiglu.pth"), 160, batch_size=2, device="cpu", kwargs=kwargs)
    assert Encoder(spec).embed(tiles)[0].shape == (2, 64)
    with pytest.raises(ValueError, match=r"SwiGLUPackt is no layer of timm or PyTorch"):
        Encoder(replace(spec, kwargs=(("mlp_layer", "SwiGLUPackt"),)))
    with pytest.raises(ValueError, match=r"encoder test_vit: .*nonsense"):
        Encoder(replace(spec, kwargs=(("nonsense", 1),)))

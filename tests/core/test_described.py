"""Models that the hub or a folder describes, held against timm, and the weights of presets and timm models from the hub."""

import io
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torchvision.transforms.functional import center_crop, normalize  # type: ignore[import-untyped]

from jobs.runtime.run.run import encoder_spec
from jobs.runtime.settings.config import Config
from tests.core.test_hub import closed_port, use
from tests.slides.make import Pixels
from tests.stores.hub import COMMIT, TOKEN, Hub, serve_hub
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.tile_scale import check_tile_scale
from udfs.wsi.encoder.timm_network import random_network
from udfs.wsi.weights.checkpoint import CheckpointError

MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as timm saves it for the hub: its own build, colours, crop and resampling."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model")
    build = {"img_size": 128, "init_values": 0.1, "reg_tokens": 2}
    model = timm.create_model("test_vit", num_classes=0, **build)
    data = {"mean": MEAN, "std": STD, "crop_pct": 0.5, "interpolation": "bilinear", "input_size": (3, 128, 128)}
    save_for_hf(model, path, model_args=build, model_config={"pretrained_cfg": data}, safe_serialization=True)
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(lab__model={file.name: file.read_bytes() for file in folder.iterdir()}) as server:
        use(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def spec(name: str, **other: Any) -> EncoderSpec:
    return EncoderSpec(name, None, batch_size=2, device="cpu", **other)


def settings(model: str) -> Config:
    return Config.model_validate({"patients": "p.csv", "output": {"root": "t"}, "encoders": {"e": {"model": model}}})


def by_timm(folder: Path, tiles: Pixels) -> torch.Tensor:
    """The vectors of timm's own model and transform, float [n, dim]."""
    from PIL import Image  # noqa: PLC0415

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    data = resolve_model_data_config(model)
    assert data["crop_pct"] == 0.5
    transform = create_transform(**data, is_training=False)
    with torch.inference_mode():
        vectors: torch.Tensor = model(torch.stack([transform(Image.fromarray(tile)) for tile in tiles]))
    return vectors


def test_a_described_model_is_timms_from_the_tile_to_the_vector(folder: Path, hub: Hub, pixels: Pixels) -> None:
    tiles = np.stack([pixels[896:1152, 896:1152], pixels[1344:1600, 1800:2056]])
    expected = by_timm(folder, tiles)
    for name in (f"local-dir:{folder}", "hf-hub:lab/model", f"hf-hub:lab/model@{COMMIT}"):
        encoder = Encoder(spec(name))
        assert (encoder.input_px, encoder.interpolation) == (256, "bilinear")
        [found] = encoder.embed(tiles)
        assert torch.cosine_similarity(torch.from_numpy(found), expected).min() >= 0.99999


@pytest.mark.parametrize("crop_pct", [0.95, 0.98, 0.995, 0.9])
def test_the_centre_lies_where_torchvision_and_timm_have_it(tmp_path: Path, pixels: Pixels, crop_pct: float) -> None:
    """With margins of 11, 4, 1 and 24 px."""
    model = timm.create_model("test_vit", num_classes=0, img_size=224)
    data = {"mean": MEAN, "std": STD, "crop_pct": crop_pct, "interpolation": "bilinear", "input_size": (3, 224, 224)}
    save_for_hf(
        model, tmp_path, model_args={"img_size": 224}, model_config={"pretrained_cfg": data}, safe_serialization=True
    )
    network = load_network(spec(f"local-dir:{tmp_path}"))
    assert network.input_px == math.floor(224 / crop_pct)
    seen = []
    model = network.model
    assert isinstance(model, torch.nn.Module)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tile = np.ascontiguousarray(pixels[896 : 896 + network.input_px, 896 : 896 + network.input_px])
    network(torch.from_numpy(tile)[None].float())
    cropped = center_crop(torch.from_numpy(tile).permute(2, 0, 1), [224, 224])
    expected = normalize(cropped / 255, MEAN, STD)
    torch.testing.assert_close(seen[0][0], expected)


def test_workers_get_the_folder_of_a_model_as_an_absolute_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(folder, home / "models" / "one")
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    absolute = f"local-dir:{home / 'models' / 'one'}"
    for name in ("local-dir:models/one", "local-dir:./models/../models/one", "local-dir:~/models/one", absolute):
        monkeypatch.chdir(home)
        encoder = encoder_spec(settings(name), "e")
        monkeypatch.chdir(elsewhere)
        assert encoder.name == absolute
        assert load_network(encoder).weights == load_network(spec(f"local-dir:{folder}")).weights
    for name in ("uni", "test_vit", "hf-hub:lab/model"):
        assert encoder_spec(settings(name), "e").name == name


def test_a_model_is_the_same_in_another_folder_and_another_if_its_description_is(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    identity = load_network(spec(f"local-dir:{folder}")).identity
    assert load_network(spec(f"local-dir:{moved}")).identity == identity
    described = json.loads((moved / "config.json").read_text())
    described["model_args"] |= {"act_layer": "relu"}
    (moved / "config.json").write_text(json.dumps(described))
    assert load_network(spec(f"local-dir:{moved}")).identity != identity


def test_other_settings_override_the_description(folder: Path) -> None:
    network = load_network(spec(f"local-dir:{folder}", mean=(0.5, 0.5, 0.5), pooling="cls_mean", interpolation="area"))
    assert "mean=(0.5, 0.5, 0.5)" in network.identity
    assert "pooling=cls_mean" in network.identity
    assert network.interpolation == "area"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"{}", "its config.json does not describe a model that slidelake builds"),
        (
            b'{"model_type": "swin"}',
            r"it is of swin of transformers, not of vit, .*: set its model to a preset or a timm model",
        ),
        (b"not json", "its config.json does not describe a model that slidelake builds"),
        (b'{"architecture": "nosuch_net"}', "is neither a preset nor a timm model"),
        (None, "the folder has no config.json"),
    ],
)
def test_a_folder_that_describes_no_model_is_refused(tmp_path: Path, config: bytes | None, reason: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=reason) as caught:
        load_network(spec(f"local-dir:{tmp_path}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("mean", [123.7, 116.3, 103.5], r"must be 0 to 1, and 123\.7 is not: divide by 255"),
        ("mean", [0.5, -0.5, 0.5], r"must be 0 to 1, and -0\.5 is not"),
        ("std", [58.4, 57.1, 57.4], r"must be above 0 and at most 1, and 58\.4 is not: divide by 255"),
        ("std", [0.2, 0.2, 0], r"must be above 0 and at most 1, and 0 is not"),
    ],
)
def test_described_colours_of_another_range_are_refused(
    folder: Path, tmp_path: Path, key: str, value: list[float], reason: str
) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["pretrained_cfg"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=reason):
        load_network(spec(f"local-dir:{tmp_path}"))


def test_a_folder_without_weights_is_refused_by_their_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        load_network(spec(f"local-dir:{tmp_path}"))


def test_the_default_weights_of_a_timm_model_come_from_the_hub(hub: Hub) -> None:
    model = timm.create_model("test_vit2", pretrained=False)
    hub.files[f"timm/{model.pretrained_cfg['hf_hub_id'].partition('/')[2]}"] = {
        "model.safetensors": safetensors.torch.save(model.state_dict())
    }
    network = load_network(spec("test_vit2", input_px=64))
    assert network.weights != "random"
    assert hub.requests["GET model.safetensors"] == 1


def test_weights_of_a_preset_come_from_its_revision(hub: Hub) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    hub.files["MahmoodLab/uni"] = {"pytorch_model.bin": buffer.getvalue()}
    with pytest.raises(CheckpointError, match=r"MahmoodLab/uni.*: the repository has no such revision"):
        load_network(spec("uni"))


@pytest.mark.parametrize("name", ["efficientnet_b0", "kaiko-vits16", "hf-hub:lab/model"])
def test_offline_the_job_ends_in_seconds_with_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for setting, expected in (({"url": closed_port()}, "cannot be reached"), ({}, "HF_HUB_OFFLINE is set")):
        if setting:
            use(monkeypatch, setting["url"])
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        begun = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            load_network(spec(name))
        assert time.monotonic() - begun < 20
        text = str(caught.value)
        assert expected in text
        assert "set its weights" in text
        assert "\n" not in text
        assert TOKEN not in text


def test_random_weights_have_the_form_of_the_encoder() -> None:
    network = random_network(spec("test_vit", input_px=160))
    assert network.weights == "random"
    assert [tuple(each.shape) for each in network(torch.zeros(1, 160, 160, 3))] == [(1, network.dim)]


def test_the_configuration_is_timms(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["model_args"]["reg_tokens"] == 2


def test_the_repositories_of_presets_are_refused_with_the_preset(hub: Hub, folder: Path) -> None:
    own = {"mean": MEAN, "std": STD, "pooling": "cls"}
    for preset in PRESETS.values():
        for repository in (preset.repository, f"{preset.repository}@{COMMIT}", preset.repository.upper()):
            for check in (load_network, lambda one: check_tile_scale(one, 224, 0.5)):
                with pytest.raises(ValueError, match=rf"set its model to {re.escape(preset.name)}, or set its mean"):
                    check(spec(f"hf-hub:{repository}", mean=MEAN, std=STD))
    assert not hub.requests
    hub.files["MahmoodLab/uni"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert (
        load_network(spec("hf-hub:MahmoodLab/uni", **own)).weights == load_network(spec(f"local-dir:{folder}")).weights
    )


def test_a_description_without_a_pooling_of_its_own_is_refused_with_one_that_runs(folder: Path, tmp_path: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["model_args"]["global_pool"] = ""
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError, match=r"yields \[1, \d+, \d+\], not one vector per tile: set its pooling to cls$"):
        load_network(spec(name))
    assert load_network(spec(name, pooling="cls")).dim == load_network(spec(f"local-dir:{folder}")).dim


@pytest.mark.parametrize(
    ("argument", "value", "layer"),
    [
        ("act_layer", "quick_gelu", timm.layers.activations.QuickGELU),
        ("act_layer", "gelu_tanh", timm.layers.activations.GELUTanh),
        ("act_layer", "SiLU", torch.nn.SiLU),
        ("norm_layer", "rmsnorm", timm.layers.RmsNorm),
        ("norm_layer", "LayerNorm", timm.layers.LayerNorm),
    ],
)
def test_layers_are_given_by_the_names_of_timm_and_of_classes(argument: str, value: str, layer: type) -> None:
    network = random_network(spec("test_vit", input_px=160, kwargs=((argument, value),)))
    assert any(type(module) is layer for module in network.modules())


@pytest.mark.parametrize(("argument", "value"), [("act_layer", "nosuch"), ("mlp_layer", "quick_gelu")])
def test_a_name_of_no_layer_is_refused(argument: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{value} is no layer of timm or PyTorch"):
        random_network(spec("test_vit", input_px=160, kwargs=((argument, value),)))


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "kaiko-vits16", "retccl", "ctranspath", "keep", "dinov2-s", "dinov3-s"]
)
def test_to_learn_the_form_of_its_vectors_a_model_calculates_nothing(name: str) -> None:
    depth = (("depth", 1),) if name not in ("test_resnet", "retccl", "ctranspath") else ()
    calculated: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: calculated.append(type(module).__name__) if output.device.type != "meta" else None
    )
    try:
        network = random_network(spec(name, kwargs=depth, input_px=160 if name == "test_vit" else None))
    finally:
        hook.remove()
    assert not calculated
    assert not [each for each in (*network.parameters(), *network.buffers()) if each.device.type == "meta"]
    vectors = network(torch.zeros(1, network.input_px, network.input_px, 3))
    assert [vector.shape[1] for vector in vectors] == [dim for _, dim in network.outputs]


class NeedsNumbers(torch.nn.Module):
    """A layer that does not run without numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.isfinite().all())


def test_a_model_that_does_not_run_without_numbers_is_loaded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "NeedsNumbers", NeedsNumbers, raising=False)
    network = random_network(spec("test_vit", input_px=160, kwargs=(("act_layer", "NeedsNumbers"),)))
    assert network.outputs == random_network(spec("test_vit", input_px=160)).outputs


OF_TIMM = (
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "features_only"),
)


@pytest.mark.parametrize("argument", [*OF_TIMM, "num_classes", "in_chans"])
def test_arguments_of_timm_that_are_not_the_models_are_refused_in_the_settings(folder: Path, argument: str) -> None:
    for name in (f"local-dir:{folder}", "test_vit", "uni"):
        with pytest.raises(ValueError, match=rf"^encoder \S+: its kwargs have {argument}: .*leave this out"):
            load_network(spec(name, kwargs=((argument, 1),)))


@pytest.mark.parametrize(
    ("argument", "value"), [*((name, 1) for name in OF_TIMM), ("checkpoint_path", "/elsewhere"), ("in_chans", 4)]
)
def test_arguments_of_timm_that_are_not_the_models_are_refused_in_a_description(
    folder: Path, tmp_path: Path, argument: str, value: Any
) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["model_args"][argument] = value
    (tmp_path / "config.json").write_text(json.dumps(described))
    reason = "images have 4 channels" if argument == "in_chans" else f"model_args has {argument}: "
    with pytest.raises(ValueError, match=reason):
        load_network(spec(f"local-dir:{tmp_path}"))


def test_a_description_with_classes_is_that_of_the_model_without_them(folder: Path, tmp_path: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["model_args"] |= {"num_classes": 7, "in_chans": 3}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load_network(spec(f"local-dir:{tmp_path}")).outputs == load_network(spec(f"local-dir:{folder}")).outputs

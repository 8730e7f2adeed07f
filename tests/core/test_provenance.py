"""Weights are those of the preset that the settings name, by their SHA-256, also if those of another have the same shapes."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from tests.core.test_hub import use
from tests.stores.hub import Hub, serve_hub
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.provenance import (
    PROVENANCE,
    LicenceError,
    licence_of,
    refuse_non_commercial,
    refuse_weights_of_another_preset,
)
from udfs.wsi.store import PublicUri
from udfs.wsi.weights.checkpoint import Checkpoint, CheckpointError

OWN, OTHER = "kaiko-vits16", "lunit-vits16"  # one architecture
UNKNOWN = "0" * 64


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that fit both presets."""
    torch.manual_seed(5)
    preset = PRESETS[OWN]
    model = timm.create_model(preset.architecture, num_classes=0, **preset.kwargs)
    path = tmp_path_factory.mktemp("published") / preset.file
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture
def hub(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the file where OWN is published."""
    with serve_hub(**{PRESETS[OWN].repository.replace("/", "__", 1): {file.name: file.read_bytes()}}) as server:
        use(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def have_sha256(monkeypatch: pytest.MonkeyPatch, **sha256: str) -> None:
    rows = {name: replace(PRESETS[name], sha256=sha256[name.replace("-", "_")]) for name in (OWN, OTHER)}
    monkeypatch.setattr("udfs.wsi.encoder.provenance.PRESETS", {**PRESETS, **rows})


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_takes_the_file_of_another(name: str, tmp_path: Path) -> None:
    for other in PRESETS.values():
        if other.sha256 is None:
            continue
        given = Checkpoint(PublicUri("w.bin"), {}, tmp_path / "w.bin", "file", other.sha256)
        for is_published in (True, False):
            if other.name == name:
                refuse_weights_of_another_preset(given, name, is_published=is_published)
                continue
            with pytest.raises(
                CheckpointError, match=rf"^w\.bin holds the weights of preset {other.name}, .* is {name}: set"
            ):
                refuse_weights_of_another_preset(given, name, is_published=is_published)


def test_the_file_of_another_preset_of_one_architecture_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_sha256(monkeypatch, kaiko_vits16=UNKNOWN, lunit_vits16=sha256_of(file))
    with pytest.raises(CheckpointError, match=f"holds the weights of preset {OTHER}, .*set its model to {OTHER}, or"):
        load_network(EncoderSpec(OWN, str(file), device="cpu"))
    assert load_network(EncoderSpec(OTHER, str(file), device="cpu")).dim == 384
    monkeypatch.undo()
    assert load_network(EncoderSpec(OWN, str(file), device="cpu")).dim == 384  # weights of a training of one's own


def test_a_download_is_the_file_that_the_preset_was_published_with(
    file: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = EncoderSpec(OWN, None, device="cpu")
    have_sha256(monkeypatch, kaiko_vits16=sha256_of(file), lunit_vits16=UNKNOWN)
    assert load_network(published).dim == 384
    have_sha256(monkeypatch, kaiko_vits16=UNKNOWN, lunit_vits16="1" * 64)
    expected = (
        rf"SHA-256 {sha256_of(file)[:12]}\.\.\., and the weights of preset {OWN} have 0{{12}}\.\.\.: remove /.*/blobs/"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_network(published)
    have_sha256(monkeypatch, kaiko_vits16=UNKNOWN, lunit_vits16=sha256_of(file))
    with pytest.raises(CheckpointError, match=f"holds the weights of preset {OTHER}"):
        load_network(published)


def test_a_file_is_hashed_once_per_host(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "cache"))
    first = load_network(EncoderSpec(OWN, str(file), device="cpu"))
    assert [path.read_text() for path in (tmp_path / "cache").glob("sha256-*[!k]")] == [sha256_of(file)]
    monkeypatch.setattr(hashlib, "file_digest", None)  # to call it would be an error
    assert load_network(EncoderSpec(OWN, str(file), device="cpu")).weights == first.weights


def test_a_licence_that_forbids_commercial_use_is_refused_and_an_unknown_one_named() -> None:
    free = {"licence": "MIT", "licence.commercial": "true", "encoder.model": "uni"}
    forbids = free | {"licence": "CC-BY-NC-ND-4.0", "licence.commercial": "false"}
    with pytest.raises(
        LicenceError, match=r"licence of encoder uni \(CC-BY-NC-ND-4\.0\) forbids commercial use: choose"
    ):
        refuse_non_commercial("uni", [free, forbids])
    assert refuse_non_commercial("uni", [free]) == ""
    assert "the licence of encoder uni is not known" in refuse_non_commercial("uni", [])
    assert "the licence of encoder uni is not known" in refuse_non_commercial("uni", [free, {}])


def test_a_licence_is_that_of_the_preset_or_as_timm_says_of_its_own_weights() -> None:
    for name, preset in PRESETS.items():
        for weights in (None, "mine.pth"):  # weights that began as a preset's are still under its licence
            found = licence_of(EncoderSpec(name, weights))
            assert found == {
                "licence": preset.licence.name,
                "licence.commercial": str(preset.licence.is_commercial).lower(),
            }
    assert licence_of(EncoderSpec("efficientnet_b0", None)) == {"licence": "apache-2.0", "licence.commercial": "true"}
    assert licence_of(EncoderSpec("convnextv2_base", None))["licence.commercial"] == "false"
    assert licence_of(EncoderSpec("vit_large_patch16_dinov3", None)) == {"licence": "dinov3-license"}
    for spec in (EncoderSpec("efficientnet_b0", "mine.pth"), EncoderSpec("hf-hub:lab/model", None)):
        assert licence_of(spec) == {}


def test_a_tag_that_timm_does_not_know_has_no_licence() -> None:
    spec = EncoderSpec("efficientnet_b0.bogus", None, device="cpu")
    assert licence_of(spec) == {}
    with pytest.raises(ValueError, match=r"^encoder efficientnet_b0\.bogus: Invalid pretrained tag"):
        load_network(spec)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("hf-hub:MahmoodLab/UNI", None),
        ("hf-hub:mahmoodlab/uni@main", None),
        ("vit_large_patch16_224", "hf-hub:MahmoodLab/uni"),
        ("vit_large_patch16_224", "hf://mahmoodlab/UNI/pytorch_model.bin"),
        ("dinov2-l", "hf-hub:MahmoodLab/uni"),  # the stricter of two
    ],
)
def test_the_repository_of_a_preset_has_its_licence(model: str, weights: str | None) -> None:
    licence = {"licence": PRESETS["uni"].licence.name, "licence.commercial": "false"}
    assert licence_of(EncoderSpec(model, weights)) == licence


def test_weights_of_a_preset_have_its_licence_whatever_the_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EncoderSpec(PRESETS[OWN].architecture, str(file), kwargs=tuple(PRESETS[OWN].kwargs.items()), device="cpu")
    assert load_network(spec).origin == {"sha256": sha256_of(file)}
    have_sha256(monkeypatch, kaiko_vits16=sha256_of(file), lunit_vits16=UNKNOWN)
    assert load_network(spec).origin == licence_of(EncoderSpec(OWN, None)) | {"sha256": sha256_of(file)}


def test_a_loaded_network_names_the_origin_of_its_weights(file: Path, hub: Hub) -> None:
    own = load_network(EncoderSpec(OWN, str(file), device="cpu")).origin
    assert own == licence_of(EncoderSpec(OWN, None)) | {"sha256": sha256_of(file)}
    published = load_network(EncoderSpec(OWN, None, device="cpu")).origin
    revision = PRESETS[OWN].revision
    assert published == own | ({"revision": revision} if revision else {})
    assert own.keys() | published.keys() | {"revision"} == set(PROVENANCE)

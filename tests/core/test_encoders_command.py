"""The command `slidelake encoders`: the table, one preset with its forward pass, and what it says of an unknown one."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
from huggingface_hub import constants

from jobs import encoders
from tests.core.test_hub import closed_port, use
from tests.stores.hub import serve_hub
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.weights.hub import HubReference, hub_file

SMALL = "kaiko-vits16"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    use(monkeypatch, closed_port())


def test_the_table_has_a_row_per_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert encoders.main([]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "dim", "input", "px", "um/px", "precision", "licence", "gated", "weights"]
    assert [row.split()[0] for row in rows] == [*PRESETS]
    [uni] = [row for row in rows if row.startswith("uni2-h ")]
    assert uni.split() == ["uni2-h", "1536", "224", "0.5", "bf16", "CC-BY-NC-ND-4.0", "gated"]
    assert [row.split()[0] for row in rows if row.endswith("cannot be run")] == ["conch", "conch-v1.5", "musk"]


def test_a_preset_runs_with_random_weights_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert encoders.main([SMALL]) == 0
    told = capsys.readouterr().out
    assert "licence      Kaiko non-commercial; no commercial use; open to everybody" in told
    assert "weights      not here, and not to be downloaded: hf-hub:1aurent/vit_small" in told
    assert "cannot be reached (ConnectError)" in told
    assert "forward pass with random weights: one tile of 224 px to 384 numbers in" in told


def test_a_preset_runs_with_its_weights_if_they_are_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = PRESETS[SMALL]
    model = timm.create_model(preset.architecture, num_classes=0, **preset.kwargs)
    content = {preset.file: safetensors.torch.save(model.state_dict())}
    with serve_hub(**{preset.repository.replace("/", "__", 1): content}) as hub:
        use(monkeypatch, hub.url)
        assert encoders.main([SMALL]) == 0
        assert "weights      not here; the hub gives model.safetensors to this machine" in capsys.readouterr().out
        assert hub.requests["GET model.safetensors"] == 0
        hub_file(HubReference(preset.repository, preset.revision), [preset.file])
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "cache"))
    assert encoders.main([SMALL]) == 0
    told = capsys.readouterr().out
    assert "weights      here: /" in told
    assert "forward pass with its weights: one tile of 224 px to 384 numbers in" in told
    assert (
        sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) < 10_000
    )  # the weights are where they were
    assert encoders.main([]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines() if row.endswith(" here")] == [SMALL]


def test_an_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert encoders.main(["uni2h"]) == 2
    assert "no preset 'uni2h': did you mean uni2-h or" in capsys.readouterr().err
    assert encoders.main(["zzzzqqqq"]) == 2
    assert "`slidelake encoders` prints them" in capsys.readouterr().err


def test_one_that_cannot_be_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert encoders.main(["musk"]) == 2
    assert "musk cannot be run: " in capsys.readouterr().err

"""Weights from the Hugging Face hub: one download per host, its variables honoured, one line if it refuses or is silent."""

import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.stores.hub import COMMIT, TOKEN, Hub, serve_hub
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import WEIGHTS, HubReference, hub_file
from udfs.wsi.weights.sources import open_weights

OPEN, GATED = HubReference("lab/open"), HubReference("lab/gated")
AT_ONCE = """
import os, sys
from udfs.wsi.weights.hub import HubReference, hub_file

children = []
for _ in range(16):
    if not (child := os.fork()):
        os._exit(hub_file(HubReference("lab/open"), ["pytorch_model.bin"]).stat().st_size != int(sys.argv[1]))
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
BY_ENVIRONMENT = """
import sys
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.sources import open_weights

try:
    print(sorted(open_weights(sys.argv[1]).tensors))
except CheckpointError as error:
    print(error)
"""


def saved(**tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process, its cache empty."""
    files = {"pytorch_model.bin": saved(a=torch.ones(2)), "config.json": b"{}"}
    with serve_hub(lab__open=files, lab__gated=files) as server:
        server.gated.add("lab/gated")
        use(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def refusal(reference: HubReference) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub_file(reference, WEIGHTS)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf-hub:MahmoodLab/UNI2-h", HubReference("MahmoodLab/UNI2-h")),
        (f"hf-hub:lab/a.b@{COMMIT}", HubReference("lab/a.b", COMMIT)),
        ("hf://lab/a@v1/sub/w.bin", HubReference("lab/a", "v1", "sub/w.bin")),
        ("s3://bucket/w.bin", None),
        ("/models/w.bin", None),
    ],
)
def test_references_are_told_from_paths(text: str, reference: HubReference | None) -> None:
    assert HubReference.parse(text) == reference
    assert reference is None or str(reference) == text


@pytest.mark.parametrize("text", ["hf-hub:lab", "hf-hub:lab/a/b", f"hf-hub:lab/a@{TOKEN}", "hf://lab/a", "hf-hub:"])
def test_what_only_begins_as_a_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="written hf-hub:OWNER/NAME") as caught:
        HubReference.parse(text)
    assert TOKEN not in str(caught.value)


def test_weights_are_those_of_the_first_file_that_the_repository_has(hub: Hub) -> None:
    for source in ("hf-hub:lab/open", f"hf-hub:lab/open@{COMMIT}", "hf://lab/open/pytorch_model.bin"):
        weights = open_weights(source)
        assert weights.tensors["a"].tolist() == [1, 1]
        assert weights.name == source
    assert hub.requests["GET pytorch_model.bin"] == 1


def test_a_commit_that_is_in_the_cache_needs_no_hub(hub: Hub) -> None:
    hub_file(OPEN, WEIGHTS)
    before = hub.requests.total()
    assert hub_file(HubReference("lab/open", COMMIT), WEIGHTS).is_file()
    assert hub.requests.total() == before


def test_processes_that_start_at_once_download_once(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    hub.files["lab/open"]["pytorch_model.bin"] = content
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", AT_ONCE, str(len(content))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0] * 16
    assert hub.requests["GET pytorch_model.bin"] == 1
    assert list((tmp_path / "home" / "hub").glob("models--lab--open/blobs/*"))


def test_a_gated_repository_names_the_page_and_the_variable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(GATED)
    assert "hf-hub:lab/gated is gated, and HF_TOKEN is not set" in text
    assert "https://huggingface.co/lab/gated, and set HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    assert "the account of HF_TOKEN has no access" in refusal(GATED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub_file(GATED, WEIGHTS).is_file()


def test_what_the_hub_does_not_have_is_named(hub: Hub) -> None:
    assert "has no hf-hub:lab/other, or it is private" in refusal(HubReference("lab/other"))
    assert "no such revision" in refusal(HubReference("lab/open", "v9"))
    hub.files["lab/open"].pop("pytorch_model.bin")
    assert "hf-hub:lab/open has no model.safetensors or pytorch_model.bin or" in refusal(OPEN)


def test_a_hub_out_of_reach_ends_in_seconds(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, closed_port())
    begun = time.monotonic()
    text = refusal(OPEN)
    assert time.monotonic() - begun < 5
    assert "hf-hub:lab/open: the hub at http://127.0.0.1:" in text
    assert "cannot be reached (ConnectError): give this machine a route" in text


def test_a_hub_that_refuses_ends_in_seconds(hub: Hub) -> None:
    hub.status = 503
    begun = time.monotonic()
    assert "answers with HTTP status 503" in refusal(OPEN)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_download_that_the_hub_refuses_at_first_is_tried_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for method in ("HEAD", "GET"):
        hub.turns = {f"{method} pytorch_model.bin": [None] * (method == "HEAD") + [status] * 2}
        file = HubReference("lab/open", COMMIT, "pytorch_model.bin")
        assert hub_file(file, ["pytorch_model.bin"]).is_file()
        assert not hub.turns[f"{method} pytorch_model.bin"]
        shutil.rmtree(constants.HF_HUB_CACHE)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (429, "answers with HTTP status 429: check HF_TOKEN and HF_ENDPOINT, run again later, or"),
        (503, "answers with HTTP status 503: check HF_TOKEN and HF_ENDPOINT, run again later, or"),
        ("ETag", "answers without the headers X-Repo-Commit and ETag: set HF_ENDPOINT to a complete mirror"),
        ("X-Repo-Commit", "answers without the headers X-Repo-Commit and ETag: set HF_ENDPOINT to a complete mirror"),
    ],
)
def test_a_download_that_does_not_begin_is_no_missing_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: int | str, expected: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if isinstance(fault, int):
        hub.turns = {"HEAD pytorch_model.bin": [None] + [fault] * 100}
    else:
        hub.left_out.add(fault)
    assert expected in refusal(OPEN)


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_no_message_shows_the_password_of_a_mirror(hub: Hub, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    for at, status in ((closed_port(), None), (hub.url, 503), (hub.url, 401)):
        hub.status = status
        use(monkeypatch, at.replace("http://", f"{scheme}bob:pass1word@"))
        text = refusal(HubReference("lab/other"))
        assert "the hub at http" in text
        assert "127.0.0.1:" in text
        assert "bob" not in text
        assert "pass1word" not in text


def test_no_signature_or_token_is_logged_while_a_download_is_broken_off(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.signature = "5igned5igned"
    assert hub_file(OPEN, WEIGHTS).read_bytes() == hub.files["lab/open"]["pytorch_model.bin"]
    assert "Error while downloading from http://localhost:" in caplog.text
    for text in (caplog.text, capsys.readouterr().err):
        assert "5igned5igned" not in text
        assert TOKEN not in text
    assert not logging.getLogger("huggingface_hub.file_download").filters


@pytest.mark.parametrize(
    ("reference", "names", "command"),
    [
        (GATED, WEIGHTS, "`hf download lab/gated`"),
        (HubReference("lab/gated", COMMIT), WEIGHTS, f"`hf download lab/gated --revision {COMMIT}`"),
        (HubReference("lab/gated", "v1"), ["w.bin"], "`hf download lab/gated w.bin --revision v1`"),
    ],
)
def test_without_a_route_the_command_brings_the_file_and_revision_that_are_missing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, reference: HubReference, names: Sequence[str], command: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        hub_file(reference, names)
    assert command in str(caught.value)


def test_the_cache_serves_if_the_hub_does_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub_file(OPEN, WEIGHTS)
    hub.status = 503
    assert hub_file(OPEN, WEIGHTS) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = hub.requests.total()
    assert hub_file(OPEN, WEIGHTS) == path
    assert "is not in" in refusal(GATED)
    assert hub.requests.total() == before


def test_a_cache_that_cannot_be_written_has_a_substitute(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "cache"))
    assert (tmp_path / "cache") in hub_file(OPEN, WEIGHTS).parents
    hub.status = 503
    assert hub_file(OPEN, WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_TOKEN": TOKEN}, "['a']"),
        ({}, "hf-hub:lab/gated is gated, and HF_TOKEN is not set"),
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "HF_HUB_OFFLINE is set: run `hf download lab/gated`"),
    ],
)
def test_the_variables_of_the_hub_are_honoured(
    hub: Hub, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    variables = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")} | environment
    command = [sys.executable, "-c", BY_ENVIRONMENT, "hf-hub:lab/gated"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert expected in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN not in "".join(str(path) for path in tmp_path.rglob("*"))

"""Weights lie once on a host: one download for all its processes, mapped by each of them, fingerprinted by the first."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from filelock import FileLock
from torch import nn

from tests.stores.http import serve
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.host_cache import text_once
from udfs.wsi.store import copy_to
from udfs.wsi.weights import checkpoint
from udfs.wsi.weights.checkpoint import (
    CheckpointError,
    fingerprint,
    fingerprint_once,
    load_state_dict,
    open_checkpoint,
)
from udfs.wsi.weights.filling import NoInitialValues, fill
from udfs.wsi.weights.host_file import KEPT_S, on_this_host

N_PROCESSES = 16
AT_ONCE = """
import hashlib, os, sys
from udfs.wsi.weights.host_file import on_this_host

children = []
for _ in range(int(sys.argv[2])):
    if not (child := os.fork()):
        with on_this_host(sys.argv[1]) as path:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        os._exit(digest != sys.argv[3])
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
MEMORY = """
import json, re, sys
from pathlib import Path
import torch
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.encoder.network import load_network

def own_bytes():
    return 1024 * int(re.search(r"Private_Dirty: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])

def load(name, weights, edge):
    return load_network(EncoderSpec(name, weights, edge, device="cpu", pooling="pooled"))

torch.set_num_threads(1)
load("test_vit", sys.argv[2], 160)  # what every process loads, whatever the model
before = own_bytes()
network = load("vit_small_patch16_224", sys.argv[1], 224)
network(torch.zeros(1, 224, 224, 3))
print(json.dumps([own_bytes() - before, network.weights]))
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a host that has nothing yet."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SLIDELAKE_CACHE", str(cache))
    return cache


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.glob("weights-*") if not path.suffix]


def test_processes_that_start_at_once_download_once(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    content = os.urandom(20_000_000)
    (folder / "model.bin").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with serve(folder, latency_s=0.05) as server:
        command = [sys.executable, "-c", AT_ONCE, f"{server.url}/model.bin", str(N_PROCESSES), digest]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        _, sent = server.traffic("model.bin")
    assert json.loads(done.stdout) == [0] * N_PROCESSES
    assert sent == len(content)
    assert [path.stat().st_size for path in copies(own_cache)] == [len(content)]


def test_a_new_version_of_a_remote_file_is_another_copy(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    with serve(folder) as server:
        for value in (1.0, 2.0):
            torch.save({"a": torch.full((4,), value)}, folder / "w.pth")
            os.utime(folder / "w.pth", (value, value))
            assert load_state_dict(f"{server.url}/w.pth")["a"].tolist() == [value] * 4
    assert len(copies(own_cache)) == 2


@pytest.mark.parametrize("way", ["renamed over", "written again"])
def test_files_of_one_size_and_time_give_their_own_numbers(tmp_path: Path, own_cache: Path, way: str) -> None:
    path, new = tmp_path / "w.safetensors", tmp_path / "new.safetensors"
    opened = []
    for value in (1.0, 2.0):
        safetensors.torch.save_file({"a": torch.full((4,), value)}, new)
        os.utime(new, (5, 5))
        if way == "renamed over":
            new.replace(path)
        else:
            path.write_bytes(new.read_bytes())
            os.utime(path, (5, 5))
        opened += [open_checkpoint(str(path)), open_checkpoint(str(path), in_place=True)]
        assert [each.tensors["a"].tolist() for each in opened[-2:]] == [[value] * 4] * 2
    assert len({each.file for each in opened}) == 4
    assert len({fingerprint_once(each.tensors, each.file) for each in opened}) == 2


def test_a_file_replaced_before_it_is_copied_is_refused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("w.pth", 1.0), ("new.pth", 2.0)):
        torch.save({"a": torch.full((4,), value)}, tmp_path / name)

    def replace_and_copy(path: Path, uri: str, storage_options: Any) -> None:
        (tmp_path / "new.pth").replace(uri)
        copy_to(path, uri, storage_options)

    monkeypatch.setattr("udfs.wsi.weights.host_file.copy_to", replace_and_copy)
    with pytest.raises(CheckpointError, match="was replaced while it was read: run again"):
        load_state_dict(str(tmp_path / "w.pth"))
    assert not copies(own_cache)


def test_a_url_that_is_signed_anew_is_the_same_copy(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    torch.save({"a": torch.ones(1000)}, folder / "w.pth")
    with serve(folder) as server:
        for signature in ("one", "two"):
            assert load_state_dict(f"{server.url}/w.pth?sig={signature}")["a"].sum() == 1000
        _, sent = server.traffic("w.pth")
    assert sent == (folder / "w.pth").stat().st_size
    assert len(copies(own_cache)) == 1


def test_a_copy_is_removed_when_nobody_used_it_for_30_days(tmp_path: Path, own_cache: Path) -> None:
    kept: dict[str, Path] = {}
    for name in ("unused", "used", "read", "killed", "in_work", "other"):
        torch.save({"a": torch.ones(3)}, tmp_path / name)
        if name == "other":
            break
        before = set(copies(own_cache))
        load_state_dict(str(tmp_path / name))
        [kept[name]] = set(copies(own_cache)) - before
    kept["killed"].rename(killed := own_cache / f"{kept.pop('killed').name}.unfinished")
    text = own_cache / "fingerprint-x"
    text.touch()
    long_ago = time.time() - KEPT_S - 60
    for path in own_cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    os.utime(kept["used"].with_name(f"{kept['used'].name}.used"))
    load_state_dict(str(tmp_path / "read"))
    with FileLock(f"{kept['in_work']}.lock"):
        load_state_dict(str(tmp_path / "other"))
    assert {name for name, path in kept.items() if path.exists()} == {"used", "read", "in_work"}
    assert not killed.exists()
    assert text.exists()


def test_a_local_file_may_be_overwritten_while_it_is_mapped(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    tensors = load_state_dict(str(path))
    path.write_bytes(b"")
    assert tensors["a"].sum() == 100_000


def test_weights_load_if_the_cache_cannot_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path / "file" / "cache"))
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    assert load_state_dict(str(tmp_path / "w.pth"))["a"].tolist() == [1, 1, 1]
    [record] = caplog.records
    assert "cache of this host cannot be used (Not a directory): this process makes its own copy" in record.getMessage()
    assert "name a folder in SLIDELAKE_CACHE" in record.getMessage()
    with on_this_host(str(tmp_path / "w.pth")) as path:
        assert path.is_file()
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "full"),
            r"^no room for a copy of .*w\.pth in .*cache: free some, or .* SLIDELAKE_CACHE$",
        ),
        (
            OSError(errno.EDQUOT, "full"),
            r"^no room for a copy of .*w\.pth in .*cache: free some, or .* SLIDELAKE_CACHE$",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), r"cannot be read \(ConnectionResetError: .*reset\)$"),
        (PermissionError(errno.EACCES, "denied"), r"cannot be read \(PermissionError: .*denied\)$"),
        (FileNotFoundError(errno.ENOENT, "gone"), r"^no weights at .*w\.pth: check the path$"),
    ],
    ids=["ENOSPC", "EDQUOT", "reset", "denied", "gone"],
)
def test_a_full_disk_and_a_store_that_fails_are_reported_at_once(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, expected: str
) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    calls = []

    def fail(path: Path, *_: Any) -> None:
        calls.append(path)
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("udfs.wsi.weights.host_file.copy_to", fail)
    with pytest.raises(CheckpointError, match=expected):
        load_state_dict(str(tmp_path / "w.pth"))
    assert len(calls) == 1
    assert not calls[0].exists()


def test_what_a_process_writes_into_its_weights_is_its_own(tmp_path: Path, own_cache: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(8)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(8)}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        load_state_dict(str(tmp_path / name))["a"].zero_()
        assert load_state_dict(str(tmp_path / name))["a"].sum() == 8


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_worker_holds_no_copy_of_the_weights(tmp_path: Path, own_cache: Path, suffix: str) -> None:
    """ViT-S has 88 MB of weights."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    path = tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    size = path.stat().st_size
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "small.pth")
    command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "small.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    own, hashed = json.loads(done.stdout)
    assert own < 0.5 * size
    assert hashed == fingerprint(model.state_dict())


def test_the_fingerprint_is_calculated_once_per_host(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.pth")
    spec = EncoderSpec("test_vit", str(tmp_path / "w.pth"), 160, device="cpu")
    first = load_network(spec).weights
    monkeypatch.setattr(checkpoint, "fingerprint", None)  # to call it would be an error
    monkeypatch.setattr(checkpoint, "refuse_not_finite", None)
    assert load_network(spec).weights == first


def test_a_text_that_the_full_disk_does_not_keep_is_made_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    made = iter(["first", "second"])
    monkeypatch.setattr(Path, "write_text", fail)
    assert text_once("name", lambda: next(made)) == "first"


@pytest.mark.parametrize("changed", ["TENSORS_VERSION", "version", "torch.__version__"])
def test_a_fingerprint_made_by_other_code_is_calculated_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    made, made_otherwise = {"a": torch.ones(3)}, {"a": torch.zeros(3)}
    first = fingerprint_once(made, "file")
    assert fingerprint_once(made_otherwise, "file") == first
    monkeypatch.setattr(f"udfs.wsi.weights.checkpoint.{changed}", (lambda _: "0") if changed == "version" else "0")
    assert fingerprint_once(made_otherwise, "file") == fingerprint(made_otherwise) != first


def test_a_file_that_is_not_finite_is_refused_every_time(tmp_path: Path, own_cache: Path) -> None:
    torch.save({"a": torch.full((3,), torch.nan)}, tmp_path / "w.pth")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="3 of 3 numbers of tensor a are NaN"):
            open_checkpoint(str(tmp_path / "w.pth"))


def test_a_model_is_filled_without_initial_values_and_with_its_own_type() -> None:
    with NoInitialValues():
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert model.state_dict()["1.running_var"].tolist() == [1, 1]
    tensors = {name: torch.ones(each.shape, dtype=each.dtype) for name, each in model.state_dict().items()}
    fill(model, tensors | {"0.weight": torch.ones(2, 3, dtype=torch.float16)})
    assert model.state_dict()["0.weight"].dtype == torch.float32
    assert model.state_dict()["0.bias"].data_ptr() == tensors["0.bias"].data_ptr()
    with pytest.raises(RuntimeError, match="size mismatch"):
        fill(model, tensors | {"0.weight": torch.ones(3, 3)})

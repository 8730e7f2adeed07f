"""Files given for weights: those with NaN or infinity are refused by tensor, and what is no weights is told for what it is."""

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from udfs.wsi.stain.stain_network import StainNet, load_stainnet
from udfs.wsi.weights.checkpoint import CheckpointError, load_state_dict

GOOD = {
    "first.weight": torch.ones(2, 3),
    "norm.running_var": torch.ones(4),
    "norm.num_batches_tracked": torch.tensor(7),
}


def refused(path: Path, content: bytes) -> str:
    """The one line of the refusal, behind the name of the file."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(str(path))
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and "\x1b" not in text
    return text.removeprefix(str(path))


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("tensor", ["first.weight", "norm.running_var"])
def test_numbers_that_are_not_finite_are_refused_by_tensor_and_count(
    tmp_path: Path, tensor: str, dtype: torch.dtype, value: float
) -> None:
    bad = {name: each.clone() for name, each in GOOD.items()}
    bad[tensor].view(-1)[:2] = value
    bad = {name: each.to(dtype) if each.is_floating_point() else each for name, each in bad.items()}
    told = f": 2 of {bad[tensor].numel()} numbers of tensor {tensor} are NaN or infinite"
    for content in (saved(bad), saved({"state_dict": bad}), safetensors.torch.save(bad)):
        assert refused(tmp_path / "w", content).startswith(told)


def test_a_number_that_overflows_in_the_model_is_none_either(tmp_path: Path) -> None:
    huge = GOOD | {"first.weight": torch.full((2, 3), 1e300, dtype=torch.float64)}
    assert "6 of 6 numbers of tensor first.weight" in refused(tmp_path / "w", saved(huge))
    large = GOOD | {"first.weight": torch.full((2, 3), 3e38)}
    (tmp_path / "large").write_bytes(saved(large))
    assert load_state_dict(str(tmp_path / "large")).keys() == GOOD.keys()


def test_a_stainnet_with_nan_is_refused(tmp_path: Path) -> None:
    net = StainNet().state_dict()
    net["rgb_trans.2.bias"][5] = math.nan
    torch.save(net, tmp_path / "stainnet.pth")
    with pytest.raises(CheckpointError, match=r"1 of 32 numbers of tensor rgb_trans\.2\.bias"):
        load_stainnet(str(tmp_path / "stainnet.pth"))


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21355344\n"
_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "m-1-of-2", "b": "m-2-of-2", "c": "m-1-of-2"}}
_TENSORS, _PICKLE = safetensors.torch.save(GOOD), saved(GOOD)
_HEADER = int.from_bytes(_TENSORS[:8], "little")


@pytest.mark.parametrize(
    ("content", "told"),
    {
        "empty": (b"", "has 0 bytes: download it again"),
        "git lfs": (_LFS, "is a Git LFS pointer to a file of 21,355,344 bytes, not the file: run git lfs pull"),
        "git lfs, crlf": (_LFS.replace(b"\n", b"\r\n"), "is a Git LFS pointer"),
        "html": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is an HTML page: download it again by the link"),
        "html without doctype": (b"\xef\xbb\xbf<HTML lang=de><p>\xc3\x9cber uns", "is an HTML page"),
        "xhtml": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">', "is an HTML page"),
        "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML text, such as a store's"),
        "json": (b'{"architectures": ["ViT"]}', "is a JSON text, such as a model's config"),
        "json, 9th byte a brace": (b'[      \n{"a": 1}]', "is a JSON text"),
        "json, broken": (b'{"a": ', "is a JSON text"),
        "index": (json.dumps(_INDEX, indent=2).encode(), "is the index of weights in 2 files: load them together"),
        "text": (
            b"not weights at all, but a note\nof two lines",
            "text file that begins with 'not weights at all, but a note'",
        ),
        "text, utf-16": (
            "URL=https://hub/weights".encode("utf-16"),
            "is a text file that begins with 'URL=https://hub/weights'",
        ),
        "text of escapes": (b"\x1b[31mred\x1b[0m", r"is a text file that begins with '\x1b[31mred"),
        "text, long, cut in a letter": (b"x" + "\u00e4".encode() * 4000, "is a text file that begins with 'x\u00e4"),
        "blanks": (b" \n\n", "is a text file: give"),
        "zip": (
            zipped("weights/model.safetensors", "weights/README"),
            "is a zip archive of 2 files, such as 'weights/model",
        ),
        "torchscript": (zipped("m/data.pkl", "m/code/__torch__.py"), "is a TorchScript program"),
        "gzip": (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive: unpack it"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file, as Keras writes"),
        "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "is a NumPy array"),
        "truncated safetensors": (
            _TENSORS[:-9],
            f"has {len(_TENSORS) - 9} bytes where its header counts on {len(_TENSORS)}",
        ),
        "truncated in its header": (_TENSORS[:40], f"has 40 bytes where its header counts on {8 + _HEADER}"),
        "truncated torch": (_PICKLE[:-1000], f"has {len(_PICKLE) - 1000:,} bytes and was cut off"),
        "pickle of a list": (saved([1, 2]), "holds no state dict: save model.state_dict()"),
        "whole module": (saved(StainNet()), "(Weights only load failed): save model.state_dict()"),
    }.values(),
)
def test_what_is_no_weights_is_told_for_what_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in refused(tmp_path / "w", content)


def test_good_files_stay_good(tmp_path: Path) -> None:
    for content in (_TENSORS, _PICKLE):
        (tmp_path / "w").write_bytes(content)
        assert load_state_dict(str(tmp_path / "w")).keys() == GOOD.keys()
    torch.save(GOOD, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert load_state_dict(str(tmp_path / "old")).keys() == GOOD.keys()

"""Weights from a URI: safetensors or a PyTorch state dict, never a pickle that runs code.

The tensors are mapped into memory from a file of this host, so that all its processes share one copy.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch

from udfs.wsi.host_cache import key_of, text_once
from udfs.wsi.store import PublicUri, StorageOptions, public_uri, redact, secrets_of
from udfs.wsi.weights.host_file import HostFileError, on_this_host
from udfs.wsi.weights.not_weights import begins_as_safetensors, reason_of

StateDict = dict[str, torch.Tensor]

TENSORS_VERSION = 1  # raise it when the tensors that are made of a file change (`udfs.wsi.encoder.checkpoint_layouts`)


class CheckpointError(Exception):
    """Weights that cannot be used; the message names the URI and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file."""

    name: PublicUri
    tensors: StateDict  # mapped from the file: a write to one of them changes a copy of this process
    path: Path  # of the file; a temporary one is not there any more
    file: str  # names the file's present content on this host
    sha256: str | None = None  # of the file, if it was asked for


def load_state_dict(uri: str, storage_options: StorageOptions | None = None) -> StateDict:
    """The tensors of `open_checkpoint`."""
    return open_checkpoint(uri, storage_options).tensors


def open_checkpoint(
    uri: str, storage_options: StorageOptions | None = None, *, in_place: bool = False, hashed: bool = False
) -> Checkpoint:
    """Tensors by name, on the CPU whatever device they were saved from.

    Training frameworks wrap what they save: a dict under ``state_dict``, ``model`` or ``teacher`` and the ``module.`` of
    DataParallel are taken off.

    Args:
        uri: of the file.
        storage_options: of its store.
        in_place: whether `uri` is a path that is mapped without a copy: nobody changes the file.
        hashed: whether `Checkpoint.sha256` is wanted.

    Raises:
        CheckpointError: the file is missing, or is neither kind, or holds more than tensors, or numbers that are not finite.
    """
    name = public_uri(uri)
    try:
        with nullcontext(Path(uri)) if in_place else on_this_host(uri, storage_options) as path:
            return map_checkpoint(path, name, hashed=hashed)
    except CheckpointError:
        raise
    except HostFileError as error:
        raise CheckpointError(str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {name}: check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{name} is a folder: give the file of weights in it") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, storage_options))
        raise CheckpointError(f"weights at {name} cannot be read ({text})") from None


def map_checkpoint(path: Path, name: PublicUri, *, hashed: bool = False) -> Checkpoint:
    """As `open_checkpoint`, of a file that nobody changes. `name`: of the file in messages."""
    with path.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        is_safetensors = begins_as_safetensors(opened)
        if reason := reason_of(opened):
            raise CheckpointError(f"{name} {reason}")
    try:
        if is_safetensors:
            loaded: object = safetensors.torch.load_file(path)
        else:  # the layout of old versions of torch cannot be mapped
            mmap = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # both raise what they like on junk: IndexError, AssertionError, struct.error, ...
        reason = first_sentence(error)
        raise CheckpointError(
            f"{name} is neither safetensors nor a state dict of plain tensors ({reason}): save model.state_dict()"
        ) from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{name} holds no state dict: save model.state_dict()")
    tensors = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    file = key_of(str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def checked() -> str:
        refuse_not_finite(tensors, name)
        return "finite"

    text_once(f"checked-{file}", checked)
    sha256 = text_once(f"sha256-{file}", lambda: _sha256_of(path)) if hashed else None
    return Checkpoint(name, tensors, path, file, sha256)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_not_finite(tensors: Mapping[str, torch.Tensor], name: PublicUri) -> None:
    """Raise CheckpointError if a number of the weights is NaN or infinite as float32. `name`: of the file."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            as_used = tensor if tensor.is_complex() else tensor.float()
            bad = tensor.numel() - int(torch.isfinite(as_used).sum())
            if bad:
                raise CheckpointError(
                    f"{name}: {bad:,} of {tensor.numel():,} numbers of tensor {key} are NaN or infinite: give weights of a "
                    "training that did not diverge, or download them again"
                )


def first_sentence(error: Exception) -> str:
    """Return why a file does not load, without the advice and the colours that torch adds to it."""
    return next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0].rstrip(".")


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, shapes and values; equal for equal weights whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_once(tensors: Mapping[str, torch.Tensor], file: str) -> str:
    """The fingerprint of tensors that all come from one file of `Checkpoint`, calculated once per host."""
    kinds = [(name, str(each.dtype), tuple(each.shape)) for name, each in sorted(tensors.items())]
    made_by = (
        TENSORS_VERSION,
        version("timm"),
        torch.__version__,
    )  # other code may make other numbers of the same file
    return text_once(f"fingerprint-{key_of(file, kinds, made_by)}", lambda: fingerprint(tensors))

"""Weights from a URI: safetensors or a PyTorch state dict, never a pickle that runs code."""

import hashlib
import io
from collections.abc import Mapping

import safetensors.torch
import torch

from udfs.wsi.store import PublicUri, StorageOptions, public_uri, read_bytes, redact, secrets_of
from udfs.wsi.weights.not_weights import reason_of

StateDict = dict[str, torch.Tensor]


class CheckpointError(Exception):
    """Weights that can't be used; the message names the URI and the remedy."""


def load_state_dict(uri: str, storage_options: StorageOptions | None = None) -> StateDict:
    """Tensors by name, on the CPU whatever device they were saved from.

    Training frameworks wrap what they save: a dict under ``state_dict`` or ``model`` and the ``module.`` of DataParallel
    are taken off.

    Raises:
        CheckpointError: the file is missing, or is neither kind, or holds more than tensors, or numbers that are not finite.
    """
    name = public_uri(uri)
    try:
        data = read_bytes(uri, storage_options)
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {name}: check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{name} is a folder: give the file of weights in it") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, storage_options))
        raise CheckpointError(f"weights at {name} can't be read ({text})") from None
    if reason := reason_of(data):
        raise CheckpointError(f"{name} {reason}")
    try:
        if data[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
            loaded: object = safetensors.torch.load(data)
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # both raise what they like on junk: IndexError, AssertionError, struct.error, ...
        reason = first_sentence(error)
        raise CheckpointError(
            f"{name} is neither safetensors nor a state dict of plain tensors ({reason}): save model.state_dict()"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{name} holds no state dict: save model.state_dict()")
    tensors = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    refuse_not_finite(tensors, name)
    return tensors


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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

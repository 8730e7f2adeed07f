"""The state of a training run between two epochs, in one file that is whole or not there.

No state of a random number generator is in it: everything random is a function of seed, epoch and rank (see
`jobs.training.model.fit`), so what follows a checkpoint is the same whether the process went on or was killed and begun again.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import torch

from jobs.training.model.files import ModelError
from udfs.wsi.store import StorageOptions, filesystem, public_uri, read_bytes, write_bytes
from udfs.wsi.weights.checkpoint import CheckpointError, StateDict, first_sentence, refuse_not_finite
from udfs.wsi.weights.not_weights import reason_of

CHECKPOINT = "checkpoint.pt"


@dataclass
class TrainingState:
    """Where a run is.

    Attributes:
        card: the model card as plain values, without results.
        model: weights now.
        optimizer: of the optimizer, {} before the first epoch.
        epoch: the next one.
        best_epoch: with the lowest loss on validation so far, None before the first.
        best_loss: that loss.
        best_model: the weights then.
        history: figures of the epochs that are done.
    """

    card: dict[str, Any]
    model: StateDict
    optimizer: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    best_epoch: int | None = None
    best_loss: float = float("inf")
    best_model: StateDict = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(folder: str, state: TrainingState, storage_options: StorageOptions | None = None) -> None:
    """Write the state in place of the one before."""
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    write_bytes(f"{folder.rstrip('/')}/{CHECKPOINT}", buffer.getvalue(), storage_options)


def has_checkpoint(folder: str, storage_options: StorageOptions | None = None) -> bool:
    """Whether a run left one there."""
    fs, path = filesystem(folder, storage_options)
    return bool(fs.exists(f"{path.rstrip('/')}/{CHECKPOINT}"))


def load_checkpoint(folder: str, storage_options: StorageOptions | None = None) -> TrainingState:
    """The state that was last written, on the CPU.

    Raises:
        ModelError: there is none, it can't be read, or numbers of its weights are not finite.
    """
    uri = f"{folder.rstrip('/')}/{CHECKPOINT}"
    name = public_uri(uri)
    try:
        data = read_bytes(uri, storage_options)
    except FileNotFoundError:
        raise ModelError(
            f"no {CHECKPOINT} in {public_uri(folder)}: a run that is finished has none, nor has one that ended before its first "
            "epoch did"
        ) from None
    if what := reason_of(data):
        raise ModelError(f"{name} {what}")
    try:
        state = TrainingState(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:
        raise ModelError(f"{name} is no checkpoint of this version of slidelake ({first_sentence(error)})") from None
    try:
        refuse_not_finite(state.model, name)
        refuse_not_finite(state.best_model, name)
        for number, moments in state.optimizer.get("state", {}).items():
            refuse_not_finite({f"optimizer.{number}.{key}": value for key, value in moments.items()}, name)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    return state

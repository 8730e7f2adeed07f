"""The folder of a training run: model.safetensors and model.json of a trained model; checkpoint.pt while it trains.

A checkpoint has no state of a random number generator: everything random is a function of seed, epoch and rank (see
`jobs.training.model.fit`), so a run goes on from it as if it had not been stopped.
"""

import io
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import safetensors.torch
import torch

from jobs.training.model.mil import BagModel, ModelSpec, build_model
from udfs.wording import package_versions
from udfs.wsi.store import StorageOptions, filesystem, public_uri, read_bytes, redact, secrets_of, write_bytes
from udfs.wsi.weights.checkpoint import (
    CheckpointError,
    StateDict,
    fingerprint,
    first_sentence,
    load_state_dict,
    refuse_not_finite,
)
from udfs.wsi.weights.not_weights import reason_of

WEIGHTS, CARD, CHECKPOINT = "model.safetensors", "model.json", "checkpoint.pt"
_FORMAT = 2  # of model.json; raise it when a reader of the old one would misread the new
_NOT_A_CARD = (ValueError, KeyError, TypeError, AttributeError)
_PACKAGES = ("slidelake", "torch", "scikit-learn", "numpy", "pyarrow", "petastorm", "deltalake")


class ModelError(Exception):
    """A model that cannot be used; the message names its folder and the remedy."""


@dataclass(frozen=True)
class SplitCard:
    """Who was in a split: enough to tell whether a table still has the same patients."""

    n: int
    n_by_class: dict[str, int]
    patients_hash: str  # of patient_id, label and params_hash of each, see `jobs.training.labelled`


@dataclass(frozen=True)
class ModelCard:
    """The content of model.json."""

    model_id: str  # the run that trained it (run_id)
    spec: ModelSpec  # kind and sizes; class k is ``spec.classes[k]``
    columns: tuple[str, ...]  # of table patients that make up a row of a bag, side by side
    prior: tuple[float, ...]  # share of each class among the patients trained on, in the order of the classes
    table_uri: str  # of table patients, without secrets
    table_version: int  # the Delta version trained on
    encoder: str  # whose bags of that table, by its name there
    # Settings, hashes of weights, code versions and licence of the patients' features, from table runs: one, unless runs with
    # different settings made them; none if table runs has none.
    feature_settings: tuple[dict[str, Any], ...]
    splits: dict[str, SplitCard]  # train, validation and test
    seed: int  # of everything random
    training: dict[str, Any]  # settings of section training
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # that shaped the features, by section, as job predict takes them
    device: str = "cpu"  # or cuda and, once trained, the kind of GPU of the first process
    processes: int = 1  # that trained together
    threads: int = 1  # of torch on the CPU, per process; another number adds up floats in another order
    splits_version: int | None = None  # of table splits, if a fold is validated on
    versions: dict[str, str] = field(default_factory=dict)  # of packages
    history: tuple[dict[str, float], ...] = ()  # per epoch: epoch, train_loss, and the figures on validation
    best_epoch: int | None = None  # whose weights these are
    weights_hash: str = ""  # of the weights beside the card, filled in by `save_model`

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels: class k is ``classes[k]``."""
        return self.spec.classes

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        # JSON has no NaN, the figure of a missing class.
        history = [{name: v if math.isfinite(v) else None for name, v in epoch.items()} for epoch in self.history]
        return asdict(self) | {"format": _FORMAT, "classes": list(self.classes), "history": history}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelCard":
        """Returns the card of `to_json`.

        Raises:
            ValueError: a later version of slidelake wrote it.
        """
        if values.get("format") != _FORMAT:
            raise ValueError(f"format {values.get('format')!r}, this version of slidelake reads {_FORMAT}")
        plain = {key: value for key, value in values.items() if key not in ("format", "classes")}
        tuples = {name: tuple(plain["spec"][name]) for name in ("classes", "centers")}
        plain["spec"] = ModelSpec(**plain["spec"] | tuples)
        plain["splits"] = {name: SplitCard(**split) for name, split in plain["splits"].items()}
        for name in ("columns", "prior", "feature_settings"):
            plain[name] = tuple(plain[name])
        history = plain["history"]
        plain["history"] = tuple({name: math.nan if v is None else v for name, v in epoch.items()} for epoch in history)
        return cls(**plain)


def model_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a model."""
    return package_versions(_PACKAGES)


def save_model(
    folder: str, model: BagModel, card: ModelCard, storage_options: StorageOptions | None = None
) -> ModelCard:
    """Writes a model to a folder, any fsspec URI. model.json comes last: a folder that has one is whole.

    Returns:
        The card as written, with the hash of the weights.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    card = replace(card, weights_hash=fingerprint(state), spec=model.spec)
    write_bytes(_file(folder, WEIGHTS), safetensors.torch.save(state), storage_options)
    write_bytes(_file(folder, CARD), json.dumps(card.to_json(), indent=2).encode(), storage_options)
    return card


def load_card(folder: str, storage_options: StorageOptions | None = None) -> ModelCard:
    """Returns model.json of a folder.

    Raises:
        ModelError: the file is missing, or cannot be read.
    """
    uri = public_uri(_file(folder, CARD))
    data = _read(folder, CARD, "give the folder of a finished training run, MODELS/RUN_ID", storage_options)
    if not data.lstrip().startswith(b"{") and (reason := reason_of(io.BytesIO(data))):
        raise ModelError(f"{uri} {reason}")
    try:
        return ModelCard.from_json(json.loads(data))
    except _NOT_A_CARD as error:
        raise ModelError(f"{uri} is not a model of this version of slidelake ({error})") from None


def load_model(
    folder: str, storage_options: StorageOptions | None = None, device: str = "cpu"
) -> tuple[BagModel, ModelCard]:
    """Returns a model as `save_model` wrote it, in evaluation mode, and its card.

    Raises:
        ModelError: a file is missing or damaged, or weights and card are not of one model.
    """
    card = load_card(folder, storage_options)
    try:
        state = load_state_dict(_file(folder, WEIGHTS), storage_options)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    if fingerprint(state) != card.weights_hash:
        raise ModelError(f"{WEIGHTS} and {CARD} in {public_uri(folder)} are not of one model: copy both from one run")
    model = build_model(card.spec)
    model.load_state_dict(state)
    return model.eval().to(device), card


@dataclass
class TrainingState:
    """The state of a run between two epochs."""

    card: dict[str, Any]  # the model card as plain values, without results
    model: StateDict  # weights now
    optimizer: dict[str, Any] = field(default_factory=dict)  # {} before the first epoch
    epoch: int = 0  # the next one
    best_epoch: int | None = None  # with the lowest loss on validation so far, None before the first
    best_loss: float = float("inf")  # on validation, of that epoch
    best_model: StateDict = field(default_factory=dict)  # weights of that epoch
    history: list[dict[str, float]] = field(default_factory=list)  # figures of the finished epochs


def save_checkpoint(folder: str, state: TrainingState, storage_options: StorageOptions | None = None) -> None:
    """Writes the state in place of the one before."""
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    write_bytes(_file(folder, CHECKPOINT), buffer.getvalue(), storage_options)


def has_checkpoint(folder: str, storage_options: StorageOptions | None = None) -> bool:
    """Returns whether the folder has a checkpoint."""
    fs, path = filesystem(_file(folder, CHECKPOINT), storage_options)
    return bool(fs.exists(path))


def remove_checkpoint(folder: str, storage_options: StorageOptions | None = None) -> None:
    """Removes the checkpoint of a folder, if there is one."""
    fs, path = filesystem(_file(folder, CHECKPOINT), storage_options)
    with suppress(FileNotFoundError):
        fs.rm(path)


def load_checkpoint(folder: str, storage_options: StorageOptions | None = None) -> TrainingState:
    """Returns the state that was written last, on the CPU.

    Raises:
        ModelError: the file is missing, cannot be read, or has weights that are not finite.
    """
    name = public_uri(_file(folder, CHECKPOINT))
    remedy = "a run that is finished has none, nor has one that ended before its first epoch did"
    data = _read(folder, CHECKPOINT, remedy, storage_options)
    if reason := reason_of(io.BytesIO(data)):
        raise ModelError(f"{name} {reason}")
    try:
        state = TrainingState(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:
        raise ModelError(f"{name} is no checkpoint of this version of slidelake ({first_sentence(error)})") from None
    moments = {
        f"optimizer.{number}.{key}": value
        for number, values in state.optimizer.get("state", {}).items()
        for key, value in values.items()
    }
    try:
        for tensors in (state.model, state.best_model, moments):
            refuse_not_finite(tensors, name)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    return state


def checkpoint_card(folder: str, storage_options: StorageOptions | None = None) -> ModelCard:
    """Returns the card of the run in the state that was written last; raises ModelError as `load_checkpoint`."""
    try:
        return ModelCard.from_json(load_checkpoint(folder, storage_options).card)
    except _NOT_A_CARD as error:
        raise ModelError(
            f"{public_uri(_file(folder, CHECKPOINT))} is no checkpoint of this version of slidelake ({error}): begin a new run"
        ) from None


def _read(folder: str, name: str, remedy: str, storage_options: StorageOptions | None) -> bytes:
    uri = _file(folder, name)
    try:
        return read_bytes(uri, storage_options)
    except FileNotFoundError:
        raise ModelError(f"no {name} in {public_uri(folder)}: {remedy}") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, storage_options))
        raise ModelError(f"{public_uri(uri)} cannot be read ({text})") from None


def _file(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"

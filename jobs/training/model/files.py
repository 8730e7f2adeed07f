"""The folder of a training run: model.safetensors and model.json of a trained model; checkpoint.pt while it trains.

A checkpoint has no state of a random number generator: everything random is a function of seed, epoch and rank (see
`jobs.training.model.fit`), so a run goes on from it as if it had not been stopped.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
_FORMAT = 1  # of model.json; raise it when a reader of the old one would misread the new
_PACKAGES = ("slidelake", "torch", "scikit-learn", "numpy", "pyarrow", "petastorm", "deltalake")


class ModelError(Exception):
    """A model that can't be used; the message names its folder and the remedy."""


@dataclass(frozen=True)
class SplitCard:
    """Who was in a split: enough to tell whether a table still gives the same patients."""

    n: int
    n_by_class: dict[str, int]
    patients_hash: str  # of patient_id, label and params_hash of each, see `jobs.training.labelled`


@dataclass(frozen=True)
class ModelCard:
    """What model.json holds.

    Attributes:
        model_id: the run that trained it (run_id).
        spec: kind and sizes; ``spec.classes`` is the label mapping: class k is ``classes[k]``.
        columns: of table patients that make up a row of a bag, side by side.
        prior: share of each class among the patients trained on, in the order of the classes.
        table_uri: of table patients, without secrets.
        table_version: the Delta version trained on.
        feature_settings: what the features of those patients were made with (settings, hashes of weights, code versions),
            from table runs: one, unless runs with different settings made them; none where table runs tells nothing.
        splits_version: of table splits, where a fold is validated on; else None.
        splits: train, validation and test.
        seed: of everything random.
        training: the settings of the section training.
        device: cpu; or cuda and, once trained, the kind of GPU that the first process had.
        processes: that trained it together.
        threads: of torch on the CPU, in each; another number adds up floats in another order.
        versions: of packages.
        history: a mapping an epoch: epoch, train_loss, and what was measured on validation.
        best_epoch: whose weights these are.
    """

    model_id: str
    spec: ModelSpec
    columns: tuple[str, ...]
    prior: tuple[float, ...]
    table_uri: str
    table_version: int
    feature_settings: tuple[dict[str, Any], ...]
    splits: dict[str, SplitCard]
    seed: int
    training: dict[str, Any]
    device: str = "cpu"
    processes: int = 1
    threads: int = 1
    splits_version: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    history: tuple[dict[str, float], ...] = ()
    best_epoch: int | None = None
    weights_hash: str = ""  # of the weights beside it, filled in by `save_model`

    @property
    def classes(self) -> tuple[str, ...]:
        """The label mapping: class k is ``classes[k]``."""
        return self.spec.classes

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        history = [  # JSON has no NaN, which a figure is where a class is missing
            {name: value if math.isfinite(value) else None for name, value in epoch.items()} for epoch in self.history
        ]
        return asdict(self) | {"format": _FORMAT, "classes": list(self.classes), "history": history}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelCard":
        """From what `to_json` gave.

        Raises:
            ValueError: a later version of slidelake wrote it.
        """
        if values.get("format") != _FORMAT:
            raise ValueError(f"format {values.get('format')!r}, this version of slidelake reads {_FORMAT}")
        plain = {key: value for key, value in values.items() if key not in ("format", "classes")}
        plain["spec"] = ModelSpec.from_json(plain["spec"])
        plain["splits"] = {name: SplitCard(**split) for name, split in plain["splits"].items()}
        for name in ("columns", "prior", "feature_settings"):
            plain[name] = tuple(plain[name])
        plain["history"] = tuple(
            {name: math.nan if value is None else value for name, value in epoch.items()} for epoch in plain["history"]
        )
        return cls(**plain)


def model_versions() -> dict[str, str]:
    """Of Python and of what shapes a model."""
    return package_versions(_PACKAGES)


def save_model(
    folder: str, model: BagModel, card: ModelCard, storage_options: StorageOptions | None = None
) -> ModelCard:
    """Write a model to a folder, any fsspec URI. model.json comes last: a folder that has one is whole.

    Returns:
        The card as written, with the hash of the weights.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    card = ModelCard(**(vars(card) | {"weights_hash": fingerprint(state), "spec": model.spec}))
    write_bytes(f"{folder.rstrip('/')}/{WEIGHTS}", safetensors.torch.save(state), storage_options)
    text = json.dumps(card.to_json(), indent=2)
    write_bytes(f"{folder.rstrip('/')}/{CARD}", text.encode(), storage_options)
    return card


def load_card(folder: str, storage_options: StorageOptions | None = None) -> ModelCard:
    """model.json of a folder.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    uri = f"{folder.rstrip('/')}/{CARD}"
    try:
        data = read_bytes(uri, storage_options)
        if not data.lstrip().startswith(b"{") and (reason := reason_of(data)):
            raise ModelError(f"{public_uri(uri)} {reason}")
        values = json.loads(data)
        return ModelCard.from_json(values)
    except FileNotFoundError:
        raise ModelError(
            f"no {CARD} in {public_uri(folder)}: give the folder of a finished training run, MODELS/RUN_ID"
        ) from None
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{public_uri(uri)} is no model of this version of slidelake ({error})") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, storage_options))
        raise ModelError(f"{public_uri(uri)} can't be read ({text})") from None


def load_model(
    folder: str, storage_options: StorageOptions | None = None, device: str = "cpu"
) -> tuple[BagModel, ModelCard]:
    """A model as `save_model` wrote it, in evaluation mode, and its card.

    Raises:
        ModelError: a file is missing or damaged, or weights and card are not of one model.
    """
    card = load_card(folder, storage_options)
    try:
        state = load_state_dict(f"{folder.rstrip('/')}/{WEIGHTS}", storage_options)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    if fingerprint(state) != card.weights_hash:
        raise ModelError(f"{WEIGHTS} and {CARD} in {public_uri(folder)} are not of one model: copy both from one run")
    model = build_model(card.spec)
    model.load_state_dict(state)
    return model.eval().to(device), card


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

"""A trained model as a folder: model.safetensors (weights) and model.json (all that tells what it is and came from)."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch

from jobs.training.model.mil import BagModel, ModelSpec, build_model
from udfs.wording import package_versions
from udfs.wsi.store import StorageOptions, public_uri, read_bytes, redact, secrets_of, write_bytes
from udfs.wsi.weights.checkpoint import CheckpointError, fingerprint, load_state_dict
from udfs.wsi.weights.not_weights import reason_of

WEIGHTS, CARD = "model.safetensors", "model.json"
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

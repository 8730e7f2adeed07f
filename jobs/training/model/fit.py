"""Fitting a bag model by gradient descent, in one process or several; a seed gives the same weights to the last bit.

Everything random is drawn anew each epoch from seed, epoch and rank: the order of patients and the sampled tiles (by the
feed), dropout (here). So an epoch depends only on the weights before it, and a killed run goes on from its last checkpoint as
if it had not been killed.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from jobs.training.feed import Bags
from jobs.training.model.files import TrainingState
from jobs.training.model.metrics import metric_values
from jobs.training.model.mil import BagModel


class BatchSource(Protocol):
    """A `jobs.training.feed.Feed`, or another source of batches."""

    def epoch(self, number: int) -> Iterable[Bags]:
        """Returns the batches of an epoch."""


@dataclass(frozen=True)
class FitSettings:
    """How to fit; each is a setting of the section training."""

    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int
    class_weights: Literal["balanced", "none"]
    seed: int


@dataclass(frozen=True)
class Predictions:
    """Probabilities of patients, ordered by patient_id."""

    patient_id: list[str]
    center_id: list[str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]  # [n, c]

    def figures(self, split: str) -> dict[str, float]:
        """Returns every metric, named SPLIT_METRIC."""
        values = metric_values(self.labels, self.probabilities)
        return {f"{split}_{name}": value for name, value in values.items()}


class CountError(Exception):
    """An epoch did not hold every patient exactly once."""


def class_weights(counts: Sequence[int], how: Literal["balanced", "none"]) -> torch.Tensor:
    """Returns float32 [c]: balanced weighs all classes the same, n / (c * n_k), and a class without patients 0."""
    if how == "none":
        return torch.ones(len(counts))
    sizes = torch.tensor(counts, dtype=torch.float32)
    return torch.where(sizes > 0, sizes.sum() / (len(counts) * sizes.clamp(min=1)), torch.zeros(()))


def fit_model(
    model: BagModel,
    state: TrainingState,
    train: BatchSource,
    validation: BatchSource | None,
    patients: Sequence[str],
    weights: torch.Tensor,
    settings: FitSettings,
    *,
    after_epoch: Callable[[TrainingState], None],
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Trains until the loss on validation has not gone down for `patience` epochs, or for all epochs.

    The watched loss is the log loss; with balanced classes, the log loss that weighs all classes the same. With several
    processes, each calls this with its own shard of the feeds.

    Args:
        model: gets the weights of `state`, and last those of the best epoch.
        state: the first state; updated in place.
        train: feed of this process.
        validation: feed of this process; None trains all epochs and takes the last.
        patients: that every epoch must have, over all processes.
        weights: of classes, see `class_weights`.
        settings: how to fit.
        after_epoch: called with the state after each epoch.
        after_step: called after each step.

    Raises:
        CountError: an epoch lacked a patient or had one twice.
        FloatingPointError: the loss is NaN or infinite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model.load_state_dict(state.model)
    if state.optimizer:
        optimizer.load_state_dict(state.optimizer)
    network: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    weights = weights.to(model.device)
    while (epoch := state.epoch) < settings.epochs:
        if validation is not None and state.best_epoch is not None and epoch - state.best_epoch > settings.patience:
            break
        torch.manual_seed(_seed_of(settings.seed, epoch))
        loss = _train_epoch(network, optimizer, train, epoch, patients, weights, after_step)
        figures = {"epoch": float(epoch), "train_loss": loss, "train_patients": float(len(patients))}
        watched = loss
        if validation is not None:
            figures |= predict_feed(model, validation).figures("validation")
            watched = figures[f"validation_{'' if settings.class_weights == 'none' else 'weighted_'}log_loss"]
            _refuse_no_number(watched, "the loss on validation", epoch)
        state.model = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        state.optimizer = optimizer.state_dict()
        state.history.append(figures)
        state.epoch = epoch + 1
        if validation is None or watched < state.best_loss:
            state.best_epoch, state.best_loss, state.best_model = epoch, watched, state.model
        after_epoch(state)
    model.load_state_dict(state.best_model)


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    feed: BatchSource,
    epoch: int,
    patients: Sequence[str],
    weights: torch.Tensor,
    after_step: Callable[[], object],
) -> float:
    """Trains for one epoch; returns the mean loss per patient."""
    network.train()
    total = torch.zeros(2, dtype=torch.float64, device=weights.device)  # loss, patients
    seen: list[str] = []
    for bags in feed.epoch(epoch):
        with torch.autocast(weights.device.type, torch.bfloat16, enabled=weights.device.type == "cuda"):
            logits, _ = network(bags)
        label = bags.label.to(weights.device)
        losses = cross_entropy(logits.float(), label, reduction="none")
        # Divided by the number of patients, not by the sum of their weights, which would cancel the weight in a batch of one,
        # and most of it in a small one.
        counted = ~bags.repeated.to(weights.device)
        loss = (losses * weights[label] * counted).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        total += torch.stack([loss.detach().double() * len(label), counted.sum().double()])
        seen += itertools.compress(bags.patient_id, ~bags.repeated)
        after_step()
    if dist.is_initialized():
        dist.all_reduce(total)
    times = Counter(name for part in _gathered(seen) for name in part)
    missing, doubled = sorted(set(patients) - times.keys()), sorted(name for name in times if times[name] > 1)
    if times != Counter(patients):
        raise CountError(
            f"epoch {epoch} held {times.total()} patients of {len(patients)}: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(doubled)} more than once ({', '.join(doubled[:3])})"
        )
    value = float(total[0] / total[1])
    _refuse_no_number(value, "the loss", epoch)
    return value


def _refuse_no_number(value: float, what: str, epoch: int) -> None:
    """Raises FloatingPointError for NaN and infinity: no epoch is the best by such a loss."""
    if not np.isfinite(value):
        raise FloatingPointError(
            f"{what} is {value} in epoch {epoch}: lower training.learning_rate, or look for numbers in the bags that are "
            "not finite"
        )


def predict_feed(model: BagModel, feed: BatchSource) -> Predictions:
    """Returns the probabilities of every patient of a feed; with several processes, of all their shards, in each of them."""
    found: dict[str, tuple[str, int, list[float]]] = {}
    for bags in feed.epoch(0):
        probabilities, _ = model.predict(bags)
        rows = zip(bags.center_id, bags.label.tolist(), probabilities.tolist(), strict=True)
        found.update(zip(bags.patient_id, rows, strict=True))
    for part in _gathered(found):
        found.update(part)
    names = sorted(found)
    centers, labels, numbers = zip(*(found[name] for name in names), strict=True)
    return Predictions(names, list(centers), np.array(labels, np.int64), np.array(numbers, np.float64))


def _gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, in each of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _seed_of(seed: int, epoch: int) -> int:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(np.random.SeedSequence((seed % 2**63, epoch, rank)).generate_state(1, np.uint64)[0] % 2**63)

"""Fitting: an epoch is every patient once or an error, weights of classes count in batches of one, a stop in time."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from jobs.training.feed.bags import Bag, Bags
from jobs.training.model.files import TrainingState
from jobs.training.model.fit import CountError, FitSettings, class_weights, fit_model
from jobs.training.model.logistic import fit_logistic
from jobs.training.model.mil import LogisticModel, ModelSpec, build_model
from tests.training.batches import batch_of

SETTINGS = FitSettings(learning_rate=1e-2, weight_decay=0.0, epochs=6, patience=2, class_weights="none", seed=0)
LABELS = [0, 0, 0, 1]


@dataclass
class ListFeed:
    """Patients one by one; `names` says who comes."""

    names: list[str] = field(default_factory=lambda: [f"p{i}" for i in range(len(LABELS))])
    repeated: bool = False  # the last one only fills a step
    scale: float = 1.0

    def epoch(self, number: int) -> Iterator[Bags]:
        for place, name in enumerate(self.names):
            i = int(name[1:])
            torch.manual_seed(i)
            bag = Bag(torch.randn(3, 4) * self.scale, None, None)
            again = self.repeated and place == len(self.names) - 1
            yield batch_of([bag], [name], ["c"], [LABELS[i]], [again])


def run(train: ListFeed, validation: ListFeed | None = None, how: FitSettings = SETTINGS) -> TrainingState:
    torch.manual_seed(0)
    model = build_model(ModelSpec("attention", 4, ("a", "b"), hidden=4, attention=3, dropout=0.0))
    state = TrainingState({}, model.state_dict())
    weights = class_weights([3, 1], how.class_weights)
    fit_model(model, state, train, validation, ListFeed().names, weights, how, after_epoch=lambda _: None)
    return state


def test_an_epoch_without_a_patient_or_with_one_twice_is_an_error() -> None:
    assert run(ListFeed()).epoch == 6
    with pytest.raises(CountError, match=r"1 missing \(p3\), 0 more than once"):
        run(ListFeed(["p0", "p1", "p2"]))
    with pytest.raises(CountError, match=r"0 missing \(\), 1 more than once \(p1\)"):
        run(ListFeed(["p0", "p1", "p2", "p3", "p1"]))


def test_a_patient_that_only_fills_a_step_is_neither_counted_nor_learned_from() -> None:
    filled = run(
        ListFeed(["p0", "p1", "p2", "p3", "p3"], repeated=True), how=FitSettings(**(vars(SETTINGS) | {"epochs": 1}))
    )
    plain = run(ListFeed(), how=FitSettings(**(vars(SETTINGS) | {"epochs": 1})))
    assert filled.history[0]["train_loss"] == plain.history[0]["train_loss"]


def test_balanced_weights_give_classes_the_same_say_in_batches_of_one() -> None:
    assert class_weights([3, 1], "balanced").tolist() == pytest.approx([4 / 6, 2])
    assert class_weights([3, 0], "balanced").tolist() == pytest.approx([0.5, 0])
    frozen = {"learning_rate": 1e-12, "epochs": 1}
    balanced = run(ListFeed(), how=FitSettings(**(vars(SETTINGS) | frozen | {"class_weights": "balanced"})))
    plain = run(ListFeed(), how=FitSettings(**(vars(SETTINGS) | frozen)))
    assert balanced.history[0]["train_loss"] != pytest.approx(plain.history[0]["train_loss"], abs=1e-4)


def test_training_stops_when_validation_has_not_become_better_for_as_long_as_patience() -> None:
    fast = FitSettings(**(vars(SETTINGS) | {"learning_rate": 0.3, "epochs": 50}))
    state = run(ListFeed(), ListFeed(scale=-1.0), fast)
    assert state.best_epoch is not None
    assert state.epoch == len(state.history) == state.best_epoch + 1 + fast.patience < 50
    losses = [figures["validation_log_loss"] for figures in state.history]
    assert losses.index(min(losses)) == state.best_epoch


def test_a_loss_that_is_no_number_ends_training() -> None:
    with pytest.raises(FloatingPointError, match=r"lower training\.learning_rate"):
        run(ListFeed(scale=float("inf")))


def test_an_epoch_without_a_number_on_validation_is_never_the_best() -> None:
    with pytest.raises(FloatingPointError, match="the loss on validation is nan in epoch 0"):
        run(ListFeed(), ListFeed(scale=float("nan")))
    network = LogisticModel(ModelSpec("logistic", 3, ("A", "B")))
    train = np.eye(4, 3), np.array([0, 1, 0, 1])
    with pytest.raises((FloatingPointError, ValueError), match=r"finite|NaN"):
        fit_logistic(network, train, (np.full((2, 3), np.nan), np.array([0, 1])), "none")

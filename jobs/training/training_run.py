"""One training run, in each of its processes: from a task of plain values to a folder with a model and its report.

Files of a run, below its folder: checkpoint.pt while it trains; model.safetensors and model.json; report.json,
report_SPLIT.png and predictions.csv of the held-out patients; tensorboard/.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from jobs.training.devices import take_device
from jobs.training.feed import Feed, make_feed
from jobs.training.feed.bags import HISTOGRAM
from jobs.training.labelled import TrainingSet
from jobs.training.model.files import (
    ModelCard,
    TrainingState,
    load_checkpoint,
    model_versions,
    remove_checkpoint,
    save_checkpoint,
    save_model,
)
from jobs.training.model.fit import FitSettings, Predictions, class_weights, fit_model, predict_feed
from jobs.training.model.logistic import collect, fit_logistic
from jobs.training.model.metrics import Evaluation, evaluate_split
from jobs.training.model.mil import BagModel, LogisticModel, build_model
from jobs.training.records import Records
from jobs.training.report import draw_report, predictions_csv, report_text
from udfs.wsi.store import write_bytes

_log = logging.getLogger("slidelake.training")
HELD_OUT = ("validation", "test")
_COLUMNS = {"embedding": ("embeddings",), "max": ("embeddings_max",), "both": ("embeddings", "embeddings_max")}


@dataclass(frozen=True)
class Task:
    """What to do; the same in every process."""

    card: ModelCard  # without results
    members: TrainingSet
    folder: str
    metrics_table: str
    resume: bool
    storage_options: Mapping[str, Any]
    mlflow_uri: str | None = None  # may hold a secret: not part of the card

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of section training."""
        return self.card.training


def bag_columns(columns: str) -> tuple[str, ...]:
    """Returns the columns of table patients for the setting training.columns."""
    return _COLUMNS[columns]


def run_task(task: Task) -> str:
    """Trains, evaluates and writes; as a process of a group if torchrun's variables name one, else alone.

    Returns:
        The report as text.
    """
    grouped = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if grouped:
        dist.init_process_group("gloo" if task.card.device == "cpu" else "cpu:gloo,cuda:nccl")
    torch.set_num_threads(task.card.threads)
    try:
        return _run(task, take_device(task.card.device))
    finally:
        if grouped:
            dist.destroy_process_group()


def _run(task: Task, device: torch.device) -> str:
    torch.manual_seed(task.card.seed)  # the first weights are the same in every process
    model = build_model(task.card.spec).to(device)
    if task.resume:
        state = load_checkpoint(task.folder, task.storage_options)
    else:
        state = TrainingState(task.card.to_json(), model.state_dict())
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    places = (task.folder, task.metrics_table, task.mlflow_uri, task.storage_options)
    with Records(task.card, *places, state.epoch) if is_first else nullcontext() as records:

        def after_epoch(state: TrainingState) -> None:
            if records:
                _write_epoch(task, records, state)

        if not isinstance(model, LogisticModel):
            _fit(task, model, state, after_epoch, is_shown=is_first and sys.stderr.isatty())
        elif state.epoch:  # it was fitted before the run was stopped
            model.load_state_dict(state.model)
        else:
            _fit_logistic(task, model, state)
            after_epoch(state)
        predictions = {
            split: predict_feed(model, _feed(task, split)) for split in HELD_OUT if task.members.splits[split]
        }
        return write_results(task, records, model, state, predictions) if records else ""


def _fit(
    task: Task, model: BagModel, state: TrainingState, after_epoch: Callable[[TrainingState], None], *, is_shown: bool
) -> None:
    train = _feed(task, "train")
    settings = FitSettings(**{field.name: task.settings[field.name] for field in fields(FitSettings)})
    steps, done = settings.epochs * train.n_steps, state.epoch * train.n_steps
    with tqdm(total=steps, initial=done, disable=not is_shown, leave=False, unit="step") as bar:
        fit_model(
            model,
            state,
            train,
            _feed(task, "validation") if task.members.splits["validation"] else None,
            task.members.ids("train"),
            class_weights(task.members.counts("train"), settings.class_weights),
            settings,
            after_epoch=after_epoch,
            after_step=bar.update,
        )


def _fit_logistic(task: Task, model: LogisticModel, state: TrainingState) -> None:
    train = collect(model, _feed(task, "train").epoch(0))
    validates = bool(task.members.splits["validation"])
    validation = collect(model, _feed(task, "validation").epoch(0)) if validates else None
    strength, loss = fit_logistic(model, train, validation, task.settings["class_weights"])
    figures = {"epoch": 0.0, "train_loss": loss, "train_inverse_penalty": strength}
    if validates:
        figures |= predict_feed(model, _feed(task, "validation")).figures("validation")
    state.best_epoch, state.epoch = 0, 1
    state.model = state.best_model = model.state_dict()
    state.history.append(figures)


def _feed(task: Task, split: str) -> Feed:
    """Returns the feed of this process's share of a split; held-out patients come whole and in the table's order."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole = split != "train" or task.card.spec.kind == "logistic"
    return make_feed(
        task.members.table_uri,
        task.members.version,
        encoder=task.card.encoder,
        patients=task.members.ids(split),
        shard=(rank, world),
        batch_size=task.settings["batch_size"],
        bag_size=None if whole else task.settings["bag_size"],
        seed=task.card.seed,
        columns=[*task.card.columns, *([HISTOGRAM] if task.card.spec.histogram_bins else [])],
        classes=task.card.classes,
        storage_options=task.storage_options,
        shuffle=not whole,
    )


def _write_epoch(task: Task, records: Records, state: TrainingState) -> None:
    """Writes figures first, then the checkpoint: a run resumed from it writes the figures after it again."""
    last = state.history[-1]
    records.write(state.history, last)
    save_checkpoint(task.folder, state, task.storage_options)
    names = ("train_loss", "validation_log_loss", "validation_auroc")
    shown = ", ".join(f"{name} {last[name]:.4f}" for name in names if name in last)
    best = ", best so far" if state.best_epoch == last["epoch"] else ""
    _log.info("slidelake: epoch %d: %s%s", last["epoch"], shown, best)


def write_results(
    task: Task, records: Records, model: BagModel, state: TrainingState, predictions: Mapping[str, Predictions]
) -> str:
    """Writes model, report and predictions, and removes the checkpoint. Returns the report as text."""
    card, best = task.card, state.best_epoch
    evaluations: dict[str, Evaluation] = {
        split: evaluate_split(found.labels, found.probabilities, card.classes, found.center_id, card.seed)
        for split, found in predictions.items()
    }
    if "test" in predictions and best is not None:
        history = [dict(figures) for figures in state.history]
        tested = predictions["test"].figures("test")
        history[best] |= tested
        records.write(history, {"epoch": float(best)} | tested)
    files = {"predictions.csv": predictions_csv(predictions, card.classes)}
    for split, evaluation in evaluations.items():
        title = f"{card.model_id} on encoder {card.encoder}: split {split}, {evaluation.n} patients"
        files[f"report_{split}.png"] = draw_report(title, predictions[split], evaluation)
    report = {split: asdict(evaluation) for split, evaluation in evaluations.items()}
    files["report.json"] = json.dumps(report, indent=2).encode()
    for name, data in files.items():
        write_bytes(f"{task.folder}/{name}", data, task.storage_options)
    trained = replace(
        card,
        device="cpu" if model.device.type == "cpu" else f"cuda {torch.cuda.get_device_name(model.device)}",
        processes=dist.get_world_size() if dist.is_initialized() else 1,
        history=tuple(state.history),
        best_epoch=best,
        versions=model_versions(),
    )
    save_model(task.folder, model, trained, task.storage_options)
    remove_checkpoint(task.folder, task.storage_options)
    why = "the best on validation" if task.members.splits["validation"] else "the last"
    lines = [f"  model     {card.spec.kind} on encoder {card.encoder}, epoch {best} of {len(state.history)}, {why}"]
    return "\n".join([*lines, *(report_text(split, each) for split, each in evaluations.items())])

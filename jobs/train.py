"""A model on table patients: learns from split train, stops by split validation, is measured on split test.

One process starts no Spark; 2 and more (training.processes) run on Spark's executors. The model, its report and its
probabilities go to ROOT/models/RUN_ID, figures of each epoch to table training_metrics.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from pyspark.sql import SparkSession

from jobs.runtime.run.cli import DONE, FAILED, main_alone
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.of_model import settings_of_features
from jobs.runtime.spark.cancelling import Cancelling
from jobs.runtime.spark.session import is_local, start_session
from jobs.runtime.spark.streams import log_to_stderr
from jobs.runtime.tables.writable import refuse_unwritable
from jobs.training.devices import Device, DeviceError, device_here, device_on_executors
from jobs.training.labelled import CohortError, TrainingSet, read_training_set
from jobs.training.leakage import LeakageError, refuse_leaks, slide_files
from jobs.training.model.files import ModelCard, ModelError, checkpoint_card, has_checkpoint, load_card, model_versions
from jobs.training.model.mil import ModelSpec
from jobs.training.origins import n_different, read_origins
from jobs.training.records import RecordsError
from jobs.training.refusals import FeedError, NoTableError
from jobs.training.splitting import SPLITS
from jobs.training.training_run import Task, bag_columns, run_task
from udfs.wording import new_run_id
from udfs.wsi.encoder.provenance import LicenceError, refuse_non_commercial
from udfs.wsi.store import absolute_uri, public_uri

_log = logging.getLogger("slidelake.train")


def train(config: Config, arguments: argparse.Namespace) -> int:
    """Trains a model and reports; or goes on with a run, or repeats one and compares. Returns the exit status."""
    refuse_unwritable(config, "train")
    try:
        earlier = arguments.resume or arguments.reproduce
        task = _earlier_run(config, arguments) if earlier else planned_run(config)
        if config.licence == "commercial" and (
            unknown := refuse_non_commercial(task.card.encoder, task.card.feature_settings)
        ):
            _log.warning("slidelake train: %s", unknown)
        _refuse_leaks(config, task.members)
    except (FeedError, CohortError, LeakageError, LicenceError, ModelError) as error:
        raise ConfigError(str(error)) from None
    n_processes = task.settings["processes"]
    with start_session("slidelake train") if n_processes > 1 else nullcontext() as spark:
        task = _placed(task, earlier, spark)
        log_to_stderr(task.card.model_id)
        _log_plan(task)
        try:
            if spark is None:
                report = run_task(task)
            else:
                with Cancelling(spark):
                    report = on_executors(spark, n_processes, task.card.device, _run_in_process, task)
        except RecordsError as error:
            raise ConfigError(str(error)) from None
        except BaseException:
            if has_checkpoint(task.folder, task.storage_options):
                _log.info("slidelake train: --resume %s goes on after its last whole epoch", task.card.model_id)
            raise
    print(f"\nslidelake train, run {task.card.model_id}\n{report}\n  files     {public_uri(task.folder)}/")
    if arguments.reproduce:
        return _compare(_folder(config, arguments.reproduce), task)
    return DONE


def planned_run(config: Config) -> Task:
    """Returns a new run, on the newest version of table patients."""
    settings = config.training
    columns = bag_columns(settings.columns)
    members = _members(config, settings.encoder, settings.fold)
    origins = read_origins(members, _table(config, "runs"), config.slides.storage_options)
    spec = ModelSpec(
        kind=settings.model,
        dim=members.dim * len(columns),
        classes=members.classes,
        hidden=settings.hidden,
        attention=settings.attention_hidden,
        dropout=settings.dropout,
        histogram_bins=config.histogram.bins**3 if settings.use_histogram else 0,
        centers=members.centers if settings.use_center else (),
    )
    card = ModelCard(
        model_id=new_run_id(),
        spec=spec,
        columns=columns,
        prior=members.prior,
        table_uri=public_uri(members.table_uri),
        table_version=members.version,
        encoder=members.encoder,
        feature_settings=origins.recipes,
        splits=members.cards(),
        seed=settings.seed,
        training=config.masked()["training"] | {"encoder": members.encoder},  # this is kept with the model
        settings=settings_of_features(origins.config, members.encoder, origins.recipes[-1]) if origins.recipes else {},
        device=settings.device,  # until the run knows its processes
        threads=torch.get_num_threads() if settings.processes == 1 else 1,
        splits_version=members.splits_version,
        versions=model_versions(),
    )
    return _task(config, card, members, resume=False)


def _earlier_run(config: Config, arguments: argparse.Namespace) -> Task:
    """Returns a stopped run to go on with, or a finished one to repeat under a new name, with the run's own settings.

    Raises:
        ConfigError: an argument sets a setting of training, or the version of the table has other patients.
        FeedError: the version is gone.
    """
    is_resumed = bool(arguments.resume)
    for name in (word.partition("=")[0] for word in arguments.overrides):
        if name.startswith("training.") and name not in ("training.output", "training.mlflow"):
            which = "--resume" if is_resumed else "--reproduce"
            raise ConfigError(f"{which} goes by the run's own settings: leave out {name}, or begin a new run")
    folder, options = _folder(config, arguments.resume or arguments.reproduce), config.slides.storage_options
    card = checkpoint_card(folder, options) if is_resumed else load_card(folder, options)
    members = _members(config, card.encoder, card.training["fold"], card.table_version, card.splits_version)
    for name, now in members.cards().items():
        if now != card.splits[name]:
            raise ConfigError(
                f"split {name} of version {card.table_version} of {card.table_uri} is not the one that run {card.model_id} "
                f"was trained on ({card.splits[name].n} patients then, {now.n} now, or others): the table was "
                "made anew since; restore it, or train a new model"
            )
    if not is_resumed:
        card = replace(card, model_id=new_run_id(), history=(), best_epoch=None, weights_hash="")
    return _task(config, card, members, resume=is_resumed)


def _members(
    config: Config, encoder: str | None, fold: int | None, version: int | None = None, of_splits: int | None = None
) -> TrainingSet:
    return read_training_set(
        _table(config, "patients"),
        version,
        encoder=encoder,
        fold=fold,
        splits_uri=_table(config, "splits"),
        splits_version=of_splits,
        storage_options=config.slides.storage_options,
    )


def _task(config: Config, card: ModelCard, members: TrainingSet, *, resume: bool) -> Task:
    return Task(
        card=card,
        members=members,
        folder=_folder(config, card.model_id),
        metrics_table=_table(config, "training_metrics"),
        resume=resume,
        storage_options=config.slides.storage_options,
        mlflow_uri=config.training.mlflow,
    )


def _refuse_leaks(config: Config, members: TrainingSet) -> None:
    assignments = [(patient, split) for split in SPLITS for patient in members.ids(split)]
    try:
        slides = slide_files(_table(config, "slides"), config.slides.storage_options)
    except NoTableError:
        slides = []
        root = public_uri(config.output.root)
        _log.warning("slidelake train: no table slides in %s: slide files were not compared", root)
    compared = refuse_leaks(assignments, slides, config.slides.storage_options)
    if compared.unreadable:
        _log.warning(
            "slidelake train: %d slides of equal size in several splits could not be opened: their content was not compared",
            compared.unreadable,
        )


def _placed(task: Task, earlier: str | None, spark: SparkSession | None) -> Task:
    """Returns the task with its device: of a run that is resumed or reproduced, the same kind as before."""
    wanted = task.card.device
    try:
        device = device_of_processes(wanted.partition(" ")[0], task.settings["processes"], spark)
    except DeviceError as error:
        why = f"run {earlier} trained on {wanted}" if earlier else f"training.device is {wanted}"
        raise ConfigError(f"{why}: {error}") from None
    return replace(task, card=replace(task.card, device=device))


def device_of_processes(wanted: str, n_processes: int, spark: SparkSession | None) -> Device:
    """Returns processor or GPUs, by what the processes' machine has: this one, or the executors of a cluster.

    `spark` starts the processes; it is None for one process. Raises DeviceError if the wanted device is missing.
    """
    if spark is None or is_local(spark):
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # counts GPUs without a driver
        return device_here(wanted, n_processes, n_gpus)
    return device_on_executors(wanted, spark.conf.get("spark.task.resource.gpu.amount", None))


def on_executors(spark: SparkSession, n_processes: int, device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs work in several processes at once, by Spark; returns the result of the first one.

    On a local master the processes are this machine's, without tasks of Spark. Spark needs to know of no GPUs then: each
    process sees all, and takes its own.
    """
    from pyspark.ml.torch.distributor import TorchDistributor  # noqa: PLC0415 - one process does not need it

    local = is_local(spark)
    spark.sparkContext.setJobDescription(f"train: {n_processes} processes")
    distributor = TorchDistributor(n_processes, local_mode=local, use_gpu=device == "cuda" and not local)
    return distributor.run(work, *arguments)


def _run_in_process(task: Task) -> str:
    log_to_stderr(task.card.model_id)
    return run_task(task)


def _compare(folder: str, task: Task) -> int:
    """Compares a run with the one that it repeats; returns exit status 1 if they differ."""
    before, after = (load_card(each, task.storage_options) for each in (folder, task.folder))
    # As texts, since NaN does not equal itself.
    epochs = zip_longest(*([repr(sorted(epoch.items())) for epoch in card.history] for card in (before, after)))
    differ = [number for number, (then, now) in enumerate(epochs) if then != now]
    if not differ and before.weights_hash == after.weights_hash:
        print(f"  identical to run {before.model_id}: {len(after.history)} epochs, every figure, and the weights")
        return DONE
    changed = [
        f"{name} {version} then, {after.versions.get(name)} now"
        for name, version in before.versions.items()
        if after.versions.get(name) != version
    ]
    _log.error(
        "slidelake train: not identical to run %s from epoch %d on, though the patients are the same: %s",
        before.model_id,
        [*differ, len(after.history)][0],
        "; ".join(changed) or "another processor or GPU adds up floats in another order",
    )
    return FAILED


def _log_plan(task: Task) -> None:
    members, card = task.members, task.card
    splits = ", ".join(f"{split} {len(members.splits[split])}" for split in SPLITS)
    lines = [
        f"run {card.model_id} on encoder {card.encoder} of version {card.table_version} of {card.table_uri}: patients "
        f"{splits}; left out: {members.unlabelled} without label, {members.unassigned} without split"
    ]
    if (n_settings := n_different(card.feature_settings)) > 1:
        lines.append(f"the features of these patients were made with {n_settings} different settings")
    if not members.splits["validation"]:
        lines.append("no patient in split validation: training goes on for all epochs, and the last is taken")
    if lacking := members.class_gaps().lacking:
        lines.append(f"{'; '.join(lacking)}: the figures of a split leave out the classes that it lacks")
    for line in lines:
        _log.info("slidelake train: %s", line)


def _folder(config: Config, run_id: str) -> str:
    output = config.training.output or f"{config.output.root.rstrip('/')}/models"
    return f"{absolute_uri(output).rstrip('/')}/{run_id}"


def _table(config: Config, name: str) -> str:
    return f"{absolute_uri(config.output.root).rstrip('/')}/{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return main_alone("train", train, argv)


if __name__ == "__main__":
    sys.exit(main())

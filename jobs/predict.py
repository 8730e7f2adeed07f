"""Table predictions and a CSV: probabilities of the patients of a CSV, by a trained model, from the slides on.

Slides, features and patients are brought up to date as by the main job, in the same tables, by the model's encoder alone.
What made the features that the model learned from is taken from the model; settings with other values are refused. A patient
without a bag gets the model's prior (the shares of the classes that the model was trained on), the flag from_prior and no
predicted class: no patient is left out. The model may not see every slide of a patient: n_images_failed counts those that
failed, n_images_without_tiles those that have no tile. Patients and slides that the model learned from are named. A second
run predicts only what changed.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pandas as pd
import torch
from pyspark.sql import functions as F
from tqdm import tqdm

from jobs import preprocess
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.cli import conclude
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.record import Record
from jobs.runtime.run.run import Run
from jobs.runtime.run.summary import CohortState, read_state
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.identity import Identity, Recipe, differences, row_hash
from jobs.runtime.settings.of_model import (
    Sections,
    differences_as_written,
    missing_files,
    taken_from_model,
    with_settings_of_model,
)
from jobs.runtime.spark.session import slots
from jobs.runtime.spark.streams import terminal
from jobs.runtime.tables.tables import Tables
from jobs.training.feed import make_feed
from jobs.training.model.files import ModelCard, ModelError, load_card, load_model
from jobs.training.model.mil import BagModel
from jobs.training.model.predictions import (
    VERSION,
    Basis,
    Prediction,
    as_table,
    predict_each,
    prior_prediction,
    submission_csv,
)
from jobs.training.refusals import FeedError
from jobs.training.seen import Seen, seen_by_model
from udfs.find_tissue import WITHOUT_TILES
from udfs.wording import named, some
from udfs.wsi.encoder.provenance import LicenceError, refuse_non_commercial
from udfs.wsi.store import absolute_uri, public_uri, write_bytes

JOB = replace(preprocess.JOB, name="predict", writes=(*preprocess.JOB.writes, "predictions"), result="predictions")
_log = logging.getLogger("slidelake.predict")
_TILES_A_COMMIT = 1_000_000  # some 30 MB of attention: what a run that is killed loses at most
Loaded = TypeVar("Loaded")


def complete(config: Config, written: Sections) -> Sections:
    """Returns settings completed by those that made the features of the model, and logs which were taken."""
    if config.predict.model is None:
        return written  # `check` refuses it
    card = _loaded(load_card, config)
    taken = taken_from_model(written, card.settings)
    _log.info(
        "slidelake predict: by model %s: encoder %s%s",
        card.model_id,
        card.encoder,
        "".join(f", {one}" for one in taken),
    )
    return with_settings_of_model(written, card.settings, card.encoder)


def check(config: Config) -> None:
    """Refuse what can be refused before Spark starts."""
    card = _loaded(load_card, config)
    if card.encoder not in config.encoders:
        raise ConfigError(
            f"predict.model: {card.model_id} takes bags of encoder {card.encoder}, and does not say how to make them: add this "
            "encoder to encoders"
        )
    by_content = differences_as_written(config, card.settings)
    _refuse_other_features(card, Identity(config).recipe(card.encoder), by_content)
    if missing := missing_files(config, card.settings):
        [(key, path), *_] = missing
        raise ConfigError(
            f"predict.model: {card.model_id} learned from features made with {key} = {path}, which is not on this machine: set "
            f"{key} to where these weights are"
        )
    if config.licence == "commercial":
        try:
            refuse_non_commercial(card.encoder, card.feature_settings)  # the run names a licence that is not known
        except LicenceError as error:
            raise ConfigError(str(error)) from None


def predict(run: Run, arguments: argparse.Namespace) -> int:
    """Bring the patients' bags up to date, predict the patients without a prediction of theirs, write the CSV."""
    config, tables = run.config, run.tables
    storage_options = config.slides.storage_options
    model, card = _loaded(load_model, config)
    survey = work_in_waves(
        run,
        retry_failed=arguments.retry_failed,
        check=lambda: _refuse(card, run.identity.recipe(card.encoder), run.images, tables),
    )
    with run.progress.stage("predict"):
        wanted = _wanted(tables, read_state(tables, run.job, survey, config.encoders), survey, card)
        rows = tables.read("predictions").where(F.col("model_id") == card.model_id)
        have = {row.patient_id: row.params_hash for row in rows.select("patient_id", "params_hash").collect()}
        todo = {name: basis for name, basis in wanted.items() if have.get(name) != basis.params_hash}
        with_bag = [name for name, basis in todo.items() if basis.n_tiles]
        _write(_predicted(tables, storage_options, model, card, with_bag), card, todo, have, tables, run.record)
        rows = tables.read("predictions").where(F.col("model_id") == card.model_id)
        found = {row.patient_id: row for row in rows.select("patient_id", "probabilities", "from_prior").collect()}
        probabilities = {name: found[name].probabilities for name in wanted}
        from_prior = [name for name in wanted if found[name].from_prior]
        csv = config.predict.csv or f"{config.output.root.rstrip('/')}/predictions_csv/{card.model_id}.csv"
        write_bytes(csv, submission_csv(probabilities, card.classes, from_prior), storage_options)
        uris = {image.image_id: image.uri for image in run.images}
        seen = seen_by_model(card, config.output.root, uris, storage_options)
    run.record.counts.update(patients_predicted=len(todo), patients_from_prior=len(from_prior))
    return conclude(run, survey, _lines(card, wanted, len(todo), from_prior, seen, csv))


def _loaded(load: Callable[[str, Mapping[str, Any] | None], Loaded], config: Config) -> Loaded:
    """What `load` reads from the folder of the model; raises ConfigError."""
    if config.predict.model is None:
        raise ConfigError("predict.model is required: the folder of a trained model, for example ROOT/models/RUN_ID")
    try:
        return load(absolute_uri(config.predict.model), config.slides.storage_options)
    except ModelError as error:
        raise ConfigError(f"predict.model: {error}") from None


def _refuse(card: ModelCard, recipe: Recipe, images: Sequence[Image], tables: Tables) -> None:
    """Raise ConfigError if the features would not be those that the model learned from, or labels would be lost."""
    _refuse_other_features(card, recipe)
    unlabelled = [image.image_id for image in images if image.label is None]
    known = tables.read("slides").where(F.col("label").isNotNull() & F.col("image_id").isin(unlabelled))
    patients = sorted({row.patient_id for row in known.select("patient_id").collect()})
    if patients:
        raise ConfigError(
            f"patients: {len(patients)} patients of the CSV have no label there, but one in table slides "
            f"({some(patients)}), which this run would remove: give column label, or another output.root"
        )


def _refuse_other_features(card: ModelCard, recipe: Recipe, by_content: Sequence[str] = ()) -> None:
    """Raise ConfigError if the recipe is none of the model's; `by_content`: differences that loaded models alone show in it."""
    if not card.feature_settings:
        raise ConfigError(
            f"predict.model: {card.model_id} does not say how its features were made: train it on tables whose runs do "
            "(table runs, column features)"
        )
    differ = [*differences(recipe, card.feature_settings), *by_content]
    if differ:
        raise ConfigError(
            f"predict.model: {card.model_id} learned from features made with other settings: {'; '.join(differ)}: leave these "
            "out or set them to the model's, or train a model on features as these"
        )


def _wanted(tables: Tables, state: CohortState, survey: pd.DataFrame, card: ModelCard) -> dict[str, Basis]:
    """What each patient's prediction depends on; no tiles if table patients has no row."""
    patient_of, status = state.slides["image_id"].map(survey["patient_id"]), state.slides["status"]
    unseen = [Counter(patient_of[status.isin(kinds)]) for kinds in (["failed"], WITHOUT_TILES)]
    of_encoder = tables.read("patients").where(F.col("encoder") == card.encoder)
    rows = of_encoder.select("patient_id", "params_hash", "n_tiles").collect()
    bags = {row.patient_id: (row.params_hash, row.n_tiles) for row in rows}

    def basis(name: str) -> Basis:
        params_hash, n_tiles = bags.get(name, (None, 0))
        counts = [count[name] for count in unseen]
        return Basis(row_hash(VERSION, card.model_id, card.weights_hash, params_hash, *counts), n_tiles, *counts)

    return {name: basis(name) for name in state.patients}


def _predicted(
    tables: Tables,
    storage_options: Mapping[str, Any] | None,
    model: BagModel,
    card: ModelCard,
    patients: Sequence[str],
) -> Iterator[Prediction]:
    """The predictions of patients with a bag, in the order of the table."""
    if not patients:
        return
    extra = ["color_histogram"] if card.spec.histogram_bins else []
    try:
        feed = make_feed(
            tables.path("patients"),
            tables.version("patients"),
            encoder=card.encoder,
            patients=patients,
            columns=[*card.columns, *extra, "tile_index"],
            classes=(),  # the label of a patient may be one that the model does not know
            storage_options=storage_options,
            shuffle=False,
        )
    except FeedError as error:
        raise ConfigError(str(error)) from None
    if feed.dim != card.spec.dim:
        raise ConfigError(
            f"predict.model: {card.model_id} takes embeddings of {card.spec.dim} columns, table patients has {feed.dim}"
        )
    torch.set_num_threads(min(slots(tables.spark), os.cpu_count() or 1))  # the driver's cores, not the executors'
    screen = terminal()
    each = predict_each(model, feed)
    yield from tqdm(each, total=len(patients), file=screen, disable=screen is None, leave=False, unit="patient")


def _write(
    predicted: Iterator[Prediction],
    card: ModelCard,
    wanted: Mapping[str, Basis],
    present: Container[str],
    tables: Tables,
    record: Record,
) -> None:
    """Write predictions, one commit per million tiles; patients without a bag are in the first."""

    def commit(found: Sequence[Prediction]) -> None:
        names = [prediction.patient_id for prediction in found]
        rows = as_table(found, wanted, card, record.run_id)
        frame = tables.spark.createDataFrame(rows).coalesce(1)
        known = [name for name in names if name in present]
        tables.put("predictions", frame, "patient_id", names, known, among=("model_id", card.model_id))

    found = [prior_prediction(name, card.prior) for name, basis in wanted.items() if not basis.n_tiles]
    tiles = 0
    for prediction in predicted:
        found.append(prediction)
        tiles += len(prediction.attention)
        if tiles >= _TILES_A_COMMIT:
            commit(found)
            found, tiles = [], 0
    if found:
        commit(found)


def _lines(
    card: ModelCard, wanted: Mapping[str, Basis], n_new: int, from_prior: Sequence[str], seen: Seen, csv: str
) -> list[str]:
    prior = ", ".join(f"{named(name)} {share:.3f}" for name, share in zip(card.classes, card.prior, strict=True))
    lines = [
        f"  predicted {len(wanted)} patients by model {card.model_id} on encoder {card.encoder}, {n_new} of them in this run"
    ]
    if from_prior:
        lines.append(f"            without a bag, so by the prior ({prior}): {some(from_prior, 10)}")
    for count, why in (("n_images_failed", "failed"), ("n_images_without_tiles", "have no tile")):
        missing = {name: getattr(basis, count) for name, basis in wanted.items() if basis.n_tiles}
        if partly := [f"{name} ({n})" for name, n in missing.items() if n]:
            lines.append(f"            without so many slides that {why}: {some(partly, 10)}")
    return [*lines, *seen.lines(), f"  csv       {public_uri(csv)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, predict, argv, check=check, complete=complete)


if __name__ == "__main__":
    sys.exit(main())

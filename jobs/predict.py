"""Table predictions and a CSV: probabilities of the patients of a CSV, by a trained model, from the slides on.

Slides, features and patients are brought up to date as the main job does it, in the same tables; a model that learned from
features made otherwise is refused. Patients without a bag get the shares of the classes that the model was trained on (its
prior), the flag from_prior and no predicted class: no patient is left out. Of others the model may not see every slide:
n_images_failed counts those that failed, n_images_without_tiles those that have no tile. Patients and slides that the model
learned from are named.
Run again, only what changed is predicted again.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from tqdm import tqdm

from jobs import preprocess
from jobs.runtime.run.cli import conclude
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import Run
from jobs.runtime.run.summary import CohortState, read_state
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.identity import Identity, Recipe, differences, row_hash
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
from udfs.wsi.store import absolute_uri, public_uri, write_bytes

JOB = replace(preprocess.JOB, name="predict", writes=(*preprocess.JOB.writes, "predictions"), result="predictions")
_TILES_A_COMMIT = 1_000_000  # some 30 MB of attention: what a run that is killed loses at most


def check(config: Config) -> None:
    """What can be refused before Spark starts."""
    _refuse_other_features(_card(config), Identity(config).recipe)


def predict(run: Run, arguments: argparse.Namespace) -> int:
    """Bring the patients' bags up to date, predict whoever has no prediction of them, write the CSV."""
    config = run.config
    try:
        model, card = load_model(_model_uri(config), config.slides.storage_options)
    except ModelError as error:
        raise ConfigError(f"predict.model: {error}") from None
    survey = work_in_waves(run, retry_failed=arguments.retry_failed, check=lambda: _refuse(run, card))
    with run.stage("predict"):
        wanted = _wanted(run.tables, read_state(run.tables, run.job, survey), survey, card)
        cohort = list(wanted)
        rows = _of_model(run, card).select("patient_id", "params_hash").collect()
        have = {row.patient_id: row.params_hash for row in rows}
        todo = [name for name, basis in wanted.items() if have.get(name) != basis.params_hash]
        _predict_and_write(run, model, card, {name: wanted[name] for name in todo}, have.keys())
        probabilities, from_prior = _probabilities(run, cohort, card)
        csv = config.predict.csv or f"{config.output.root.rstrip('/')}/predictions_csv/{card.model_id}.csv"
        write_bytes(csv, submission_csv(probabilities, card.classes, from_prior), config.slides.storage_options)
        uris = {image.image_id: image.uri for image in run.images}
        seen = seen_by_model(card, config.output.root, uris, config.slides.storage_options)
    run.record.counts.update(patients_predicted=len(todo), patients_from_prior=len(from_prior))
    with_bag = {name: basis for name, basis in wanted.items() if basis.n_tiles}
    return conclude(run, survey, _lines(card, cohort, todo, from_prior, with_bag, seen, csv))


def _card(config: Config) -> ModelCard:
    try:
        return load_card(_model_uri(config), config.slides.storage_options)
    except ModelError as error:
        raise ConfigError(f"predict.model: {error}") from None


def _model_uri(config: Config) -> str:
    if config.predict.model is None:
        raise ConfigError("predict.model is required: the folder of a trained model, for example ROOT/models/RUN_ID")
    return absolute_uri(config.predict.model)


def _refuse(run: Run, card: ModelCard) -> None:
    """What can be refused only now, and before a slide is read.

    Raises:
        ConfigError: the features would not be those that the model learned from, or labels would be lost.
    """
    _refuse_other_features(card, run.identity.recipe)
    unlabelled = [image.image_id for image in run.images if image.label is None]
    known = run.tables.read("slides").where(F.col("label").isNotNull() & F.col("image_id").isin(unlabelled))
    patients = sorted({row.patient_id for row in known.select("patient_id").collect()})
    if patients:
        raise ConfigError(
            f"patients: {len(patients)} patients of the CSV have no label there, but one in table slides "
            f"({some(patients)}), which this would empty: give column label, or another output.root"
        )


def _refuse_other_features(card: ModelCard, recipe: Recipe) -> None:
    if not card.feature_settings:
        raise ConfigError(
            f"predict.model: {card.model_id} does not tell what its features were made with: train it on tables whose runs "
            "do (table runs, column features)"
        )
    differ = differences(recipe, card.feature_settings)
    if differ:
        raise ConfigError(
            f"predict.model: {card.model_id} learned from features made with other settings: {'; '.join(differ)}: set what "
            "the model has, or train one on features as these"
        )


def _wanted(tables: Tables, state: CohortState, survey: pd.DataFrame, card: ModelCard) -> dict[str, Basis]:
    """What the prediction of each patient of the cohort rests on; no tiles if table patients has no row."""
    patient_of, status = state.slides["image_id"].map(survey["patient_id"]), state.slides["status"]
    unseen = [Counter(patient_of[status.isin(kinds)]) for kinds in (["failed"], WITHOUT_TILES)]
    rows = tables.read("patients").select("patient_id", "params_hash", "n_tiles").collect()
    bags = {row.patient_id: (row.params_hash, row.n_tiles) for row in rows}

    def basis(name: str) -> Basis:
        params_hash, n_tiles = bags.get(name, (None, 0))
        counts = [count[name] for count in unseen]
        return Basis(row_hash(VERSION, card.model_id, card.weights_hash, params_hash, *counts), n_tiles, *counts)

    return {name: basis(name) for name in state.patients}


def _of_model(run: Run, card: ModelCard) -> DataFrame:
    return run.tables.read("predictions").where(F.col("model_id") == card.model_id)


def _predict_and_write(
    run: Run,
    model: BagModel,
    card: ModelCard,
    wanted: Mapping[str, Basis],
    present: Container[str],
) -> None:
    """A commit for so many tiles; patients without any first, then in the order of the table."""
    with_bag = [name for name, basis in wanted.items() if basis.n_tiles]
    found = [prior_prediction(name, card.prior) for name, basis in wanted.items() if not basis.n_tiles]
    tiles = 0
    for prediction in _predicted(run, model, card, with_bag):
        found.append(prediction)
        tiles += len(prediction.attention)
        if tiles >= _TILES_A_COMMIT:
            _put(run, card, found, wanted, present)
            found, tiles = [], 0
    if found:
        _put(run, card, found, wanted, present)


def _predicted(run: Run, model: BagModel, card: ModelCard, patients: Sequence[str]) -> Iterator[Prediction]:
    if not patients:
        return
    extra = ["color_histogram"] if card.spec.histogram_bins else []
    try:
        feed = make_feed(
            run.tables.path("patients"),
            run.tables.version("patients"),
            patients=patients,
            columns=[*card.columns, *extra, "tile_index"],
            classes=(),  # a label that the model does not know is no matter here
            storage_options=run.config.slides.storage_options,
            shuffle=False,
        )
    except FeedError as error:
        raise ConfigError(str(error)) from None
    if feed.dim != card.spec.dim:
        raise ConfigError(
            f"predict.model: {card.model_id} takes embeddings of {card.spec.dim} columns, table patients has {feed.dim}"
        )
    torch.set_num_threads(min(slots(run.spark), os.cpu_count() or 1))  # the driver's cores, not the executors'
    screen = terminal()
    each = predict_each(model, feed)
    yield from tqdm(each, total=len(patients), file=screen, disable=screen is None, leave=False, unit="patient")


def _put(
    run: Run,
    card: ModelCard,
    found: Sequence[Prediction],
    wanted: Mapping[str, Basis],
    present: Container[str],
) -> None:
    names = [prediction.patient_id for prediction in found]
    frame = run.spark.createDataFrame(as_table(found, wanted, card.classes, card.model_id, run.record.run_id)).coalesce(
        1
    )
    known = [name for name in names if name in present]
    run.tables.put("predictions", frame, "patient_id", names, known, among=("model_id", card.model_id))


def _probabilities(run: Run, cohort: Sequence[str], card: ModelCard) -> tuple[dict[str, dict[str, float]], list[str]]:
    """By patient of the cohort, from the table; and who has the prior."""
    rows = _of_model(run, card).select("patient_id", "probabilities", "from_prior")
    found = {row.patient_id: row for row in rows.collect() if _is_whole(row.probabilities, card)}
    if missing := [name for name in cohort if name not in found]:
        raise RuntimeError(
            f"no whole prediction of {missing[:5]} in table predictions: this is a fault, please report it"
        )
    return {name: found[name].probabilities for name in cohort}, [name for name in cohort if found[name].from_prior]


def _is_whole(probabilities: Mapping[str, float], card: ModelCard) -> bool:
    return probabilities.keys() == set(card.classes) and math.isclose(sum(probabilities.values()), 1, abs_tol=1e-9)


def _lines(
    card: ModelCard,
    cohort: Sequence[str],
    todo: Sequence[str],
    from_prior: Sequence[str],
    with_bag: Mapping[str, Basis],
    seen: Seen,
    csv: str,
) -> list[str]:
    prior = ", ".join(f"{named(name)} {share:.3f}" for name, share in zip(card.classes, card.prior, strict=True))
    lines = [f"  predicted {len(cohort)} patients by model {card.model_id}, {len(todo)} of them in this run"]
    if from_prior:
        lines.append(f"            without a bag, so by the prior ({prior}): {some(from_prior, 10)}")
    for count, why in (("n_images_failed", "failed"), ("n_images_without_tiles", "have no tile")):
        partly = [f"{name} ({n})" for name, basis in with_bag.items() if (n := getattr(basis, count))]
        if partly:
            lines.append(f"            without so many slides that {why}: {some(partly, 10)}")
    return [*lines, *seen.lines(), f"  csv       {public_uri(csv)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, predict, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())

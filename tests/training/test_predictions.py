"""Predictions a bag at a time against the model's own on a batch, their table and their CSV; recipes compared."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.runtime.settings.config import Config
from jobs.runtime.settings.identity import Identity, differences
from jobs.training.feed import make_feed
from jobs.training.model.files import ModelCard
from jobs.training.model.mil import ModelSpec, build_model
from jobs.training.model.predictions import Basis, as_table, predict_each, prior_prediction, submission_csv
from tests.training.cohorts import Signal, draw_cohort, write_patients

CLASSES = ("CE", "LAA", "other, rare")


def test_a_bag_at_a_time_gives_what_the_model_gives_and_attention_lies_on_its_tiles(tmp_path: Path) -> None:
    patients = draw_cohort(7, Signal(dim=8, bag=(3, 30)))
    table = write_patients(tmp_path, patients)
    torch.manual_seed(1)
    model = build_model(ModelSpec("attention", 16, CLASSES, hidden=8, attention=4))
    how = {"columns": ("embeddings", "embeddings_max", "tile_index"), "classes": CLASSES, "shuffle": False}
    found = list(predict_each(model, make_feed(str(table), **how)))  # type: ignore[arg-type]
    [together] = make_feed(str(table), batch_size=7, **how).epoch(0)  # type: ignore[arg-type]
    probabilities, attention = model.predict(together)
    assert [each.patient_id for each in found] == together.patient_id  # the table's order
    drawn = {patient.patient_id: patient for patient in patients}
    assert sorted(together.patient_id) == sorted(drawn)
    np.testing.assert_allclose(np.stack([each.probabilities for each in found]), probabilities, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([each.attention for each in found]), attention, atol=1e-6)
    assert all(abs(each.probabilities.sum() - 1) < 1e-12 for each in found)
    for each in found:
        tiles = drawn[each.patient_id].row()["tile_index"]
        assert [tuple(tile) for tile in each.tiles] == [tuple(tile.values()) for tile in tiles]

    bases = {each.patient_id: Basis(f"hash of {each.patient_id}", len(each.attention), 0, 1) for each in found}
    bases = {"none": Basis("none's", 0, 2, 3)} | bases  # in any order
    card = ModelCard("model", model.spec, (), (0.5, 0.3, 0.2), "", 0, "drawn", (), {}, 0, {})
    rows = as_table([*found, prior_prediction("none", card.prior)], bases, card, "run").to_pylist()
    assert {(row["model_id"], row["encoder"], row["run_id"]) for row in rows} == {("model", "drawn", "run")}
    assert [row["n_images_failed"] for row in rows] == [0] * 7 + [2]
    assert [row["n_images_without_tiles"] for row in rows] == [1] * 7 + [3]
    assert [row["params_hash"] for row in rows] == [*(f"hash of {each.patient_id}" for each in found), "none's"]
    assert [row["from_prior"] for row in rows] == [False] * 7 + [True]
    assert rows[-1]["attention"] == [] and rows[-1]["n_tiles"] == 0 and rows[-1]["predicted_class"] is None
    assert [row["predicted_class"] for row in rows[:-1]] == [
        CLASSES[int(each.probabilities.argmax())] for each in found
    ]
    first = rows[0]
    assert dict(first["probabilities"]) == dict(zip(CLASSES, found[0].probabilities, strict=True))
    assert [tile["x_px"] for tile in first["attention"]] == [448 * i for i in range(first["n_tiles"])]
    assert [tile["attention"] for tile in first["attention"]] == pytest.approx(found[0].attention.tolist())


def test_the_submission_has_a_sorted_row_a_patient_and_each_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    drawn = {f"p{i}": dict(zip(CLASSES, rng.dirichlet(np.ones(3)), strict=True)) for i in (2, 10, 1)}
    header, *rows = list(csv.reader(submission_csv(drawn, CLASSES, ["p10"]).decode().splitlines()))
    assert header == ["patient_id", *CLASSES, "from_prior"]
    assert [row[0] for row in rows] == ["p1", "p10", "p2"]
    for patient_id, *cells, from_prior in rows:
        assert from_prior == ("true" if patient_id == "p10" else "false")
        assert [float(cell) for cell in cells] == list(drawn[patient_id].values())
        assert abs(sum(map(float, cells)) - 1) < 1e-12


def test_the_settings_that_differ_are_named_and_only_those_that_shape_features() -> None:
    def recipe(**sections: object) -> dict[str, str]:
        config = Config.model_validate({"patients": "p.csv", "output": {"root": "t"}, **sections})
        return Identity(config).recipe("efficientnet_b0")

    known = recipe(tiling={"mpp": 0.5}) | {"encoder.weights": "abc"}
    assert (
        differences(recipe(tiling={"mpp": 0.5, "seed": 3}, inference={"batch_size": 7}, run={"unit_tiles": 3}), [known])
        == []
    )
    assert differences(recipe(), [known]) == ["tiling.mpp is null, not 0.5"]
    assert differences(recipe(), [known, recipe()]) == []
    assert differences(known | {"encoder.weights": "xyz"}, [known, recipe()]) == ["encoder.weights is xyz, not abc"]
    assert differences(recipe(tiling={"max_tiles_per_patient": 9}), [recipe()]) == [
        "tiling.max_tiles_per_patient is 9, not null"
    ]
    assert differences(recipe(), [recipe(tiling={"max_tiles_per_patient": 9})]) == [
        "tiling.max_tiles_per_patient is null, not 9"
    ]
    assert differences(
        recipe(tiling={"max_tiles_per_patient": 9}), [recipe(tiling={"max_tiles_per_patient": 9, "seed": 1})]
    ) == ["tiling.seed is 0, not 1"]

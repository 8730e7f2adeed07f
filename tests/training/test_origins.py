"""How the bags of a training set were made: recipes, mixed vectors, settings, licence."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.training.labelled import CohortError, TrainingSet, read_training_set
from jobs.training.origins import Origins, n_different, read_origins
from tests.training.cohorts import Drawn, Signal, draw_cohort, runs_table, write_patients

RECIPE = {
    "encoder.model": "uni",
    "encoder.weights": "abc",
    "encoder.precision": "fp32",
    "stain.weights": "null",
    "tiling.tile_px": "448",
    "tiling.mpp": "0.5",
    "code.slides": "1",
}
ORIGIN = {"licence": "CC-BY-NC", "licence.commercial": "false", "revision": "main", "sha256": "f" * 64}


@pytest.fixture
def patients() -> list[Drawn]:
    """Their rows are of run "drawn" and of encoder "drawn"."""
    return draw_cohort(20, Signal(dim=4, bag=(5, 8)))


def _written_by(found: TrainingSet, run_id: str) -> TrainingSet:
    first, *others = found.splits["train"]
    return replace(found, splits=found.splits | {"train": [replace(first, run_id=run_id), *others]})


def test_a_model_knows_the_recipes_of_its_encoder(patients: list[Drawn], tmp_path: Path) -> None:
    found = read_training_set(str(write_patients(tmp_path, patients)), None)
    assert read_origins(found, str(tmp_path / "runs")) == Origins((), {})
    settings = {"encoders": {"drawn": {"model": "uni"}}, "tiling": {"mpp": 0.5}}
    later = {"drawn": RECIPE | {"tiling.tile_px": "224"}}
    uri = runs_table(tmp_path, {"old": None, "drawn": {"other": {}, "drawn": RECIPE}, "later": later}, settings)
    assert read_origins(found, uri) == Origins((RECIPE,), settings)
    assert read_origins(replace(found, encoder="none"), uri) == Origins((), {})


def test_rows_of_a_run_that_was_killed_are_trained_on_only_when_one_has_ended_since(
    patients: list[Drawn], tmp_path: Path
) -> None:
    found = read_training_set(str(write_patients(tmp_path, patients)), None)
    runs = {"old": None, "20260102T000000-aaaaaa": {"drawn": RECIPE}, "20260105T000000-dddddd": {"other": RECIPE}}
    uri = runs_table(tmp_path, runs)
    assert read_origins(_written_by(found, "20260101T000000-bbbbbb"), uri).recipes == (RECIPE,)
    with pytest.raises(CohortError, match=r"20260103T000000-cccccc .* left no record, so it was killed"):
        # a later run of another encoder rebuilt none of these rows
        read_origins(_written_by(found, "20260103T000000-cccccc"), uri)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.model", "uni2-h"),
        ("encoder.weights", "def"),
        ("encoder.precision", "bf16 by torch"),
        ("stain.weights", "abc"),
        ("tiling.tile_px", "224"),
        ("tiling.mpp", "1.0"),
    ],
)
def test_vectors_of_different_settings_are_not_mixed(
    patients: list[Drawn], tmp_path: Path, name: str, value: str
) -> None:
    found = read_training_set(str(write_patients(tmp_path, patients)), None)
    uri = runs_table(tmp_path, {"old": None, "drawn": {"drawn": RECIPE}, "next": {"drawn": RECIPE | {name: value}}})
    one, other = sorted([RECIPE[name], value])
    with pytest.raises(CohortError, match=rf"bags of encoder drawn .*: {name} is {one} or {other}: run the main job"):
        read_origins(_written_by(found, "next"), uri)
    assert read_origins(found, uri).recipes == (RECIPE,)  # of the rows that are trained on, none is of the other run


def test_bags_of_other_settings_beside_are_counted_and_where_an_encoder_comes_from_is_not(
    patients: list[Drawn], tmp_path: Path
) -> None:
    found = read_training_set(str(write_patients(tmp_path, patients)), None)
    for value, n in ({"code.slides": "2"}, 2), (ORIGIN, 1):
        root = tmp_path / str(n)
        uri = runs_table(root, {"old": None, "drawn": {"drawn": RECIPE}, "next": {"drawn": RECIPE | value}})
        recipes = read_origins(_written_by(found, "next"), uri).recipes
        assert len(recipes) == 2 and n_different(recipes) == n

"""tiling.max_tiles_per_patient: a deterministic sample, kept right when the limit or the patient's slides change."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import config_in, preprocess_in
from tests.slides.damage import BAD_SLIDES
from tests.spark.conftest import COHORT, TABLES, Again, Done, Finished, by, rows_of, unchanged

LIMIT = 3


@pytest.fixture(scope="module")
def limited(
    spark: SparkSession, finished: Finished, encoder_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """The finished tables after the limit was lowered from none to 3."""
    folder = tmp_path_factory.mktemp("limited")
    shutil.copytree(finished.config.output.root, folder / "tables")
    config = config_in(
        folder,
        finished.slides,
        encoder_weights,
        COHORT,
        tiling={"max_background": 0.5, "max_tiles_per_patient": LIMIT},
        run={"unit_tiles": 3},
    )
    return Done(preprocess_in(spark, config), config)


def bags(config: Config) -> dict[str, set[tuple[Any, ...]]]:
    """The tiles of each patient's bag; features must hold just these."""
    patients = by(rows_of(config, "patients"), "patient_id")
    result = {name: {tuple(place.values()) for place in row["tile_index"]} for name, row in patients.items()}
    assert all(patients[name]["n_tiles"] == len(places) for name, places in result.items())
    features = {(row["image_id"], row["x_px"], row["y_px"]) for row in rows_of(config, "features")}
    assert features == set().union(*result.values())
    return result


def test_a_lower_limit_keeps_a_subset_and_encodes_nothing(finished: Finished, limited: Done) -> None:
    before, after = bags(finished.config), bags(limited.config)
    assert {name: len(places) for name, places in after.items()} == {
        name: min(len(places), LIMIT) for name, places in before.items()
    }
    assert all(after[name] <= before[name] for name in before) and len(before["001"]) > LIMIT
    assert limited.run.record.counts["tiles_encoded"] == limited.run.record.counts["slides_processed"] == 0
    assert rows_of(limited.config, "tiles") == rows_of(finished.config, "tiles")


def test_a_higher_limit_adds_to_the_sample(spark: SparkSession, limited: Done, again: Again) -> None:
    config = again(tables=Path(limited.config.output.root), tiling={"max_tiles_per_patient": 5})
    run = preprocess_in(spark, config)
    before, after = bags(limited.config), bags(config)
    assert all(before[name] <= after[name] for name in before)
    assert run.record.counts["tiles_encoded"] == sum(len(after[name] - before[name]) for name in before) > 0
    with unchanged(config, *TABLES):
        assert preprocess_in(spark, config).record.counts["waves"] == 0


def test_slides_added_removed_and_moved_are_sampled_with_the_rest(
    spark: SparkSession, finished: Finished, limited: Done, again: Again, tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    shutil.copytree(finished.slides, slides)
    shutil.copy(slides / "a2.tif", slides / "b2.tif")
    shutil.copy(slides / "a1.tif", slides / "b3.tif")
    rows = {row[0]: row for row in COHORT}
    del rows["a1"]  # of 001, whose other slide is a2
    rows["b2"], rows["b3"] = ("b2", "south", "002", 1, "LAA"), ("b3", "south", "002", 2, "LAA")
    rows["m1"] = ("m1", "south", "006", 0, None)  # was 007's
    settings = {"max_tiles_per_patient": LIMIT}
    config = again(list(rows.values()), slides, Path(limited.config.output.root), tiling=settings)
    preprocess_in(spark, config)
    after = bags(config)
    shutil.rmtree(config.output.root)
    preprocess_in(spark, config)
    assert after == bags(config)  # as a run from nothing would have it
    assert len(after["001"]) == len(after["002"]) == LIMIT


def test_a_slide_whose_tiles_do_not_decode_does_not_end_the_run(
    spark: SparkSession, finished: Finished, limited: Done, again: Again, tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    shutil.copytree(finished.slides, slides)
    BAD_SLIDES["flipped_tile_data"](finished.slides / "a1.tif", slides, "a1")
    (tmp_path / "tables").mkdir()
    rows = [row for row in COHORT if row[2] in ("001", "009")]
    config = again(rows, slides, tiling={"max_tiles_per_patient": LIMIT})
    preprocess_in(spark, config)
    slide = by(rows_of(config, "slides"), "image_id")["a1"]
    assert (slide["status"], slide["error_code"]) == ("failed", "tile_data_corrupt")
    after = bags(config)
    sample = bags(limited.config)["001"]
    assert {image_id for image_id, _, _ in sample} == {"a1", "a2"}
    assert after["001"] == {place for place in sample if place[0] == "a2"}  # nobody moves up
    patient = by(rows_of(config, "patients"), "patient_id")["001"]
    assert (patient["complete"], patient["n_images_failed"]) == (False, 1)
    with unchanged(config, *(name for name in TABLES if name != "runs")):
        assert preprocess_in(spark, config).record.counts["waves"] == 0

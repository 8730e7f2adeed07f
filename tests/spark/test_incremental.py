"""Run again: what changed is redone, and nothing else. Every test starts from copies of one finished run's tables."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tifffile
from deltalake import DeltaTable
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config
from tests.conftest import config_in, preprocess_in
from tests.slides.make import write_slide
from tests.slides.oracle import kept_tiles
from tests.spark.conftest import COHORT, TABLES, Again, Done, Finished, by, rows_of, unchanged, versions, without

Row = dict[str, Any]
Key = tuple[str, int, int]


def keys(rows: list[Row]) -> set[Key]:
    return {(row["image_id"], row["x_px"], row["y_px"]) for row in rows}


def written_by(run: Run, name: str, column: str) -> set[str]:
    return {row[column] for row in rows_of(run.config, name) if row["run_id"] == run.record.run_id}


def check_bags(config: Config) -> None:
    """Tables features, tiles and patients agree with each other."""
    features = rows_of(config, "features")
    assert keys(features) <= keys(rows_of(config, "tiles"))
    bags = {
        row["patient_id"]: {tuple(place.values()) for place in row["tile_index"]} for row in rows_of(config, "patients")
    }
    assert bags == {
        patient_id: keys([row for row in features if row["patient_id"] == patient_id])
        for patient_id in {row["patient_id"] for row in features}
    }


def test_with_nothing_changed_nothing_is_read_encoded_or_written(
    spark: SparkSession, finished: Finished, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = again()
    with unchanged(config, *TABLES):
        for stage in ("jobs.slides.find_tissue", "jobs.features.encode_tiles", "jobs.patients.bag_patient"):
            monkeypatch.setattr(stage, None)  # to call it would be an error
        run = preprocess_in(spark, config)
    assert (
        run.record.counts["waves"] == run.record.counts["tiles_encoded"] == run.record.counts["slides_processed"] == 0
    )
    run.write_record("done")
    assert versions(config) == versions(finished.config) | {"runs": versions(finished.config)["runs"] + 1}


@pytest.fixture(scope="module")
def changed(
    spark: SparkSession,
    finished: Finished,
    pixels: NDArray[Any],
    encoder_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    """One run after something else happened to each patient of the finished run but 005 and 009."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(finished.config.output.root, folder / "tables")
    shutil.copytree(finished.slides, folder / "slides")
    for name, top in (("c2", 896), ("f1", 1344), ("d1", 1792)):  # d1 is replaced
        write_slide(folder / "slides" / f"{name}.tif", pixels[top : top + 448, 896:1792], compression="lzw")
    rows = {row[0]: row for row in COHORT}
    del rows["a2"]  # of patient 001
    rows["b1"] = ("b1", "south", "002", 0, "CE")  # was LAA
    rows["c2"] = ("c2", "south", "003", 1, "CE")  # new, patient known
    rows["f1"] = ("f1", "east", "006", 0, "LAA")  # new, patient new
    rows["m2"] = ("m2", "south", "008", 0, None)  # was 007's
    config = config_in(
        folder,
        folder / "slides",
        encoder_weights,
        list(rows.values()),
        tiling={"max_background": 0.5},
        run={"unit_tiles": 3, "wave_slides": 100},
    )
    return Done(preprocess_in(spark, config), config)


def test_only_slides_that_are_new_moved_or_replaced_are_processed(changed: Done) -> None:
    redone = {"c2", "f1", "d1", "m2"}
    assert written_by(changed.run, "slides", "image_id") == redone
    assert written_by(changed.run, "tiles", "image_id") == redone
    assert written_by(changed.run, "indexes", "image_id") == redone
    assert written_by(changed.run, "features", "image_id") == redone
    assert changed.run.record.counts["slides_processed"] == len(redone)
    encoded = [row for row in rows_of(changed.config, "features") if row["image_id"] in redone]
    assert changed.run.record.counts["tiles_encoded"] == len(encoded)


def test_only_patients_whose_slides_changed_are_rebuilt(changed: Done) -> None:
    assert written_by(changed.run, "patients", "patient_id") == {"001", "002", "003", "004", "006", "007", "008"}
    assert set(by(rows_of(changed.config, "patients"), "patient_id")) - {"009"} == {
        "001",
        "002",
        "003",
        "004",
        "006",
        "007",
        "008",
    }
    check_bags(changed.config)


def test_a_corrected_label_reaches_slides_and_patients_without_reading_pixels(
    finished: Finished, changed: Done
) -> None:
    before, after = (by(rows_of(config, "slides"), "image_id")["b1"] for config in (finished.config, changed.config))
    assert (before["label"], after["label"]) == ("LAA", "CE")
    assert without([before], "label", "uri") == without([after], "label", "uri")  # the folder is a copy
    patient = by(rows_of(changed.config, "patients"), "patient_id")["002"]
    assert patient["label"] == "CE"
    assert patient["embeddings"] == by(rows_of(finished.config, "patients"), "patient_id")["002"]["embeddings"]


def test_an_image_that_its_patient_no_longer_has_is_in_no_table(changed: Done) -> None:
    for name in ("slides", "tiles", "indexes", "features"):
        assert "a2" not in {row["image_id"] for row in rows_of(changed.config, name)}
    patient = by(rows_of(changed.config, "patients"), "patient_id")["001"]
    assert patient["n_images"] == 1 and {place["image_id"] for place in patient["tile_index"]} == {"a1"}


def test_an_image_that_moved_is_its_new_patients_alone(changed: Done) -> None:
    for name in ("slides", "tiles", "features"):
        assert {row["patient_id"] for row in rows_of(changed.config, name) if row["image_id"] == "m2"} == {"008"}
    patients = by(rows_of(changed.config, "patients"), "patient_id")
    assert {place["image_id"] for place in patients["007"]["tile_index"]} == {"m1"}
    assert {place["image_id"] for place in patients["008"]["tile_index"]} == {"m2"}
    assert (patients["007"]["n_images"], patients["008"]["n_images"]) == (1, 1)


def test_a_file_replaced_under_its_name_is_read_anew(finished: Finished, changed: Done) -> None:
    before, after = (by(rows_of(config, "slides"), "image_id")["d1"] for config in (finished.config, changed.config))
    assert before["file_version"] != after["file_version"]
    assert (after["width_px"], after["height_px"]) == (896, 448)
    path = Path(changed.config.slides.root or "") / "d1.tif"
    expected = {("d1", int(x), int(y)) for x, y in kept_tiles(tifffile.imread(path), max_background=0.5)}
    assert {key for key in keys(rows_of(changed.config, "features")) if key[0] == "d1"} == expected


def test_after_the_changes_there_is_nothing_to_do(spark: SparkSession, changed: Done) -> None:
    with unchanged(changed.config, *TABLES):
        assert preprocess_in(spark, changed.config).record.counts["waves"] == 0


def test_another_brightness_redoes_tiles_and_encodes_only_those_that_are_new(
    spark: SparkSession, finished: Finished, again: Again
) -> None:
    config = again(tissue={"background_brightness": 205})
    before = keys(rows_of(finished.config, "tiles"))
    run = preprocess_in(spark, config)
    after = keys(rows_of(config, "tiles"))
    assert after - before and after & before
    assert written_by(run, "slides", "image_id") == {row[0] for row in COHORT}
    assert run.record.counts["tiles_encoded"] == len(after - before)
    features = rows_of(config, "features")
    assert keys(features) == after
    assert keys([row for row in features if row["run_id"] == run.record.run_id]) == after - before
    check_bags(config)


def test_tables_that_a_kill_left_half_way_heal(spark: SparkSession, finished: Finished, again: Again) -> None:
    config = again()
    killed = {  # between which commits: what is missing
        "tiles and indexes": ("indexes", "image_id = 'a2'"),
        "indexes and slides": ("slides", "image_id IN ('a1', 'a2')"),
        "slides and features": ("features", "image_id = 'b1'"),
        "features and patients": ("patients", "patient_id = '003'"),
    }
    for name, missing in killed.values():
        assert DeltaTable(f"{config.output.root}/{name}").delete(missing)["num_deleted_rows"] >= 1
    run = preprocess_in(spark, config)
    for name in ("slides", "tiles", "indexes", "features", "patients"):
        assert without(rows_of(config, name), "run_id") == without(rows_of(finished.config, name), "run_id")
    assert run.record.counts["slides_processed"] == 2


def test_tiles_that_are_measured_anew_in_their_place_are_not_encoded_again(spark: SparkSession, again: Again) -> None:
    config = again(tiling={"max_background": 0.5 + 1e-9})  # keeps the same tiles
    with unchanged(config, "features", "patients"):
        run = preprocess_in(spark, config)
    assert run.record.counts["slides_processed"] == len(COHORT) and run.record.counts["tiles_encoded"] == 0
    assert written_by(run, "tiles", "image_id") == {row["image_id"] for row in rows_of(config, "features")}
    with unchanged(config, *TABLES):
        assert preprocess_in(spark, config).record.counts["waves"] == 0

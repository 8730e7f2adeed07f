"""One of each bad slide among good ones: each is a row that says what to do, and nobody else's rows change."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import SMALL_COHORT, preprocess_in, write_csv
from tests.faults.frames import assert_same_rows, frames, versions
from tests.slides.damage import BAD_SLIDES, flipped_tile_data
from tests.slides.make import write_slide

FLAT = "flipped_tile_data_flat"  # the same damage in a slide without a pyramid

EXPECTED = {
    # name: (error_code, remedy)
    "missing": ("file_missing", "upload it"),
    "zero_bytes": ("file_empty", "upload it again"),
    "truncated": ("file_truncated", "upload it again"),
    "truncated_directory": ("file_truncated", "upload it again"),
    "flipped_header": ("not_a_slide", "upload the slide itself"),
    "flipped_tile_data": ("tile_data_corrupt", "upload or scan the slide again"),
    FLAT: ("tile_data_corrupt", "upload or scan the slide again"),
    "text_as_svs": ("not_a_slide", "upload the slide itself"),
    "jpeg_as_tif": ("not_a_slide", "upload the slide itself"),
    "bad_directory_entry": ("header_corrupt", "upload the slide again"),
    "sixteen_bit": ("unsupported_format", "convert it"),
    "huge_header": ("size_implausible", "upload or export the slide again"),
}

# Further images of patients that have a good one; every other bad slide is all that its patient has.
FURTHER_IMAGES = {
    "flipped_tile_data": ("south", "002", 1, "LAA"),
    "zero_bytes": ("south", "002", 2, "LAA"),
    "no_tissue": ("south", "003", 1, "CE"),
}
# Of a patient, what further images change.
BEFORE = ["n_images", "n_images_failed", "n_images_without_tiles", "complete", "params_hash"]


@dataclass(frozen=True)
class Cohort:
    """What two runs wrote: one of the good slides alone, one of all; and how to run the latter again."""

    config: Config
    folder: Path
    good: dict[str, pl.DataFrame]
    found: dict[str, pl.DataFrame]

    @property
    def root(self) -> Path:
        return Path(self.config.output.root)

    def slide(self, name: str) -> dict[str, Any]:
        return self.found["slides"].row(by_predicate=pl.col("image_id") == name, named=True)

    def patient(self, name: str) -> dict[str, Any]:
        return self.found["patients"].row(by_predicate=pl.col("patient_id") == name, named=True)


@pytest.fixture(scope="module")
def cohort(
    spark: SparkSession,
    pixels: NDArray[Any],
    small_slides: Path,
    encoder_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cohort:
    place = tmp_path_factory.mktemp("bad")
    folder = place / "slides"
    folder.mkdir()
    for good in small_slides.glob("*.tif"):
        (folder / good.name).hardlink_to(good)
    pyramid = small_slides / "a1.tif"
    flat = write_slide(place / "flat.tif", pixels[:1856, :1408], compression="jpeg")
    for name, make in BAD_SLIDES.items():
        make(pyramid, folder, name)
    flipped_tile_data(flat, folder, FLAT)
    names = [*BAD_SLIDES, FLAT]
    alone = {name: ("north", f"9{number:02}", 0, "CE") for number, name in enumerate(names)}
    bad = [(name, *(alone | FURTHER_IMAGES)[name]) for name in names]

    def config(name: str, rows: list[tuple[Any, ...]]) -> Config:
        settings = {
            "patients": str(write_csv(place / f"{name}.csv", rows)),
            "slides": {"root": str(folder)},
            "output": {"root": str(place / name)},
            "tiling": {"max_background": 0.8},
            "encoders": {"test_efficientnet": {"weights": str(encoder_weights), "input_px": 96}},
            "inference": {"device": "cpu"},
        }
        return Config.model_validate(settings)

    good_only, everything = config("good", SMALL_COHORT), config("all", [*SMALL_COHORT, *bad])
    preprocess_in(spark, good_only)
    preprocess_in(spark, everything)
    found = frames(Path(everything.output.root))
    return Cohort(everything, folder, frames(Path(good_only.output.root)), found)


def test_every_kind_of_bad_slide_is_tried() -> None:
    assert set(EXPECTED) | {"no_tissue"} == {*BAD_SLIDES, FLAT}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_bad_slide_is_one_failed_row_that_names_the_file_and_the_remedy(cohort: Cohort, name: str) -> None:
    code, remedy = EXPECTED[name]
    row = cohort.slide(name)
    assert (row["status"], row["error_code"]) == ("failed", code)
    assert name in row["error_message"]
    assert remedy in row["error_message"]
    assert "\n" not in row["error_message"]


def test_a_slide_of_glass_is_no_failure(cohort: Cohort) -> None:
    row = cohort.slide("no_tissue")
    assert (row["status"], row["error_code"], row["n_tiles"]) == ("no_tissue", None, 0)
    patient = cohort.patient("003")
    assert (patient["n_images"], patient["n_images_failed"], patient["n_images_without_tiles"]) == (2, 0, 1)
    assert patient["complete"] is False


def test_every_row_of_the_csv_is_one_row_of_slides(cohort: Cohort) -> None:
    images = [row[0] for row in SMALL_COHORT] + [*BAD_SLIDES, FLAT]
    assert cohort.found["slides"]["image_id"].to_list() == sorted(images)


@pytest.mark.parametrize("table", ["slides", "tiles", "indexes", "features"])
def test_rows_of_good_slides_are_those_of_a_run_without_bad_ones(cohort: Cohort, table: str) -> None:
    good = [row[0] for row in SMALL_COHORT]
    assert cohort.good[table].height >= len(good)
    assert_same_rows(cohort.found[table].filter(pl.col("image_id").is_in(good)), cohort.good[table])


def test_rows_of_good_patients_are_those_of_a_run_without_bad_slides(cohort: Cohort) -> None:
    same, both = ["001", "004"], ["001", "002", "003", "004"]
    assert cohort.found["patients"]["patient_id"].to_list() == both, "a patient without a tile has no row"
    of_good = pl.col("patient_id").is_in(same)
    assert_same_rows(cohort.found["patients"].filter(of_good), cohort.good["patients"].filter(of_good))
    assert_same_rows(cohort.found["patients"].drop(BEFORE), cohort.good["patients"].drop(BEFORE))


def test_a_patient_with_failed_images_is_incomplete_and_says_how_many(cohort: Cohort) -> None:
    patient = cohort.patient("002")
    assert (patient["n_images"], patient["n_images_failed"], patient["complete"]) == (3, 2, False)


def test_damage_under_the_finest_level_is_met_in_the_features_pass_and_leaves_no_features(cohort: Cohort) -> None:
    row = cohort.slide("flipped_tile_data")
    of_slide = pl.col("image_id") == "flipped_tile_data"
    assert row["n_tiles"] > 0, "the mask, from a coarser level, was whole"
    assert cohort.found["tiles"].filter(of_slide).height == row["n_tiles"]
    assert cohort.found["features"].filter(of_slide).is_empty()
    assert cohort.slide(FLAT)["n_tiles"] == 0, "without a pyramid, the mask itself meets the damage"


def test_a_second_run_redoes_nothing_and_mended_slides_are_taken_up(spark: SparkSession, cohort: Cohort) -> None:
    before = versions(cohort.root)
    again = preprocess_in(spark, cohort.config)
    assert (again.record.counts["slides_processed"], again.record.counts["tiles_encoded"]) == (0, 0)
    assert versions(cohort.root) == before

    whole = (cohort.folder / "a1.tif").read_bytes()
    for name in [*BAD_SLIDES, FLAT]:
        path = next(cohort.folder.glob(f"{name}.*"), cohort.folder / f"{name}.tif")
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns) if path.exists() else None
        path.write_bytes(whole)
        if times and name == "flipped_tile_data":  # same size, same time: only --retry-failed makes it read again
            os.utime(path, ns=times)
    preprocess_in(spark, cohort.config, retry_failed=True)

    mended = frames(cohort.root)
    assert set(mended["slides"]["status"]) == {"ok"}
    assert mended["slides"]["error_code"].is_null().all()
    assert mended["slides"]["error_message"].is_null().all()
    assert mended["patients"]["complete"].all()
    assert mended["patients"]["n_images_failed"].sum() == mended["patients"]["n_images_without_tiles"].sum() == 0
    assert mended["patients"].height == len({row[2] for row in SMALL_COHORT}) + len(EXPECTED) - 2
    pixels_only = ["x_px", "y_px", "embedding", "embedding_max", "color_histogram"]
    original = mended["features"].filter(pl.col("image_id") == "a1").select(pixels_only)
    for name in [*BAD_SLIDES, FLAT]:
        assert_same_rows(mended["features"].filter(pl.col("image_id") == name).select(pixels_only), original)

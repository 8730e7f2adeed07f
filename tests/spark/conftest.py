"""What the tests with a session share: tables of one finished run, which a test copies before it changes them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config
from tests.conftest import SMALL_COHORT, config_in, preprocess_in
from tests.slides.make import write_slide

SECRET = "Zm9vYmFyYmF6cXV4c2VjcmV0"
TABLES = ("slides", "tiles", "indexes", "features", "patients", "runs")
COHORT: list[tuple[Any, ...]] = [
    *SMALL_COHORT,
    ("gone", "north", "004", 1, "LAA"),  # no such file: patient 004 is incomplete
    ("e1", "south", "005", 0, "CE"),  # nor this: patient 005 has no tile
    ("m1", "south", "007", 0, None),
    ("m2", "south", "007", 1, None),
    ("k1", "south", "009", 0, None),
]


Again = Callable[..., Config]  # what fixture `again` gives


def in_shared_session(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of jobs run in this session, and leave it on."""
    monkeypatch.setattr("jobs.runtime.run.cli.start_session", lambda name: spark)
    monkeypatch.setattr(spark, "stop", lambda: None)


@dataclass(frozen=True)
class Done:
    """A run that is done, and its settings."""

    run: Run
    config: Config


@dataclass(frozen=True)
class Finished(Done):
    """The run that other tests start from, with its slides; read them only."""

    slides: Path


@pytest.fixture(scope="session")
def finished(
    spark: SparkSession,
    small_slides: Path,
    pixels: NDArray[Any],
    encoder_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """The main job on a cohort of 8 slides and 2 missing files: work units of 3 tiles, two waves."""
    folder = tmp_path_factory.mktemp("finished")
    slides = folder / "slides"
    shutil.copytree(small_slides, slides)
    for name, top in (("m1", 1792), ("m2", 1344), ("k1", 896)):
        write_slide(slides / f"{name}.tif", pixels[top : top + 448, 896:1792], compression="deflate")
    config = config_in(
        folder,
        slides,
        encoder_weights,
        COHORT,
        tiling={"max_background": 0.5},
        run={"unit_tiles": 3, "wave_slides": 6},
        slides={"storage_options": {"account_key": SECRET}},
    )
    run = preprocess_in(spark, config)
    run.write_record("done")
    return Finished(run, config, slides)


@pytest.fixture
def again(finished: Finished, encoder_weights: Path, tmp_path: Path) -> Again:
    """Copy the finished tables into the test's folder and make settings that differ in what is given."""

    def make(
        rows: list[tuple[Any, ...]] | None = None,
        root: Path | None = None,
        tables: Path | None = None,
        **sections: dict[str, Any],
    ) -> Config:
        if not (tmp_path / "tables").exists():
            shutil.copytree(tables or finished.config.output.root, tmp_path / "tables")
        tiling = {"max_background": 0.5} | sections.pop("tiling", {})
        sections = {"run": {"unit_tiles": 3}} | sections
        return config_in(
            tmp_path,
            root or finished.slides,
            encoder_weights,
            COHORT if rows is None else rows,
            tiling=tiling,
            **sections,
        )

    return make


def rows_of(config: Config, name: str) -> list[dict[str, Any]]:
    """All rows of a table, read without Spark, ordered by key; doubled keys are an error."""
    frame = pl.read_delta(f"{config.output.root}/{name}")
    tile = ["image_id", "y_px", "x_px"]
    of_table = {
        "tiles": tile,
        "features": [*tile, "encoder"],
        "patients": ["patient_id", "encoder"],
        "runs": ["run_id"],
    }
    keys = of_table.get(name, ["image_id"])
    assert not frame.select(keys).is_duplicated().any(), f"doubled keys in {name}"
    return frame.sort(keys).to_dicts()


def by(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows by a unique column."""
    return {row[key]: row for row in rows}


def versions(config: Config) -> dict[str, int]:
    """The Delta version of each table, read without Spark."""
    return {name: DeltaTable(f"{config.output.root}/{name}").version() for name in TABLES}


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    """The rows less some columns."""
    return [{key: value for key, value in row.items() if key not in columns} for row in rows]


@contextmanager
def unchanged(config: Config, *names: str) -> Iterator[None]:
    """Assert that these tables get no new version."""
    before = versions(config)
    yield
    after = versions(config)
    assert {name: after[name] for name in names} == {name: before[name] for name in names}

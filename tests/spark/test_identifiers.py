"""Identifiers and labels of characters that SQL, its variables, LIKE, Spark or a path give a meaning to: text, and no more."""

import csv
import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.runtime.settings.config import Config
from jobs.runtime.tables.catalog import literal, sql_name
from jobs.runtime.tables.tables import Tables, spark_schema
from tests.conftest import TILE_PX, config_in, preprocess_in
from tests.slides.make import write_slide
from tests.spark.conftest import by, rows_of, without
from udfs.schemas import PREDICTIONS

VARIABLES = ["x${system:user.name}", "x${spark.app.name}", "x${spark:spark.app.name}", "x${hiveconf:spark.app.name}"]
ODD = [
    *VARIABLES,
    "y${env:USER_OF_TEST}",
    "${",
    "$k",
    "{k}",
    "k'",
    "''",
    'k"',
    "k`",
    "k%",
    "k_",
    "k*",
    "k?",
    "[k]",
    "k;",
    "-- k",
    "k) OR (1=1",
    "' OR '1'='1",
    "k, l",
    "k:l",
    "k+l",
    "k=l",
    "%41",
    "k#1",
    "NULL",
    "image_id",
    "true",
    "1e3",
    "~k",
    "!k|&^@<>",
    "künï",
    "漢字",
    "🔬",
    "X'6b'",
    "U00000024",
]
IN_ONE_RUN = [
    *VARIABLES[:2],
    "y${env:USER_OF_TEST}",
    "k' OR '1'='1",
    "k%_*?[1]{2}",
    'k`"',
    "%41;-- #",
    "künï 漢字🔬",
    "k, l:+=",
]
TAKEN_FOR = [
    "yname",
    "k",
    "kk",
    "A",
    "l",
    "$",
    "a k",
    "k1",
]  # by a reader that gives something in an odd name a meaning
MODELS = ("m${spark.app.name}'", "m")
TABLES = ("slides", "tiles", "indexes", "features")


def _rows(spark: SparkSession) -> list[tuple[str, str, str, int, str]]:
    """Each odd name is an image of patient `odd` and a patient of its own; others have the names that it could be taken for."""
    rows = [(name, "centre", "odd", number, "label") for number, name in enumerate(IN_ONE_RUN)]
    rows += [(f"{name} own", name, name, 0, f"is {name}") for name in IN_ONE_RUN]
    return rows + [(name, "centre", f"patient {name}", 0, "label") for name in _taken_for(spark)]


def _taken_for(spark: SparkSession) -> list[str]:
    return ["x" + getpass.getuser(), "x" + str(spark.conf.get("spark.app.name")), *TAKEN_FOR]


def _config(folder: Path, weights: Path, rows: list[tuple[str, str, str, int, str]], **sections: Any) -> Config:
    config = config_in(folder, folder / "slides", weights, **sections)
    with Path(config.patients).open("w", newline="") as file:
        csv.writer(file).writerows([("image_id", "center_id", "patient_id", "image_num", "label"), *rows])
    return config


def _by_image(config: Config) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(name, row["image_id"]): row for name in TABLES for row in rows_of(config, name)}
    return found | {("patients", row["patient_id"]): row for row in rows_of(config, "patients")}


@pytest.fixture(scope="module", autouse=True)
def _variable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USER_OF_TEST", "name")
        yield


def test_rows_of_an_odd_name_are_its_own_and_nobody_elses(
    spark: SparkSession, pixels: NDArray[Any], encoder_weights: Path, tmp_path: Path
) -> None:
    rows = _rows(spark)
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slide.tif", pixels[1792 : 1792 + TILE_PX, 896 : 896 + TILE_PX], compression="jpeg")
    for image_id, *_ in rows:
        os.link(tmp_path / "slide.tif", tmp_path / "slides" / f"{image_id}.tif")
    settings: dict[str, Any] = {"tiling": {"max_background": 1.0}, "run": {"wave_slides": 1000}}
    config = _config(tmp_path, encoder_weights, rows, **settings)
    preprocess_in(spark, config)
    before = _by_image(config)
    slides = by(rows_of(config, "slides"), "image_id")
    columns = ("image_id", "center_id", "patient_id", "image_num", "label")
    assert sorted(tuple(row[name] for name in columns) for row in slides.values()) == sorted(rows)
    assert len(before) == len(TABLES) * len(rows) + len({row[2] for row in rows})

    # The odd images leave patient `odd`, all but the last, and a setting changes that shapes features: they are made again.
    kept = [row for row in rows if row[2] != "odd" or row[0] == IN_ONE_RUN[-1]]
    gone = set(IN_ONE_RUN[:-1])
    config = _config(tmp_path, encoder_weights, kept, **settings, histogram={"bins": 8})
    run = preprocess_in(spark, config)
    after = _by_image(config)
    assert before.keys() - after.keys() == {(name, image_id) for name in TABLES for image_id in gone}
    assert after.keys() <= before.keys()
    assert [places["image_id"] for places in after["patients", "odd"]["tile_index"]] == [IN_ONE_RUN[-1]]
    for key, row in after.items():
        if key[0] in ("features", "patients"):
            assert row["run_id"] == run.record.run_id, key
            shaped = ("params_hash", "run_id", "color_histogram")
            assert key == ("patients", "odd") or without([row], *shaped) == without([before[key]], *shaped)
        else:
            assert row == before[key]


@pytest.mark.parametrize("substitutes", ["true", "false"])
def test_rows_are_replaced_by_the_text_of_their_key(spark: SparkSession, tmp_path: Path, substitutes: str) -> None:
    others = _taken_for(spark)
    tables = Tables(spark, str(tmp_path))
    tables.create("predictions")

    def rows(names: list[str], number: int) -> DataFrame:
        found: list[Any] = [
            {"patient_id": name, "model_id": model, "n_tiles": number} for name in names for model in MODELS
        ]
        return spark.createDataFrame(found, spark_schema(PREDICTIONS)).coalesce(1)

    tables.append("predictions", rows(ODD + others, 1))
    with _setting(spark, "spark.sql.variable.substitute", substitutes):
        new = rows(ODD[1:], 2).where(F.col("model_id") == MODELS[0])
        tables.put("predictions", new, "patient_id", ODD[1:], ODD, among=("model_id", MODELS[0]))
    found = {(row.patient_id, row.model_id): row.n_tiles for row in tables.read("predictions").collect()}
    first = dict.fromkeys(others, 1) | dict.fromkeys(ODD[1:], 2)
    assert found == {(name, MODELS[0]): n for name, n in first.items()} | dict.fromkeys(
        ((name, MODELS[1]) for name in ODD + others), 1
    )


@contextmanager
def _setting(spark: SparkSession, key: str, value: str) -> Iterator[None]:
    before = str(spark.conf.get(key))
    spark.conf.set(key, value)
    try:
        yield
    finally:
        spark.conf.set(key, before)


@pytest.mark.parametrize("substitutes", ["true", "false"])
def test_a_literal_is_its_text_whatever_the_session_substitutes(spark: SparkSession, substitutes: str) -> None:
    texts = [*ODD, "a\\b", "\\", "\\'", "\\u0041", "\\N", "a\tb\nc", "/* k */", "", " "]
    with _setting(spark, "spark.sql.variable.substitute", substitutes):
        found = spark.sql("SELECT " + ", ".join(f"{literal(text)} AS c{i}" for i, text in enumerate(texts))).first()
    assert found is not None and list(found) == texts


def test_a_name_is_its_text(spark: SparkSession) -> None:
    names = [name for name in ODD if name]
    found = spark.sql("SELECT " + ", ".join(f"1 AS {sql_name(name)}" for name in names))
    assert found.columns == names


def test_the_session_substitutes_nothing(spark: SparkSession) -> None:
    assert [row[0] for row in spark.sql("SELECT '${spark.app.name}'").collect()] == ["${spark.app.name}"]

"""Bags of float16: half the bytes, the same numbers but for rounding, made of the same features."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from tests.conftest import preprocess_in
from tests.spark.conftest import TABLES, Again, Finished, by, rows_of, unchanged, without

FLOAT16 = {"embedding_dtype": "float16"}


def test_float16_redoes_patients_alone_and_halves_their_bags(
    spark: SparkSession, finished: Finished, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = by(rows_of(finished.config, "patients"), "patient_id")
    largest = max(len(row["embeddings"]) for row in before.values())
    monkeypatch.setattr("jobs.patients.MAX_BAG_BYTES", largest // 2)  # limits count bytes: these bags just fit
    config = again(output=FLOAT16)
    with unchanged(config, "slides", "tiles", "indexes", "features"):
        run = preprocess_in(spark, config)
    assert run.record.problems == [] and run.record.counts["tiles_encoded"] == 0
    assert {row["embedding_dtype"] for row in before.values()} == {"float32"}
    after = DeltaTable(f"{config.output.root}/patients").to_pyarrow_table().to_pylist()
    assert {row["patient_id"] for row in after} == set(before)
    for row in after:
        full = before[row["patient_id"]]
        assert row["embedding_dtype"] == "float16"
        for name in ("embeddings", "embeddings_max"):
            shape = row["n_tiles"], row["embedding_dim"]
            half = np.frombuffer(row[name], row["embedding_dtype"]).reshape(shape)
            wanted = np.frombuffer(full[name], full["embedding_dtype"]).reshape(shape)
            np.testing.assert_allclose(half, wanted, rtol=2**-11, atol=2**-25)  # half a unit in the last place
        changed = ("embedding_dtype", "embeddings", "embeddings_max", "params_hash", "run_id")
        assert without([row], *changed) == without([full], *changed)
    with unchanged(config, *TABLES):
        assert preprocess_in(spark, config).record.counts["waves"] == 0
    monkeypatch.undo()
    config = again(output={"embedding_dtype": "float32"})
    preprocess_in(spark, config)
    assert without(rows_of(config, "patients"), "run_id") == without(list(before.values()), "run_id")


def as_an_older_version_left_it(patients: Path) -> None:
    """The table without column embedding_dtype and without properties of ours."""
    rows: pa.Table = DeltaTable(patients).to_pyarrow_table()
    write_deltalake(patients, rows.drop_columns(["embedding_dtype"]), mode="overwrite", schema_mode="overwrite")
    assert "embedding_dtype" not in {field.name for field in DeltaTable(patients).schema().fields}


def test_rows_of_a_table_from_before_the_column_stay_and_mean_float32(spark: SparkSession, again: Again) -> None:
    config = again()
    before = rows_of(config, "patients")
    as_an_older_version_left_it(Path(config.output.root) / "patients")
    assert preprocess_in(spark, config).record.counts["waves"] == 0
    after = rows_of(config, "patients")
    assert {row["embedding_dtype"] for row in after} == {None}
    assert without(after, "embedding_dtype") == without(before, "embedding_dtype")
    properties = DeltaTable(f"{config.output.root}/patients").metadata().configuration
    assert properties["parquet.block.size"] == str(32 << 20)
    comments = {
        row.col_name: row.comment for row in spark.sql(f"DESCRIBE delta.`{config.output.root}/patients`").collect()
    }
    assert "null is float32" in comments["embedding_dtype"]
    config = again(output=FLOAT16)
    preprocess_in(spark, config)
    assert {row["embedding_dtype"] for row in rows_of(config, "patients")} == {"float16"}


def test_a_patient_with_a_number_beyond_float16_keeps_float32_and_no_other_does(
    spark: SparkSession, finished: Finished, again: Again
) -> None:
    config = again(output=FLOAT16)
    features = f"{config.output.root}/features"
    spark.sql(
        f"UPDATE delta.`{features}` SET embedding_max = transform(embedding_max, v -> 7e4F) WHERE patient_id = '003'"
    )
    assert preprocess_in(spark, config).record.problems == []
    after = by(rows_of(config, "patients"), "patient_id")
    assert after.keys() == by(rows_of(finished.config, "patients"), "patient_id").keys()
    dtypes = {patient: row["embedding_dtype"] for patient, row in after.items()}
    assert dtypes == {patient: "float32" if patient == "003" else "float16" for patient in after}
    assert set(np.frombuffer(after["003"]["embeddings_max"], "<f4")) == {7e4}

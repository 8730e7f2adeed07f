"""Job vectors: rows against a group-by in NumPy, and that a run makes again just what changed. Features are made by hand."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import vectors
from jobs.runtime.run.run import ORIGINS, Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.tables.tables import Tables, spark_schema
from tests.conftest import write_csv
from tests.spark.conftest import in_shared_session
from udfs.schemas import FEATURES, RUNS
from udfs.wsi.aggregator.aggregator import AggregatorSpec, TileBag, load_aggregator

DIMS = {"small": 3, "large": 6, "other": 2}
OWNERS = {"a": "001", "b": "001", "c": "002"}
KEYS = {
    "slide_vectors": ["image_id", "encoder", "aggregator"],
    "patient_vectors": ["patient_id", "encoder", "aggregator"],
}
Vectors = dict[tuple[str, str, str], dict[str, Any]]


def tiles_of(image: str, encoder: str, n_tiles: int, params_hash: str = "h1") -> list[dict[str, Any]]:
    random = np.random.default_rng([*image.encode(), *encoder.encode(), *params_hash.encode()])
    key = {"image_id": image, "encoder": encoder, "patient_id": OWNERS[image]}
    return [
        key
        | {"x_px": 448 * (place % 5), "y_px": 448 * (place // 5), "params_hash": params_hash, "run_id": "r"}
        | {"embedding": random.normal(size=DIMS[encoder]).astype(np.float32).tolist()}
        for place in range(n_tiles)
    ]


class Cohort:
    """Tables of a test with features made by hand, and the job on them."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark, self.folder, self.root = spark, folder, folder / "tables"
        self.rows = [
            row
            for image, n_tiles in (("a", 7), ("b", 4), ("c", 1))
            for encoder in DIMS
            for row in tiles_of(image, encoder, n_tiles)
        ]
        self.write()

    def write(self) -> None:
        """Make table features anew, of two files whose rows are mixed."""
        tables, schema = Tables(self.spark, str(self.root)), spark_schema(FEATURES)
        tables.create("features")
        rows = [tuple(row.get(name) for name in FEATURES.names) for row in self.rows]
        exists = tables.read("features").limit(1).count() > 0
        tables.replace("features", self.spark.createDataFrame(rows[::2] + rows[1::2], schema, verifySchema=False).repartition(2),
                       "image_id IS NOT NULL" if exists else None)  # fmt: skip

    def settings(self, **sections: Any) -> dict[str, Any]:
        csv = write_csv(self.folder / "patients.csv", [(image, "n", owner, 0, None) for image, owner in OWNERS.items()])
        required = {"patients": str(csv), "output": {"root": str(self.root)}, "slides": {"root": str(self.folder)}}
        return (
            required
            | {"encoders": {"small": {"model": "efficientnet_b0"}, "large": {"model": "vit_tiny_patch16_224"}}}
            | sections
        )

    def run(self, **sections: Any) -> Run:
        """Run the job, without the command around it."""
        run = Run(Config.model_validate(self.settings(**sections)), self.spark, vectors.JOB)
        run.tables.open(*vectors.JOB.tables)
        self.status = vectors.aggregate(run, Namespace())
        return run

    def vectors(self, table: str) -> Vectors:
        frame = pl.read_delta(f"{self.root}/{table}")
        rows = {tuple(row[name] for name in KEYS[table]): row for row in frame.to_dicts()}
        assert len(rows) == len(frame)
        return rows

    def versions(self) -> list[int]:
        return [DeltaTable(f"{self.root}/{table}").version() for table in KEYS]

    def wanted(self, table: str, encoders: list[str], pool: dict[str, Callable[[list[Any]], Any]]) -> dict[Any, Any]:
        """(n_tiles, vector) by key."""
        of = KEYS[table][0]
        groups: dict[tuple[str, str], list[Any]] = {}
        for row in sorted(self.rows, key=lambda row: (row["image_id"], row["y_px"], row["x_px"])):
            if row["encoder"] in encoders:
                groups.setdefault((row[of], row["encoder"]), []).append(row["embedding"])
        return {(*key, name): (len(each), make(each)) for key, each in groups.items() for name, make in pool.items()}


MEAN_AND_MAX: dict[str, Callable[[list[Any]], Any]] = {
    "mean": lambda each: np.mean(np.array(each, np.float32), 0, dtype=np.float64),
    "max": lambda each: np.max(each, 0),
}


def check(found: Vectors, wanted: dict[Any, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, (n_tiles, vector) in wanted.items():
        assert found[key]["n_tiles"] == n_tiles
        np.testing.assert_allclose(found[key]["vector"], vector, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cohort(spark: SparkSession, tmp_path: Path) -> Cohort:
    return Cohort(spark, tmp_path)


def attention(folder: Path, dim: int = 6, seed: int = 1) -> str:
    torch.manual_seed(seed)
    shapes = {"tile.1": (4, dim), "value": (3, 4), "gate": (3, 4), "score": (1, 3)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_slides_and_patients_have_a_vector_of_each_encoder_and_aggregator_and_only_what_changed_is_made_again(
    cohort: Cohort,
) -> None:
    first = cohort.run()
    assert cohort.status == 0
    for table in KEYS:
        check(cohort.vectors(table), cohort.wanted(table, ["small", "large"], MEAN_AND_MAX))
    slides = cohort.vectors("slide_vectors")
    assert {row["patient_id"] for key, row in slides.items() if key[0] == "b"} == {"001"}
    assert {row["run_id"] for row in slides.values()} == {first.record.run_id}

    versions = cohort.versions()
    again = cohort.run()
    assert cohort.versions() == versions and again.record.counts["slide_vectors_written"] == 0

    # Slide b has other features of one encoder, slide c is gone, and the patient of slide c with it.
    cohort.rows = [
        row for row in cohort.rows if row["image_id"] != "c" and (row["image_id"], row["encoder"]) != ("b", "small")
    ]
    cohort.rows += tiles_of("b", "small", 3, "h2")
    cohort.write()
    third = cohort.run()
    for table, redone in (("slide_vectors", "b"), ("patient_vectors", "001")):
        found = cohort.vectors(table)
        check(found, cohort.wanted(table, ["small", "large"], MEAN_AND_MAX))
        new = {key for key, row in found.items() if row["run_id"] == third.record.run_id}
        assert new == {(redone, "small", "mean"), (redone, "small", "max")}
        assert (third.record.counts[f"{table}_written"], third.record.counts[f"{table}_removed"]) == (2, 4)

    # An encoder is added to the settings, others are taken out of them: rows of these stay.
    before = cohort.vectors("slide_vectors")
    fourth = cohort.run(encoders={"other": {"model": "efficientnet_b0"}}, aggregators={"mean": {}})
    found = cohort.vectors("slide_vectors")
    assert found.keys() - before.keys() == {("a", "other", "mean"), ("b", "other", "mean")}
    assert before.items() <= found.items() and fourth.record.counts["slide_vectors_removed"] == 0


def test_a_learned_aggregator_takes_one_bag_at_a_time_and_other_weights_make_its_rows_again(
    cohort: Cohort, tmp_path: Path
) -> None:
    sections = {
        "aggregators": {
            "mean": {},
            "stroke": {"method": "gated_attention", "weights": attention(tmp_path), "encoder": "large"},
        },
        "run": {"wave_slides": 1},  # a wave per patient
    }

    def pooled(embeddings: list[Any]) -> Any:
        n_tiles = len(embeddings)
        loaded = load_aggregator(AggregatorSpec("stroke", "gated_attention", str(tmp_path / "model.safetensors")))
        return loaded.pool(
            TileBag(np.array(embeddings, np.float32), np.zeros((n_tiles, 2), np.int32), np.zeros(n_tiles, np.int32))
        )

    cohort.run(**sections)
    for table in KEYS:
        found, mean = cohort.vectors(table), {"mean": MEAN_AND_MAX["mean"]}
        wanted = cohort.wanted(table, ["small", "large"], mean) | cohort.wanted(table, ["large"], {"stroke": pooled})
        check(found, wanted)
    before = cohort.vectors("slide_vectors")

    attention(tmp_path, seed=2)
    run = cohort.run(**sections)
    found = cohort.vectors("slide_vectors")
    new = {key for key, row in found.items() if row["run_id"] == run.record.run_id}
    assert new == {(image, "large", "stroke") for image in OWNERS}
    assert all(found[key]["vector"] != before[key]["vector"] for key in new)
    check({key: found[key] for key in new}, cohort.wanted("slide_vectors", ["large"], {"stroke": pooled}))
    assert cohort.run(**sections).record.counts["slide_vectors_written"] == 0


def test_rows_of_an_encoder_that_an_aggregator_no_longer_takes_are_removed(cohort: Cohort) -> None:
    cohort.run(aggregators={"first": {"method": "mean", "encoder": "large"}, "max": {}})
    cohort.run(aggregators={"first": {"method": "mean", "encoder": "small"}})
    for table in KEYS:
        small = cohort.wanted(table, ["small"], {"first": MEAN_AND_MAX["mean"]})
        others = cohort.wanted(table, ["small", "large"], {"max": MEAN_AND_MAX["max"]})
        check(cohort.vectors(table), small | others)


def test_the_rows_of_a_slide_that_moved_to_another_patient_are_replaced(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"aggregators": {"mean": {}}, "run": {"wave_slides": 1}}  # a wave per patient
    cohort.run(**sections)
    monkeypatch.setitem(OWNERS, "b", "000")
    cohort.rows = [row for row in cohort.rows if row["image_id"] != "b"]
    cohort.rows += [row for encoder in DIMS for row in tiles_of("b", encoder, 4)]
    cohort.write()
    cohort.run(**sections)
    for table in KEYS:
        check(cohort.vectors(table), cohort.wanted(table, ["small", "large"], {"mean": MEAN_AND_MAX["mean"]}))
    assert cohort.vectors("slide_vectors")["b", "small", "mean"]["patient_id"] == "000"
    monkeypatch.setitem(OWNERS, "b", "003")  # behind the others
    for row in cohort.rows:
        row["patient_id"] = OWNERS[row["image_id"]]
    cohort.write()
    cohort.run(**sections)
    for table in KEYS:
        check(cohort.vectors(table), cohort.wanted(table, ["small", "large"], {"mean": MEAN_AND_MAX["mean"]}))


def test_slides_of_a_killed_run_or_of_several_settings_wait_for_the_features_job(cohort: Cohort) -> None:
    def record(run_id: str) -> None:
        row = {"run_id": run_id, "job": "features", "status": "done", "features": {"small": {}, "large": {}}}
        tables = Tables(cohort.spark, str(cohort.root))
        tables.create("runs")
        values = [tuple(row.get(name) for name in RUNS.names)]
        tables.append("runs", cohort.spark.createDataFrame(values, spark_schema(RUNS), verifySchema=False))

    sections: dict[str, Any] = {"aggregators": {"mean": {}}}
    first, killed, again = (f"2026010{day}T000000-aaaaaa" for day in (1, 2, 3))
    for row in cohort.rows:
        row["run_id"] = first
    cohort.write()
    record(first)
    cohort.run(**sections)
    assert cohort.status == 0
    before = {table: cohort.vectors(table) for table in KEYS}
    cohort.rows = [row for row in cohort.rows if row["image_id"] != "b"]
    cohort.rows += [row | {"run_id": killed} for encoder in DIMS for row in tiles_of("b", encoder, 4, "h2")]
    cohort.rows[0]["params_hash"] = "h0"  # slide a, encoder small
    cohort.write()
    run = cohort.run(**sections)
    assert cohort.status == 3
    assert run.record.problems == ["2 slides wait for the features job: run it, then this again"]
    assert {table: cohort.vectors(table) for table in KEYS} == before
    cohort.rows[0]["params_hash"] = "h1"
    cohort.write()
    record(again)
    cohort.run(**sections)
    assert cohort.status == 0
    for table in KEYS:
        check(cohort.vectors(table), cohort.wanted(table, ["small", "large"], {"mean": MEAN_AND_MAX["mean"]}))


def test_weights_of_another_encoder_and_a_bad_checkpoint_are_refused_before_anything_is_written(
    cohort: Cohort, tmp_path: Path
) -> None:
    stroke = {"method": "gated_attention", "weights": attention(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"stroke: its weights take embeddings of 6 numbers, and those of encoder small have 3"
    ):
        cohort.run(aggregators={"stroke": stroke})
    safetensors.torch.save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"aggregators\.stroke: .*model\.safetensors .*no tile\.1\.weight"):
        cohort.run(aggregators={"stroke": stroke | {"encoder": "large"}})
    assert not (cohort.root / "slide_vectors").exists()


def test_what_is_known_of_an_encoder_comes_along_and_its_licence_is_kept(
    cohort: Cohort, caplog: pytest.LogCaptureFixture
) -> None:
    tables = Tables(cohort.spark, str(cohort.root))
    origins = json.dumps({"small": {"licence": "CC-BY-NC-ND-4.0", "licence.commercial": "false", "sha256": "ab"}})
    tables.set_property("features", ORIGINS, origins)
    with pytest.raises(ConfigError, match=r"licence of encoder small \(CC-BY-NC-ND-4\.0\) forbids commercial use"):
        cohort.run(licence="commercial")
    assert not (cohort.root / "slide_vectors").exists()
    cohort.run(aggregators={"mean": {}})
    versions = cohort.versions()
    cohort.run(aggregators={"mean": {}})
    assert cohort.versions() == versions
    for table in KEYS:
        [properties] = [DeltaTable(f"{cohort.root}/{table}").metadata().configuration]
        assert json.loads(properties[ORIGINS]) == json.loads(origins)
    cohort.run(licence="commercial", encoders={"large": {}}, aggregators={"mean": {}})
    assert "licence of encoder large is not known" in caplog.text


def test_a_bag_that_is_too_large_for_one_worker_is_named_and_keeps_its_row(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stroke = {"stroke": {"method": "gated_attention", "weights": attention(tmp_path), "encoder": "large"}}
    monkeypatch.setattr(vectors, "MAX_BAG_BYTES", 4 * 6 * 7)  # slide a fits, patient 001 does not
    run = cohort.run(aggregators=stroke)
    assert cohort.status == 3
    [problem] = run.record.problems
    assert (
        "aggregator stroke makes no vector of 001" in problem and "11 tiles of encoder large are 264 bytes" in problem
    )
    assert cohort.vectors("patient_vectors").keys() == {("002", "large", "stroke")}
    assert len(cohort.vectors("slide_vectors")) == 3


def test_the_command_ends_with_a_summary_and_names_encoders_without_features(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    in_shared_session(cohort.spark, monkeypatch)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cohort.settings()))
    assert vectors.main(["--config", str(config)]) == 0
    out, _ = capfd.readouterr()
    assert "slide_vectors has 12 rows, 12 written and 0 removed in this run" in out
    assert "aggregators mean (method=mean, version=1), max (method=max, version=1)" in out
    [row] = pl.read_delta(f"{cohort.root}/runs").to_dicts()
    assert (row["job"], row["status"]) == ("vectors", "done")
    assert (
        dict(row["counts"] if isinstance(row["counts"], dict) else [tuple(each.values()) for each in row["counts"]])[
            "patient_vectors_written"
        ]
        == 8
    )
    assert vectors.main(["--config", str(config), "encoders={small: {}, absent: {}}"]) == 3
    assert "encoder absent has no rows in table features: run the features job" in capfd.readouterr().err
    assert vectors.main(["--config", str(config), f"output.root={tmp_path / 'empty'}"]) == 2
    assert "no table features in" in capfd.readouterr().err

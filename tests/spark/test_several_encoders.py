"""Several encoders: each tile is read once for all of them, and each has rows of its own, which no other encoder moves."""

import hashlib
import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import drop
from jobs.runtime.run.run import ORIGINS, Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.sections import EncoderSettings
from tests.conftest import preprocess_in
from tests.spark.conftest import COHORT, TABLES, Again, Finished, in_shared_session, rows_of, unchanged, without
from udfs.wsi.encoder.presets import PRESETS

FIRST, SECOND, THIRD = "test_efficientnet", "vit", "resnet"
VECTORS = ("embedding", "embedding_max", "embeddings", "embeddings_max")
Row = dict[str, Any]
Others = dict[str, EncoderSettings]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Others:
    """Two further encoders with seeded weights: a transformer, which gives one vector, and a network with a feature map."""
    folder, settings = tmp_path_factory.mktemp("others"), {}
    for name, model in ((SECOND, "test_vit"), (THIRD, "test_resnet")):
        torch.manual_seed(3)
        weights = folder / f"{name}.safetensors"
        safetensors.torch.save_file(timm.create_model(model, pretrained=False, num_classes=0).state_dict(), weights)
        settings[name] = EncoderSettings(model=model, weights=str(weights), input_px=160)
    return settings


def with_encoders(config: Config, encoders: Others, root: Path | None = None) -> Config:
    """The settings with other encoders, and with tables in another folder."""
    output = config.output.model_copy(update={"root": str(root)} if root else {})
    return config.model_copy(update={"encoders": encoders, "output": output})


def of(config: Config, table: str, *encoders: str) -> list[Row]:
    """The rows of some encoders."""
    return [row for row in rows_of(config, table) if row["encoder"] in encoders]


def check_same(found: list[Row], expected: list[Row]) -> None:
    """Equal but for the last bits of vectors: an encoder's batches depend on those of the encoders beside it."""
    assert without(found, "run_id", *VECTORS) == without(expected, "run_id", *VECTORS)
    for row, other in zip(found, expected, strict=True):
        for name in [name for name in VECTORS if name in row]:
            assert (row[name] is None) == (other[name] is None)
            if row[name] is not None:
                np.testing.assert_allclose(numbers(row[name]), numbers(other[name]), rtol=1e-4, atol=1e-5)


def numbers(value: Any) -> Any:
    return np.frombuffer(value, "<f4") if isinstance(value, bytes) else np.array(value)


def bytes_read(run: Run) -> Counter[str]:
    """Of each slide, to encode it."""
    return Counter({name: work.bytes for (name, stage), (_, work) in run.record.reads.items() if stage == "features"})


def test_two_encoders_at_once_give_the_rows_of_each_alone_and_read_each_slide_once(
    spark: SparkSession, finished: Finished, others: Others, tmp_path: Path
) -> None:
    one = {SECOND: others[SECOND]}
    both = with_encoders(finished.config, finished.config.encoders | one, tmp_path / "both")
    alone = with_encoders(finished.config, one, tmp_path / "alone")
    run, run_alone = preprocess_in(spark, both), preprocess_in(spark, alone)
    assert bytes_read(run) == bytes_read(run_alone)
    assert run.record.counts["tiles_encoded"] == run_alone.record.counts["tiles_encoded"]
    for table in ("features", "patients"):
        assert len(rows_of(both, table)) == 2 * len(rows_of(alone, table))
        check_same(of(both, table, FIRST), rows_of(finished.config, table))
        check_same(of(both, table, SECOND), rows_of(alone, table))
    assert {row["embedding_max"] for row in of(both, "features", SECOND)} == {None}
    run = preprocess_in(spark, both)
    assert run.record.counts["waves"] == 0
    run.write_record("done")
    files = {name: Path(settings.weights or "") for name, settings in both.encoders.items()}
    origins = {name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for name, file in files.items()}
    for table in ("features", "patients"):
        assert json.loads(DeltaTable(f"{both.output.root}/{table}").metadata().configuration[ORIGINS]) == origins
    [recorded] = rows_of(both, "runs")
    assert recorded["features"] == {name: run.identity.recipe(name) | origin for name, origin in origins.items()}


def test_a_slide_that_one_encoder_cannot_embed_stays_good_for_the_others(
    spark: SparkSession, again: Again, others: Others, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second encoder overflows on every tile with a bright first pixel; then its weights are mended."""
    first = again()
    before = {table: rows_of(first, table) for table in ("slides", "features", "patients")}
    weights = safetensors.torch.load_file(others[SECOND].weights or "")
    broken = {
        name: torch.full_like(tensor, 1e38) if name.startswith("blocks.0") else tensor
        for name, tensor in weights.items()
    }
    safetensors.torch.save_file(broken, tmp_path / "broken.safetensors")
    overflows = others[SECOND].model_copy(update={"weights": str(tmp_path / "broken.safetensors")})
    both = with_encoders(first, first.encoders | {SECOND: overflows})
    alone = with_encoders(first, {SECOND: overflows})
    for config in (both, alone, both):
        with unchanged(first, "slides", "tiles", "features", "patients") if config is not both else nullcontext():
            run = preprocess_in(spark, config)
        lines = [
            line for line in run.record.problems if f"lack vectors of encoder {SECOND}, the next run tries" in line
        ]
        assert lines and lines == run.record.problems
        assert {table: rows_of(both, table) for table in before} == before
    mended = with_encoders(first, first.encoders | {SECOND: others[SECOND]})
    assert preprocess_in(spark, mended).record.problems == []
    assert {table: [row for row in rows_of(both, table) if row.get("encoder") != SECOND] for table in before} == before
    assert len(of(both, "patients", SECOND)) == len(before["patients"])


def test_an_encoder_whose_licence_forbids_commercial_use_is_refused_before_its_weights_are_looked_for(
    spark: SparkSession, again: Again
) -> None:
    config = again().model_copy(
        update={"encoders": {"mine": EncoderSettings(model="uni", allow_other_scale=True)}, "licence": "commercial"}
    )
    with (
        unchanged(config, *TABLES),
        pytest.raises(ConfigError, match=r"licence of encoder mine \(CC-BY-NC-ND-4\.0\) forbids"),
    ):
        preprocess_in(spark, config)


def test_the_weights_of_a_preset_are_under_its_licence_whatever_the_model(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = again().model_copy(update={"licence": "commercial"})
    sha256 = hashlib.sha256(Path(config.encoders[FIRST].weights or "").read_bytes()).hexdigest()
    monkeypatch.setattr("udfs.wsi.encoder.provenance.PRESETS", {"uni": replace(PRESETS["uni"], sha256=sha256)})
    with (
        unchanged(config, *TABLES),
        pytest.raises(ConfigError, match=rf"licence of encoder {FIRST} \(CC-BY-NC-ND-4\.0\) forbids"),
    ):
        preprocess_in(spark, config)


def test_of_an_encoder_that_is_added_changed_or_dropped_only_its_rows_move(
    spark: SparkSession, again: Again, finished: Finished, others: Others, tmp_path: Path
) -> None:
    first = again()
    tables = ("slides", "tiles", "indexes")
    before = {table: rows_of(first, table) for table in ("features", "patients")}
    both = with_encoders(first, first.encoders | {SECOND: others[SECOND]})
    with unchanged(first, *tables):
        run = preprocess_in(spark, both)
    assert run.record.counts["tiles_encoded"] == len(before["features"])
    assert {table: of(both, table, FIRST) for table in before} == before
    second = {table: of(both, table, SECOND) for table in before}
    assert [len(second[table]) for table in before] == [len(before[table]) for table in before]

    larger = others[SECOND].model_copy(update={"input_px": 192, "kwargs": {"img_size": 192}})
    changed = with_encoders(first, first.encoders | {SECOND: larger})
    with unchanged(first, *tables):
        run = preprocess_in(spark, changed)
    assert {table: of(both, table, FIRST) for table in before} == before
    assert {row["run_id"] for table in before for row in of(both, table, SECOND)} == {run.record.run_id}

    kept = {table: rows_of(both, table) for table in before}
    with unchanged(first, *tables, "features", "patients"):  # an encoder that the settings do not name keeps its rows
        preprocess_in(spark, first)
    fewer = again([row for row in COHORT if row[0] != "a2"])  # patient 001 lost a slide
    preprocess_in(spark, fewer)
    left = [row for row in kept["features"] if row["image_id"] != "a2"]
    assert rows_of(both, "features") == left
    assert {row["patient_id"] for row in of(both, "patients", SECOND)} == {
        row["patient_id"] for row in kept["patients"] if row["patient_id"] != "001"
    }
    assert {row["patient_id"] for row in of(both, "patients", FIRST)} == {row["patient_id"] for row in kept["patients"]}


def test_a_tile_is_encoded_by_just_the_encoders_that_lack_it(spark: SparkSession, again: Again, others: Others) -> None:
    """Each slide lacks other rows: one those of one encoder, one a tile of the other, one all of both."""
    first = again()
    all_three = with_encoders(first, first.encoders | others)
    preprocess_in(spark, all_three)
    before = rows_of(all_three, "features")
    tile = next(row for row in before if row["image_id"] == "b1")
    lost = f"""(image_id = 'a1' AND encoder = '{SECOND}') OR image_id = 'k1'
        OR (image_id = 'b1' AND x_px = {tile["x_px"]} AND y_px = {tile["y_px"]} AND encoder IN ('{FIRST}', '{THIRD}'))"""
    DeltaTable(f"{all_three.output.root}/features").delete(lost)
    present = {(row["image_id"], row["x_px"], row["y_px"], row["encoder"]) for row in rows_of(all_three, "features")}
    run = preprocess_in(spark, all_three)
    after = rows_of(all_three, "features")
    check_same(after, before)
    new = {
        (row["image_id"], row["x_px"], row["y_px"], row["encoder"])
        for row in after
        if row["run_id"] == run.record.run_id
    }
    assert new == {(row["image_id"], row["x_px"], row["y_px"], row["encoder"]) for row in before} - present
    assert run.record.counts["tiles_encoded"] == len({key[:3] for key in new})


def test_the_job_drop_deletes_the_rows_of_an_encoder_and_no_other(
    spark: SparkSession,
    again: Again,
    others: Others,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = again()
    both = with_encoders(first, first.encoders | {SECOND: others[SECOND]})
    preprocess_in(spark, both)
    in_shared_session(spark, monkeypatch)
    file = tmp_path / "settings.yaml"

    def dropped(config: Config, *arguments: str) -> tuple[int, str]:
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        status = drop.main(["--config", str(file), *arguments])
        return status, "".join(capsys.readouterr())

    with unchanged(first, *TABLES):
        for config, arguments, reason in (
            (both, ["--encoder", SECOND], "the settings name this encoder, so the next run would make its rows again"),
            (first, ["--encoder", "third"], f"no table in .* has rows of it; the encoders there: {FIRST}, {SECOND}"),
        ):
            status, text = dropped(config, *arguments)
            assert status == 2 and re.search(reason, text)
    kept = {table: of(first, table, FIRST) for table in ("features", "patients")}
    n_second = len(of(first, "features", SECOND))
    status, text = dropped(first, "--encoder", SECOND)
    assert status == 0 and re.search(rf"features +{n_second} rows deleted", text)
    assert {table: rows_of(first, table) for table in kept} == kept
    assert list(json.loads(DeltaTable(f"{first.output.root}/features").metadata().configuration[ORIGINS])) == [FIRST]
    assert preprocess_in(spark, first).record.counts["waves"] == 0

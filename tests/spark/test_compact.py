"""The job compact: the same rows in fewer files, and nothing for other jobs to do."""

import argparse
from pathlib import Path

import polars as pl
import pytest
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import compact
from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.tables.tables import ConcurrentRunError, Tables
from tests.conftest import preprocess_in
from tests.spark.conftest import TABLES, Again, Finished, in_shared_session, rows_of, unchanged, versions


def files(config: Config) -> dict[str, int]:
    return {name: len(DeltaTable(f"{config.output.root}/{name}").file_uris()) for name in TABLES}


def compact_in(spark: SparkSession, config: Config) -> Run:
    run = Run(config, spark, compact.JOB)
    assert compact.compact(run, argparse.Namespace()) == 0
    return run


def test_rows_stay_files_become_few_and_no_job_has_work_afterwards(
    spark: SparkSession, again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    config = again()
    before = {name: rows_of(config, name) for name in TABLES}
    many = files(config)
    assert {many[name] for name in compact.JOB.writes} == {2}
    with unchanged(config, "slides", "indexes", "runs"):
        run = compact_in(spark, config)
    assert files(config) == many | dict.fromkeys(compact.JOB.writes, 1)
    assert {name: rows_of(config, name) for name in TABLES} == before
    assert run.record.counts == {
        f"{name}_files_{when}": n for name in compact.JOB.writes for when, n in (("before", 2), ("after", 1))
    }
    said = capsys.readouterr().out
    for name in compact.JOB.writes:
        [line] = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert "2 files of " in line and "now 1 file of " in line
        protocol = DeltaTable(f"{config.output.root}/{name}").protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    with unchanged(config, *TABLES):
        compact_in(spark, config)
        assert preprocess_in(spark, config).record.counts["waves"] == 0


def test_from_the_command_line_it_leaves_a_record(
    spark: SparkSession,
    again: Again,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = again()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    in_shared_session(spark, monkeypatch)
    assert compact.main(["--config", str(path)]) == 0
    said = capsys.readouterr()
    assert "now 1 file of" in said.out and "slidelake: features ..." in said.err
    last = pl.read_delta(f"{config.output.root}/runs").sort("started_at").to_dicts()[-1]
    assert (last["job"], last["status"]) == ("compact", "done")
    assert last["tables_written"] == {name: versions(finished.config)[name] + 1 for name in compact.JOB.writes}


def test_another_run_at_work_is_noticed_on_both_sides(
    spark: SparkSession, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = again()
    at_work = Tables(spark, config.output.root)
    at_work.create("features")
    original = Tables.compact

    def meanwhile(self: Tables, name: str) -> None:
        original(self, name)
        if name == "features":
            Tables(spark, config.output.root).put("patients", self.read("patients"), "patient_id", ["x"], [])

    monkeypatch.setattr(Tables, "compact", meanwhile)
    with pytest.raises(ConcurrentRunError, match="table patients"):
        compact.compact(Run(config, spark, compact.JOB), argparse.Namespace())
    with pytest.raises(ConcurrentRunError, match="table features"):
        at_work.append("features", at_work.read("features"))


def test_without_tables_the_message_says_what_to_run_first(spark: SparkSession, again: Again, tmp_path: Path) -> None:
    config = again(output={"root": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match="run the preprocess job first"):
        compact_in(spark, config)
    assert not (tmp_path / "nothing").exists()

"""The command line: what ends before Spark starts, what a whole run says, and its exit status."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from jobs import __main__ as command
from jobs.runtime.run import cli
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.arguments import JOBS
from jobs.runtime.settings.config import Config, describe_settings
from tests.events import Events, descriptions, event_log_options, read_events
from tests.messages import plain
from tests.slides.damage import BAD_SLIDES
from tests.slides.spacings import Y_RESOLUTION, take_out
from tests.spark.conftest import in_shared_session

ROOT = Path(__file__).parents[2]
SECRET = "c2VjcmV0LW9mLXRoZS1jbGk"


SLIDELAKE = (sys.executable, "-m", "jobs")


def said_by(*command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as a user runs it."""
    environment = os.environ | {
        "SLIDELAKE_TEST_KEY": SECRET,
        "PYTHONDONTWRITEBYTECODE": "",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,  # by which spark-submit finds Spark
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def config_file(small_config: Callable[..., Config], tmp_path: Path) -> Path:
    """Settings of the small cohort as a file, with a secret from the environment."""
    settings = small_config().model_dump(mode="json")
    settings["slides"]["storage_options"] = {"account_key": "${SLIDELAKE_TEST_KEY}", "depth": 3}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Say:
    """The command in this process, where to start Spark is an error: (exit status, stdout, stderr)."""

    def no_spark(name: str) -> None:
        raise AssertionError(f"Spark was started for {name}")

    monkeypatch.setattr("jobs.runtime.run.cli.start_session", no_spark)
    monkeypatch.setenv("SLIDELAKE_TEST_KEY", SECRET)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slidelake", *arguments])
        capfd.readouterr()
        try:
            status = command.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tiling.max_backgruond=0.2", "tiling.max_background"),
        ("inference.batchsize=3", "inference.batch_size"),
        ("tilng.tile_px=3", "tiling"),
        ("tiling.tile_px=many", "tiling.tile_px"),
        ("tiling.max_background=1.5", "tiling.max_background"),
        ("histogram.bins=12", "power of two"),
        ("tiling.tile_px", "dotted.key=value"),
        ("=3", "dotted.key=value"),
        ("patients.x=3", "patients"),
        ("tiling.mpp=[", "not YAML"),
        ("splits.test=0.3", "splits: train, validation and test sum to 1.2: they must sum to 1"),
        ("patients=/nowhere/patients.csv", "/nowhere/patients.csv"),
        ("output.root=/proc/x", "output.root: /proc/x cannot be written (No such file or directory: /proc)"),
        (f"inference.batch_size={SECRET}", "a text of 23 characters that may be a secret"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_2(say: Say, config_file: Path, override: str, said: str) -> None:
    status, out, err = say("preprocess", "--config", str(config_file), override)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and said in err and "Traceback" not in err


@pytest.mark.parametrize("job", [job for job in JOBS if job != "train"])  # which reads tables alone
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image_id,patient_id,image_num\na,b,0\n", "center_id"),
        ("image_id,center_id,patient_id,image_num\na,c,b,0\na,c,b,1\n", "lines 2, 3"),
        ("", "empty"),
    ],
)
def test_a_bad_csv_is_one_line_and_status_2_before_spark_starts(
    say: Say, config_file: Path, tmp_path: Path, job: str, text: str, said: str
) -> None:
    (tmp_path / "patients.csv").write_text(text)
    status, out, err = say(job, "--config", str(config_file))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and said in err and str(tmp_path / "patients.csv") in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preprocess"], "--config"),
        (["preprocess", "--config", "/nowhere/c.yaml"], "/nowhere/c.yaml"),
        (["preproces", "--config", "c.yaml"], "preprocess"),
        (["preprocess", "--config", "c.yaml", "--retry"], "--config"),
        (["stainnet", "--config", "c.yaml", "--retry-failed"], "--retry-failed"),
        (["preprocess", "--config", "c.yaml", f"--key={SECRET}"], "unrecognized arguments: --key=***"),
        ([SECRET], "no job a text of 23 characters that may be a secret"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(say: Say, arguments: list[str], said: str) -> None:
    status, out, err = say(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and (said in err or "no such file" in err)


def test_patches_without_a_folder_are_refused_before_spark_starts(say: Say, config_file: Path) -> None:
    status, out, err = say("patches", "--config", str(config_file))
    assert (status, out, err.count("\n")) == (2, "", 1) and "patches.folder is required" in err


def test_an_environment_variable_that_is_not_set_is_named(
    say: Say, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIDELAKE_TEST_KEY")
    status, _, err = say("preprocess", "--config", str(config_file))
    assert (status, err.count("\n")) == (2, 1)
    assert "SLIDELAKE_TEST_KEY" in err


@pytest.mark.parametrize("job", JOBS)
def test_help_explains_every_setting_but_those_of_other_jobs(say: Say, job: str) -> None:
    status, out, err = say(job, "--help")
    assert (status, err) == (0, "")
    keys = [key for key, _, _ in describe_settings()]
    assert len(keys) > 25 and {"tiling.tile_px", "encoders.NAME.model", "output.root", "on_failed_slides"} <= set(keys)
    left_out = {key.partition(".")[0] for key in keys if f"  {key} " not in out}
    own = {"stainnet", "splits", "training", "predict", "patches", "aggregators"}
    assert left_out == own - {{"train": "training", "vectors": "aggregators"}.get(job, job)}
    assert [key for key in keys if f"  {key} " in out and key.partition(".")[0] in left_out] == []
    assert all(text for _, _, text in describe_settings())
    assert "exit status" in out


def test_the_command_lists_its_jobs_and_its_version(say: Say) -> None:
    status, out, _ = say("--help")
    assert status == 0 and all(job in out for job in JOBS)
    assert say()[1] == out
    assert say("--version")[:2] == (0, f"slidelake {version('slidelake')}\n")


def test_print_config_masks_secrets_and_applies_overrides(say: Say, config_file: Path) -> None:
    arguments = ("preprocess", "--config", str(config_file), "--print-config")
    status, out, err = say(*arguments, "tiling.mpp=0.5", "patients=https://me:pw123456@host/p.csv?sig=abcdef")
    assert (status, err) == (0, "")
    settings = yaml.safe_load(out)
    assert settings["tiling"]["mpp"] == 0.5
    assert settings["slides"]["storage_options"]["account_key"] == "***"
    assert settings["patients"] == "https://host/p.csv"
    assert SECRET not in out


def test_a_job_that_fails_shows_no_secret_of_settings_and_csv(
    spark: SparkSession,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = ("slides.root", "encoders.e.weights", "stain.weights", "training.mlflow")
    secrets = {place: f"{SECRET}-{place}" for place in (*settings, "CSV")}
    (tmp_path / "patients.csv").write_text(
        f"image_id,center_id,patient_id,image_num,uri\na1,n,001,0,https://host/a1.tif?sig={secrets['CSV']}\n"
    )
    monkeypatch.setenv("SLIDELAKE_TEST_KEY", SECRET)
    in_shared_session(spark, monkeypatch)

    def fail(run: Run, arguments: argparse.Namespace) -> int:
        (tmp_path / "taken").touch()  # no record of the run can be written, which is no reason to show more
        raise RuntimeError(f"the last of it, {' '.join(secrets.values())}; and {SECRET}")

    arguments = ["--config", str(config_file), *(f"{key}=https://me:{secrets[key]}@host/x" for key in settings)]
    arguments.append(f"output.root={tmp_path}/taken")
    assert cli.main(Job("preprocess"), fail, arguments) == 1
    said = capfd.readouterr().err
    assert "RuntimeError: the last of it, *** *** " in said and "stopped by RuntimeError" in said
    assert SECRET not in said


def test_a_users_mistake_is_one_line_from_the_shell_too(config_file: Path) -> None:
    done = said_by(*SLIDELAKE, "preprocess", "--config", str(config_file), "inference.runtmie=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        plain(done.stderr)
        == "slidelake preprocess: unknown setting inference.runtmie: did you mean inference.runtime?\n"
    )


def test_a_run_names_failed_slides_and_warnings_and_keeps_secrets(
    small_slides: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "slides", tmp_path / "events"
    folder.mkdir()
    log.mkdir()
    (folder / "a1.tif").symlink_to(small_slides / "a1.tif")
    shutil.copy(small_slides / "a2.tif", folder)
    take_out(folder / "a2.tif", [Y_RESOLUTION])
    BAD_SLIDES["zero_bytes"](small_slides / "a1.tif", folder, "b1")
    (tmp_path / "patients.csv").write_text(
        "image_id,center_id,patient_id,image_num\na1,n,001,0\na2,n,002,0\nb1,n,002,1\n"
    )
    arguments = ("--config", str(config_file), f"slides.root={folder}")
    given = "spark.yarn.appMasterEnv.SLIDELAKE_TEST_KEY"  # as where a driver gets its variables by settings of Spark
    options = [*event_log_options(log), "--conf", f"{given}={SECRET}"]
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", " ".join([*options, "pyspark-shell"]))
    done = said_by(*SLIDELAKE, "preprocess", *arguments)
    monkeypatch.delenv("PYSPARK_SUBMIT_ARGS")
    assert done.returncode == 3, done.stderr
    [failed] = [line for line in plain(done.stderr).splitlines() if "failed:" in line]
    assert failed.startswith("slidelake: failed: b1: file_empty: ") and "upload it again" in failed
    assert "2 ok, 0 without tissue, 1 failed (1 file_empty)" in done.stdout
    assert "Traceback" not in done.stderr and " WARN " not in done.stderr  # as Spark writes its own
    submit = (str(Path(sys.executable).parent / "spark-submit"), "--conf", "spark.driver.memory=2g")
    ignored = said_by(*submit, "jobs/preprocess.py", *arguments, "on_failed_slides=ignore")
    assert ignored.returncode == 0, ignored.stderr
    assert "0 encoded in this run" in ignored.stdout and "b1" not in ignored.stdout
    assert failed in plain(ignored.stderr).splitlines()
    tables = tmp_path / "tables"
    runs = pl.read_delta(str(tables / "runs"))
    assert sorted(runs["status"]) == ["done", "done"]
    assert "***" in runs["config"][0]
    slides = pl.read_delta(str(tables / "slides")).sort("image_id")
    warning = "0.5 um/px by the TIFF tags, along one axis only: pixels are taken as square"
    assert slides["warnings"].to_list() == [None, [warning], None]
    assert slides["mpp_y"].to_list() == pytest.approx([0.5, 0.5, None])
    assert [dict(counts)["slides_with_warnings"] for counts in runs["counts"]] == [1, 1]
    for ran in (done, ignored):  # as the log of a driver has it, where there is no terminal
        assert ran.stdout.count("slidelake preprocess, run ") == ran.stderr.count("slidelake: plan ...") == 1
        [run_id] = re.findall(r"slidelake preprocess, run (\S+)", ran.stdout)
        assert re.search(rf"(?m)^\S+Z WARNING {run_id} slidelake: failed: b1: ", ran.stderr)
        assert not {"\r", "\x1b"} & {*ran.stdout, *ran.stderr}, "what is for a terminal"
        assert (ran.stdout.count("failed: b1:"), ran.stderr.count("failed: b1:")) == (0, 1)
        assert plain(ran.stderr).splitlines().count(f"slidelake: warning: a2: {warning}") == 1
    [work] = [work for work in runs["work"] if work]  # the second run read nothing
    assert_watched(read_events(log), work, done.stdout)
    [logged] = [file.read_text() for file in log.iterdir()]
    assert f'"{given}":"*********(redacted)"' in logged
    for said in (done.stdout, done.stderr, ignored.stdout, ignored.stderr, str(runs.to_dicts()), logged):
        assert SECRET not in said
    assert not [path for path in tables.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def assert_watched(events: Events, work: dict[str, dict[str, float]], said: str) -> None:
    """Spark's UI reads like the flow, and the sums of table runs are those of the summary."""
    flow = [step for step, _ in groupby(descriptions(events)) if not step.startswith("Delta: ")]
    expected = [
        "plan: tables",
        "plan: survey of 3 images",
        "wave 1/1: slides, find tissue on 3 slides",
        "wave 1/1: slides, write",
        "wave 1/1: plan, slides that are done",
        "wave 1/1: plan, work units",
        "wave 1/1: features, encode 4 tiles",
        "wave 1/1: features, write",
        "wave 1/1: patients, state of 2 patients",
        "wave 1/1: patients, bags of 2 patients, write",
        "summary",
        "record",
    ]
    assert list(dict.fromkeys(reversed(flow))) == expected[::-1]
    assert work.keys() == {"slides", "features"}
    for of_stage in work.values():
        assert of_stage["requests"] > 0 and of_stage["bytes_read"] > 0 and of_stage["seconds_decoding"] > 0
    encoding = work["features"]["seconds_encoding"]
    assert work["slides"]["seconds_encoding"] == 0 < encoding
    decoding = sum(of_stage["seconds_decoding"] for of_stage in work.values())
    assert f" {decoding:.1f} decoding, {encoding:.1f} encoding\n" in said

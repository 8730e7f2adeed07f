"""The driver ended at random moments and started again: never a doubled row, never half a patient, the same end."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pyspark.sql import SparkSession

from jobs.runtime.run.cli import FAILED
from jobs.runtime.settings.config import Config
from tests.conftest import preprocess_in, write_csv
from tests.faults.commands import end_session, preprocess_command, session_of, wait_until
from tests.faults.frames import KEYS, assert_same_rows, frame, frames

PATIENTS = 5  # a wave each
COMMITS_A_WAVE = 5  # tiles, indexes, slides, features, patients
SEED = 20
COMMAND_S = 300  # ten times what it takes on two idle cores

Kill = Callable[[subprocess.Popen[bytes]], None]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(
    spark: SparkSession,
    small_config: Callable[..., Config],
    small_slides: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    rows = [
        (f"image_{patient}", "north", f"{patient:03}", 0, "CE", small_slides / f"{('a1', 'b1', 'd1')[patient % 3]}.tif")
        for patient in range(PATIENTS)
    ]
    sections: dict[str, Any] = {"tiling": {"max_background": 0.8}, "run": {"wave_slides": 1}}
    undisturbed = small_config(output={"root": str(tmp_path / "undisturbed")}, **sections)
    config = small_config(**sections)
    write_csv(Path(config.patients), rows, "image_id,center_id,patient_id,image_num,label,uri")
    begun = time.monotonic()
    assert preprocess_in(spark, undisturbed).record.counts["waves"] == PATIENTS
    commit_s = (time.monotonic() - begun) / (PATIENTS * COMMITS_A_WAVE)
    expected = frames(Path(undisturbed.output.root))
    root = Path(config.output.root)

    draw = random.Random(SEED)
    kills: list[Kill] = [
        _kill_driver_and_jvm,
        _press_ctrl_c_twice,
        _kill_python_and_let_the_jvm_notice,
        _send_sigterm_to_spark_submit,
        _close_the_terminal,
    ]
    stopped_by: list[str] = []
    for number, kill in enumerate(kills):
        commits = draw.choice([1, 2, 3, 4]) if number else 0  # the first is killed before it has committed anything
        delay_s = draw.uniform(0, commit_s)
        log = tmp_path / f"killed_{number}.txt"
        before = _commits(root)
        with preprocess_command(config, log, submitted=kill in _SUBMITTED) as job:
            wait_until(
                partial(_is_ripe, job, root, before + commits),
                COMMAND_S,
                f"commit {before + commits}",
            )
            time.sleep(delay_s)  # the moment is random, nothing is waited for
            assert job.poll() is None, f"run {number} ended before it was killed:\n{log.read_text()}"
            begun = time.monotonic()
            kill(job)
            gone_s = time.monotonic() - begun
        moment = (
            f"{kill.__name__.strip('_')} {delay_s:.2f} s after commit {commits} of run {number}: "
            f"{_commits(root)} of {PATIENTS * COMMITS_A_WAVE} commits there, "
            f"{frame(root, 'patients').height} of {PATIENTS} waves whole, gone after {gone_s:.1f} s"
        )
        if name := _NAMES.get(kill):
            lines = log.read_text().splitlines()
            assert sum("stopped by" in line for line in lines) == 1 and len(lines) < 12, lines
            assert any(f"preprocess: stopped by {name}; finished waves are in the tables" in line for line in lines)
            stopped_by.append(f"stopped by {name}")
            assert sorted(pl.read_delta(str(root / "runs"))["status"]) == sorted(stopped_by)
        print(moment)
        record_property(f"kill_{number}", moment)
        _assert_sound(root, expected, moment)

    preprocess_in(spark, config)
    for name, rows_found in frames(root).items():
        assert_same_rows(rows_found, expected[name])


def _kill_driver_and_jvm(job: subprocess.Popen[bytes]) -> None:
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    end_session(job.pid)  # what is left: Python workers, as when the machine goes


def _press_ctrl_c_twice(job: subprocess.Popen[bytes]) -> None:
    for _ in range(2):
        os.killpg(job.pid, signal.SIGINT)  # to all processes of a terminal
        time.sleep(0.3)
    assert job.wait(60) == FAILED


def _send_sigterm_to_spark_submit(job: subprocess.Popen[bytes]) -> None:
    job.terminate()  # the JVM alone, as Kubernetes does
    assert job.wait(60) == FAILED


def _close_the_terminal(job: subprocess.Popen[bytes]) -> None:
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(60) == FAILED


_NAMES: dict[Kill, str] = {
    _press_ctrl_c_twice: "Ctrl-C",
    _send_sigterm_to_spark_submit: "SIGTERM",
    _close_the_terminal: "SIGHUP",
}
_SUBMITTED = (_press_ctrl_c_twice, _send_sigterm_to_spark_submit)


def _kill_python_and_let_the_jvm_notice(job: subprocess.Popen[bytes]) -> None:
    assert len(session_of(job.pid)) > 1, "the JVM is there"
    job.kill()
    job.wait()
    wait_until(lambda: not session_of(job.pid), 60, "JVM and workers have ended by themselves")


def _is_ripe(job: subprocess.Popen[bytes], root: Path, commits: int) -> bool:
    return job.poll() is not None or (_has_tables(root) and _commits(root) >= commits)


def _has_tables(root: Path) -> bool:
    return (root / "runs" / "_delta_log" / f"{0:020}.json").exists()


def _commits(root: Path) -> int:
    """Commits of rows, all tables together; making a table is none, nor is the record of a run."""
    return sum(int(commit.stem) > 0 for name in KEYS for commit in (root / name / "_delta_log").glob("*.json"))


def _assert_sound(root: Path, expected: dict[str, pl.DataFrame], moment: str) -> None:
    found = frames(root)
    for name, rows in found.items():
        assert not rows.select(KEYS[name]).is_duplicated().any(), f"{moment}: doubled keys in {name}"
    committed = found["patients"]["patient_id"]
    assert_same_rows(found["patients"], expected["patients"].filter(pl.col("patient_id").is_in(committed.to_list())))
    for patient in found["patients"].iter_rows(named=True):
        bag = np.frombuffer(patient["embeddings"], "<f4").reshape(patient["n_tiles"], patient["embedding_dim"])
        assert np.isfinite(bag).all() and len(patient["tile_index"]) == len(bag) > 0, moment
        assert patient["complete"] and patient["n_images"] == 1, moment
    for slide in found["slides"].iter_rows(named=True):
        there = found["tiles"].filter(pl.col("image_id") == slide["image_id"]).height
        assert there == slide["n_tiles"], f"{moment}: slides row of {slide['image_id']} without its tiles"
        assert slide["image_id"] in found["indexes"]["image_id"], f"{moment}: a slides row without its index"

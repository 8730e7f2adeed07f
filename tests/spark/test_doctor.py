"""The doctor where all is well: every check has something to look at, and finds it good."""

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from jobs.checks.place import Place
from jobs.checks.table import Check, Row, as_text, look
from jobs.doctor import CHECKS
from jobs.runtime.cohort import read_cohort
from jobs.runtime.config import Config, ConfigError
from tests.conftest import write_csv
from tests.faults.commands import run_to_end
from tests.stores.process import HOST

# The doctor, in haste and with one check: where the driver finds the slides.
LOCATES = """\
import sys
from jobs import doctor
from jobs.checks.table import Check
doctor.CHECKS = (Check("slides", lambda place: place.located, 2.0),)
sys.exit(doctor.main(sys.argv[1:]))
"""


@pytest.fixture
def place(spark: SparkSession, small_config: Callable[..., Config]) -> Iterator[Place]:
    """The shared session and the small cohort."""
    config = small_config(tiling={"max_background": 0.5})
    yield Place(spark, config, read_cohort(config), deadline_h=1.0)


def test_all_is_well_on_this_machine(place: Place) -> None:
    rows = {row.what: row for row in look(place, CHECKS)}
    print("\n" + "\n".join(map(as_text, rows.values())))
    assert list(rows) == [check.what for check in CHECKS]
    assert [row for row in rows.values() if row.status != "ok" or row.remedy] == []
    assert "17." in rows["java"].found or "21." in rows["java"].found
    assert place.spark.version in rows["spark"].found
    assert "(1 of 1 looked at)" in rows["python"].found
    assert "read 65,536 bytes of" in rows["store"].found and "a1.tif" in rows["store"].found
    assert "test_efficientnet" in rows["encoder"].found and "by cpu" in rows["encoder"].found
    measured = re.search(
        r"torch fp32: ([\d.]+) tiles/s by 2 tasks at once, from (\d+) tiles of 5 slides", rows["clock"].found
    )
    assert measured and float(measured[1]) > 1 and int(measured[2]) > 10
    assert "5 slides, about" in rows["clock"].found and "for 1 h: 1 machine like this" in rows["clock"].found
    assert not Path(place.config.output.root).exists()  # it changes nothing


def test_a_check_that_fails_or_hangs_keeps_no_other_from_running(place: Place) -> None:
    def hangs(place: Place) -> Row:
        place.spark.sparkContext.parallelize([0], 1).map(lambda _: __import__("time").sleep(600)).collect()
        raise AssertionError("the job was not cancelled")

    def fails(place: Place) -> Row:
        place.ask(lambda: 1 // 0)
        raise AssertionError("no error came back")

    def refuses(place: Place) -> Row:
        raise ConfigError("slides.root: no folder at /nowhere")

    checks = [
        Check("hangs", hangs, 2.0),
        Check("fails", fails, 60.0),
        Check("refuses", refuses, 60.0),
        Check("waits", refuses, 60.0, ("refuses",)),
        Check("works", lambda _: Row("ok", "fine"), 60.0, ()),
    ]
    hung, failed, refused, waited, worked = look(place, checks)
    assert (hung.status, hung.found) == ("FAIL", "no answer in 2 s") and "logs of the executors" in hung.remedy
    assert failed.status == "FAIL" and "ZeroDivisionError" in failed.found
    assert (refused.status, refused.found) == ("FAIL", "slides.root: no folder at /nowhere")
    assert (waited.status, waited.found) == ("skip", "not looked at, for it needs refuses")
    assert (worked.status, worked.what) == ("ok", "works")


def test_it_ends_though_the_driver_waits_for_a_store_that_stays_silent(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    with socket.create_server((HOST, 0), backlog=100) as silent:
        uri = f"http://{HOST}:{silent.getsockname()[1]}"
        config = small_config()
        rows = [(f"s{i}", "north", f"{i}", 0, f"{uri}/{i}.tif") for i in range(100)]  # more than are asked for at once
        write_csv(Path(config.patients), rows, "image_id,center_id,patient_id,image_num,uri")
        file = tmp_path / "my.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        done = run_to_end([sys.executable, "-c", LOCATES, "--config", str(file)], os.environ, 60)
    assert done.returncode == 1, done.stderr
    assert "FAIL  slides    no answer in 2 s\n" in done.stdout and "it is the driver that waits" in done.stdout
    assert done.stdout.endswith("1 of 1 checks failed\n") and "Traceback" not in done.stderr


def test_executors_without_a_python_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.spark.sparkContext, "pythonExec", "/nowhere/python3.11")
    checks = [check for check in CHECKS if check.what in ("executors", "python", "packages", "code")]
    _, python, packages, code = look(place, checks)
    assert (python.status, packages.status, code.status) == ("FAIL", "skip", "skip")
    assert "/nowhere/python3.11: not found" in python.found and "PYSPARK_PYTHON" in python.remedy

"""The doctor where all is well: every check has something to look at, and finds it good."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from jobs.checks.output import output
from jobs.checks.place import Place
from jobs.checks.table import Check, Row, as_text, look
from jobs.doctor import CHECKS
from jobs.runtime.cohort.locating import read_cohort
from jobs.runtime.settings.config import Config, ConfigError
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
    yield Place(spark, config, read_cohort(config).images, deadline_h=1.0)


def test_all_is_well_on_this_machine(place: Place) -> None:
    rows = {row.what: row for row in look(place, CHECKS)}
    print("\n" + "\n".join(map(as_text, rows.values())))
    assert list(rows) == [check.what for check in CHECKS]
    assert [row for row in rows.values() if row.status != "ok" or row.remedy] == []
    assert "17." in rows["java"].found or "21." in rows["java"].found
    assert place.spark.version in rows["spark"].found
    assert "(1 of 1 looked at)" in rows["python"].found
    assert "read 65,536 bytes of" in rows["store"].found and "a1.tif" in rows["store"].found
    assert rows["output"].found == f"driver and an executor can write to {place.config.output.root}"
    assert "test_efficientnet" in rows["encoder"].found and "by cpu" in rows["encoder"].found
    measured = re.search(
        r"torch fp32: ([\d.]+) tiles/s by 2 tasks at once, from (\d+) tiles of 5 slides", rows["clock"].found
    )
    assert measured and float(measured[1]) > 1 and int(measured[2]) > 10
    assert "5 slides, about" in rows["clock"].found and "for 1 h: 1 machine like this" in rows["clock"].found
    assert place.run.tables.property("features", "slidelake.encoder") is None  # which the clock asks for by `auto`
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
    assert (waited.status, waited.found) == ("skip", "not checked: it needs refuses")
    assert (worked.status, worked.what) == ("ok", "works")


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("{tmp}/file/tables", "cannot be written by the driver"),
        ("az://container/tables", 'No FileSystem for scheme "az"'),
    ],
)
def test_an_output_that_cant_be_written_is_told_with_the_reason(
    spark: SparkSession, small_config: Callable[..., Config], tmp_path: Path, root: str, said: str
) -> None:
    (tmp_path / "file").touch()
    config = small_config(output={"root": root.format(tmp=tmp_path)})
    row = output(Place(spark, config, []))
    assert row.status == "FAIL" and said in row.found and root.format(tmp=tmp_path) in row.found
    assert "a disk that all nodes share" in row.remedy


def test_a_failed_look_at_the_output_leaves_nothing_and_takes_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(place.config.output.root)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(place, "ask", lambda *looks: [("node1", False) for _ in looks])
    assert output(place).found == f"{root} on the driver is another folder on node1"
    assert sorted(tmp_path.rglob("*")) == before
    root.mkdir()
    (root / "mine").touch()

    def loses_its_folder(*looks: object) -> list[tuple[str, bool]]:
        [folder] = root.glob("_doctor-*")
        shutil.rmtree(folder)
        folder.touch()
        return [("node1", True) for _ in looks]

    monkeypatch.setattr(place, "ask", loses_its_folder)
    row = output(place)
    assert row.status == "FAIL" and f"{root} cannot be written by executors (" in row.found
    assert sorted(root.iterdir()) == [root / "mine"]


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
    assert "FAIL  slides    no answer in 2 s\n" in done.stdout and "the driver waits" in done.stdout
    assert done.stdout.endswith("1 of 1 checks failed\n") and "Traceback" not in done.stderr


def test_executors_without_a_python_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.spark.sparkContext, "pythonExec", "/nowhere/python3.11")
    checks = [check for check in CHECKS if check.what in ("executors", "python", "packages", "code", "store")]
    _, python, *others = look(place, checks)
    assert (python.status, [row.status for row in others]) == ("FAIL", ["skip"] * 3)
    assert "/nowhere/python3.11: not found" in python.found and "PYSPARK_PYTHON" in python.remedy

"""What the doctor says of figures that machines and samples gave: memory, GPUs, the clock; and which fault is whose."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest
from py4j.protocol import Py4JJavaError

from jobs.checks import data, probe, software, table
from jobs.checks.clock import Workforce, clock, estimate
from jobs.checks.encoder_runtimes import recommended
from jobs.checks.extent import CohortSize
from jobs.checks.machine import judge_gpus, judge_memory
from jobs.checks.place import ExecutorError, MissingPackageError, NoPythonError, Place, Probe
from jobs.checks.table import Check, Row, look
from jobs.runtime.settings.config import Config, ConfigError
from udfs.node_facts import code_digest
from udfs.reach_store import Reached
from udfs.sample_cohort import MeasuredRuntime, Sample, SeenSlide
from udfs.wsi import ErrorCode

HEAP = 8e9


@pytest.mark.parametrize(
    ("room", "tasks", "status"),
    [
        (16e9, 4, "ok"),  # what README promises of predict
        (12e9, 4, "warn"),
        (6e9, 4, "FAIL"),
        (16e9, 8, "warn"),
        (16e9, 16, "FAIL"),
    ],
)
def test_memory_is_what_workers_take_beside_the_heap(room: float, tasks: int, status: str) -> None:
    row = judge_memory(room, HEAP, tasks)
    assert row.status == status
    assert f"each of {tasks} at once" in row.found
    assert bool(row.remedy) == (status != "ok")


def test_the_remedy_for_memory_names_what_would_be_enough() -> None:
    row = judge_memory(room=12e9, heap=HEAP, tasks=8)
    assert "give executors 17.2 GB" in row.remedy and "3 tasks at once" in row.remedy
    assert judge_memory(17.2e9, HEAP, 8).status == judge_memory(12e9, HEAP, 3).status == "ok"


def test_a_driver_that_does_all_needs_a_heap_as_the_readme_has_it() -> None:
    assert (
        judge_memory(16e9, heap=0.6e9, tasks=2).status == "ok"
    )  # an executor's: the clock looks at the largest patient
    little = judge_memory(16e9, heap=0.6e9, tasks=2, is_local=True)
    assert little.status == "warn" and "spark.driver.memory" in little.remedy and "2.0 GB at least" in little.found
    assert judge_memory(16e9, heap=2 << 30, tasks=2, is_local=True).status == "ok"


@pytest.mark.parametrize(
    ("asked", "scheduled", "visible", "status", "said"),
    [
        (0, None, 0, "ok", "none"),
        (0, None, 1, "ok", "1 visible"),
        (1, None, 0, "FAIL", "nvidia-smi"),
        (0.5, 0, 0, "FAIL", "nvidia-smi"),
        (0.5, 0, 2, "FAIL", "spark.executor.resource.gpu.amount=2"),
        (1, 2, 1, "FAIL", "discovery script"),
        (0, 0, 2, "warn", "left idle"),
        (0, 2, 2, "warn", "resources.gpus_per_task"),
        (0.5, 2, 2, "ok", "2 by Spark, 2 visible"),
    ],
)
def test_gpus_asked_for_scheduled_and_visible(
    asked: float, scheduled: int | None, visible: int, status: str, said: str
) -> None:
    row = judge_gpus(asked, scheduled, visible)
    assert row.status == status
    assert said in f"{row.found} {row.remedy}"


def sampled(*, tiles: int = 300, errors: Sequence[str] = ()) -> Sample:
    """A task's: two slides, each of 1,000 tiles in 9 s and 5 MB, then 300 tiles in 10 s and 3 MB."""
    slides = [SeenSlide(9.0, 5_000_000, 1000, 2_500_000_000)] * 2
    slides += [SeenSlide(1.0, 0, 0, 0, error) for error in errors]
    return Sample(slides, tiles, 10.0, 10_000 * tiles, {"e": (100, 100)})


COHORT = CohortSize({"a": [2_500_000_000] * 100, "b": [2_500_000_000] * 300}, most_tiles=None)
TWO_TASKS = Workforce(tasks=2, executors=1, heap_bytes=8 * 10**9, is_local=False)


def test_the_clock_adds_up() -> None:
    row = estimate([sampled(), sampled()], COHORT, TWO_TASKS)
    # 400,000 tiles at 60 a second are 1.85 h, 400 masks of 9 s by two tasks half an hour
    assert row.status == "ok" and row.remedy == ""
    for said in ("60.0 tiles/s", "400 slides", "about 400,000 tiles", "2.4 h", "reads 6.00 GB of 1,000.00 GB"):
        assert said in row.found
    assert "writes 1.04 GB" in row.found  # 2,600 bytes a tile


class OneSlide:
    """A place with one slide, and as much of a run there as the clock asks for."""

    def __init__(self, **inference: str) -> None:
        self.config = Config.model_validate({"patients": "p.csv", "output": {"root": "tables"}, "inference": inference})
        self.images = [SimpleNamespace(image_id="a1", patient_id="001", mpp=None)]
        self.located = {"a1": SimpleNamespace(uri="a1.tif", info=SimpleNamespace(size_bytes=10**6))}
        self.stage = SimpleNamespace(slots=lambda: 1)
        self.n_executors, self.heap_bytes, self.is_local, self.deadline_h = 1, 2 * 10**9, True, None
        self.run, self.tissue_spec = self, None

    @property
    def feature_spec(self) -> tuple[str, str | None]:
        return self.config.inference.runtime, self.config.inference.precision

    def ask(self, function: Any) -> list[Sample]:
        self.clocked = function.args[2]
        return [sampled()]


@pytest.mark.parametrize(
    ("settings", "runs_by"),
    [
        ({"runtime": "openvino", "precision": "bf16"}, ("openvino", "bf16")),
        ({"runtime": "torch", "precision": "bf16"}, ("torch", "bf16")),
        ({"runtime": "torch"}, ("torch", None)),
    ],
)
def test_the_clock_takes_the_encoder_as_the_run_would(
    settings: dict[str, str], runs_by: tuple[str, str | None]
) -> None:
    place = OneSlide(**settings)
    row = clock(cast(Place, place))
    runtime, precision = runs_by
    assert place.clocked == runs_by and row.found.startswith(f"{runtime} {precision or 'fp32'}: 30.0 tiles/s")


def test_the_fastest_runtime_that_is_right_is_recommended() -> None:
    ways = [
        MeasuredRuntime("torch", "fp32", 10.0, 1.0),
        MeasuredRuntime("openvino", "fp32", 20.0, 0.999995),
        MeasuredRuntime("openvino", "bf16", 40.0, 0.9991),
        MeasuredRuntime("torch", "bf16", 80.0, 0.9989),
        MeasuredRuntime("torch", "fp16", 90.0, float("nan")),
    ]
    row = recommended(ways, "torch", "fp32")
    assert (
        row.status == "ok"
        and row.remedy == ""
        and "torch bf16 80.0 (cosine 0.99890), openvino bf16 40.0, " in row.found
    )
    assert row.found.endswith("inference.runtime=openvino inference.precision=bf16")
    assert "encoder." not in recommended(ways, "openvino", "bf16").found
    assert "encoder." not in recommended(ways[:1], "torch", "fp32").found
    wrong = recommended(ways, "torch", "bf16")
    assert (wrong.status, wrong.remedy) == ("warn", "set inference.runtime=openvino inference.precision=bf16")
    assert recommended([], "torch", "fp32").status == "skip"


@pytest.mark.parametrize(
    ("is_local", "bytes_", "needed"),
    [
        (False, 4, "set spark.executor.memory to 8g or more"),  # 300,000 tiles x 100 numbers x 4 bytes x 64 are 7.68 GB
        (True, 2, "set spark.driver.memory to 4g or more"),
    ],
)
def test_a_heap_that_is_small_for_the_largest_patient_is_told(is_local: bool, bytes_: int, needed: str) -> None:
    enough = 300_000 * 100 * bytes_ * 64
    little = Workforce(tasks=2, executors=1, heap_bytes=enough - 1, is_local=is_local)
    row = estimate([sampled(), sampled()], COHORT, little, bag_number_bytes=bytes_, deadline_h=1)
    assert row.status == "warn" and "the largest patient's 300,000 tiles need a heap of" in row.found
    assert needed in row.remedy and "or give it 2.4 h" in row.remedy
    fits = replace(little, heap_bytes=enough)
    assert estimate([sampled(), sampled()], COHORT, fits, bag_number_bytes=bytes_).status == "ok"
    limited = replace(COHORT, most_tiles=1_000)
    assert estimate([sampled(), sampled()], limited, little, bag_number_bytes=bytes_).status == "ok"


def test_a_patient_beyond_any_heap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.checks.clock.MAX_BAG_BYTES", 300_000 * 100 * 4 - 1)
    row = estimate([sampled(), sampled()], COHORT, TWO_TASKS, bag_number_bytes=4)
    assert row.status == "warn" and "300,000 tiles are more than a row can have" in row.found
    assert "set tiling.max_tiles_per_patient to 299,999 or less" in row.remedy and "memory" not in row.remedy


def test_a_limit_on_tiles_shortens_the_run() -> None:
    limited = replace(COHORT, most_tiles=500)
    assert "about 1,000 tiles, 30.3 min" in estimate([sampled(), sampled()], limited, TWO_TASKS).found


@pytest.mark.parametrize(("deadline_h", "status", "needed"), [(3, "ok", 1), (2.3, "warn", 2), (0.1, "warn", 24)])
def test_a_deadline_is_told_in_executors(deadline_h: float, status: str, needed: int) -> None:
    row = estimate([sampled(), sampled()], COHORT, TWO_TASKS, deadline_h=deadline_h)
    assert row.status == status
    assert f"for {deadline_h:g} h: {needed} executor{'s' * (needed > 1)} like these" in row.found
    assert bool(row.remedy) == (status == "warn")


def test_slides_of_the_sample_that_fail_are_told_and_not_counted() -> None:
    row = estimate([sampled(), sampled(errors=["x.svs is cut off: upload it again"])], COHORT, TWO_TASKS)
    assert row.status == "warn" and "1 failures in the sample, such as x.svs is cut off" in row.found
    assert "about 400,000 tiles" in row.found
    lost = Sample([SeenSlide(1.0, 0, 0, 0, "x.svs is cut off: upload it again")])
    assert estimate([lost], COHORT, TWO_TASKS).found == "x.svs is cut off: upload it again"
    assert estimate([lost], COHORT, TWO_TASKS).status == "FAIL"
    empty = estimate([Sample([SeenSlide(1.0, 0, 0, 1000)])], COHORT, TWO_TASKS)
    assert (empty.status, empty.found) == ("FAIL", "no tissue on 1 slides")
    small = estimate([Sample([SeenSlide(1.0, 0, 0, 1000, too_small="the slide is 9 x 9 px")])], COHORT, TWO_TASKS)
    assert (small.status, small.found) == ("FAIL", "the slide is 9 x 9 px")


def test_the_probe_tells_of_missing_packages_full_disks_and_limits(tmp_path: Path) -> None:
    asked = json.dumps({"packages": ["numpy", "no-such-package"], "scratch": [str(tmp_path), str(tmp_path / "none")]})
    said = subprocess.run([sys.executable, str(probe.__file__), asked], capture_output=True, check=True, env={})
    found = json.loads(said.stdout)
    assert found["packages"]["no-such-package"] is None and found["packages"]["numpy"]
    device, free = found["scratch"][str(tmp_path)]
    assert device == tmp_path.stat().st_dev and free > 0 and found["scratch"][str(tmp_path / "none")] is None
    assert 0 < found["memory_bytes"] < 2**50
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


HERE = ".".join(map(str, sys.version_info[:3]))


class Cluster:
    """As much of a session and its context as checks ask for; tasks run in this process, and jobs that wait go on waiting."""

    def __init__(self, conf: dict[str, str]) -> None:
        self.sparkContext, self.conf = self, conf
        self.master, self.defaultParallelism, self.pythonExec = "spark://node0:7077", 2, "/opt/python"

    def getConf(self) -> dict[str, str]:
        return self.conf

    def setJobGroup(self, *_: object, **__: object) -> None: ...

    def cancelJobGroup(self, _: str) -> None: ...

    def statusTracker(self) -> Self:
        return self

    def getJobIdsForGroup(self, _: str) -> list[int]:
        return [0]

    def getJobInfo(self, _: int) -> Any:
        return SimpleNamespace(status="RUNNING")

    def parallelize(self, numbers: range, _: int) -> Any:
        return SimpleNamespace(map=lambda task: SimpleNamespace(collect=lambda: [task(number) for number in numbers]))


def cluster_of(*pythons: str, root: str = "slides", conf: dict[str, str] | None = None, lacks: str = "") -> Place:
    """A place with an executor for each Python; the last lacks a package."""
    config = Config.model_validate({"patients": "p.csv", "output": {"root": "tables"}, "slides": {"root": root}})
    place = Place(cast(Any, Cluster(conf or {})), config, [])
    packages: dict[str, str | None] = dict.fromkeys(place.packages, "1.0")
    place.__dict__["probes"] = [
        Probe(f"node{n}", "1", python, packages, 2**34, {}, 0) for n, python in enumerate(pythons)
    ]
    place.__dict__["unprobed"] = []
    if lacks:
        place.probes[-1].packages[lacks] = None
    return place


def test_no_check_fails_without_a_remedy() -> None:
    with pytest.raises(ValueError, match="no remedy for 'it broke'"):
        Row("FAIL", "it broke")

    def forgets(_: Place) -> Row:
        return Row("FAIL", "it broke")

    def refuses(*said: str) -> Any:
        def check(_: Place) -> Row:
            raise ConfigError(*said)

        return check

    checks = [("forgets", forgets), ("refuses", refuses("no folder")), ("tells", refuses("no folder", "mount it"))]
    forgot, refused, told = look(cluster_of(HERE), [Check(what, check, 60.0) for what, check in checks])
    assert forgot.status == "FAIL" and forgot.remedy
    assert (refused.status, refused.found) == ("FAIL", "no folder") and "conf/cohort.yaml" in refused.remedy
    assert (told.status, told.found, told.remedy) == ("FAIL", "no folder", "mount it")


@pytest.mark.parametrize(
    ("there", "gone", "found", "remedy"),
    [
        (1, 0, "no answer in 0.1 s", "look at the logs of the executors"),
        (1, 2, "no answer in 0.1 s", "look at the logs of the executors"),
        (0, 2, "no executor after 0.1 s: 2 started and ended", "look at their logs"),
        (
            0,
            0,
            "no executor started in 0.1 s, of those that Spark requests: 8g of memory (spark.executor.memory), "
            "2 GPUs (spark.executor.resource.gpu.amount)",
            "lower these settings to what a worker has free",
        ),
    ],
)
def test_executors_that_do_not_come_and_executors_that_do_not_answer(
    there: int, gone: int, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "executors_of", lambda _: [None] * there)
    monkeypatch.setattr(table, "ended_executors", lambda _: set(range(gone)))
    place = cluster_of(HERE, conf={"spark.executor.memory": "8g", "spark.executor.resource.gpu.amount": "2"})
    over = threading.Event()

    def waits(_: Place) -> Row:
        over.wait(60)
        return Row("ok", "")

    [row] = look(place, [Check("executors", waits, 0.1)])
    over.set()
    assert (row.status, row.found) == ("FAIL", found) and row.remedy.startswith(remedy)


def test_what_follows_from_a_missing_package_is_no_fault_of_its_own() -> None:
    place = cluster_of(HERE, lacks="numpy")

    def imports(module: str) -> Any:
        def check(_: Place) -> Row:
            def fails() -> None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

            place.ask(fails)
            raise AssertionError("no error came back")

        return check

    [alone] = look(place, [Check("store", imports("numpy.linalg"), 60.0)])
    assert alone.status == "FAIL" and "'numpy.linalg'" in alone.found and "on every node" in alone.remedy
    packages, store = look(
        place, [Check("packages", software.packages, 60.0), Check("store", imports("numpy.linalg"), 60.0)]
    )
    assert packages.status == "FAIL" and "numpy on node0" in packages.found
    assert store.status == "skip" and "needs packages" in store.found
    with pytest.raises(ExecutorError, match=r"No module named 'udfs\.node_facts'"):
        imports("udfs.node_facts")(place)


def test_the_profile_of_the_features_stage_is_built_once_per_run() -> None:
    place = cluster_of(HERE)
    assert place.stage is place.run.stage_resources is place.stage


def test_the_code_is_looked_at_with_no_package_there() -> None:
    command = [sys.executable, "-S", "-c", "from udfs.node_facts import code_digest; print(code_digest())"]
    said = subprocess.run(command, capture_output=True, check=True, text=True, cwd=Path(__file__).parents[2])
    assert said.stdout.strip() == code_digest()


def test_a_store_that_is_read_by_a_missing_package_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    located = {"a1": SimpleNamespace(uri="s3://bucket/a1.svs")}
    failed = Reached("node0", error=ErrorCode.READ_FAILED, message="no")
    for lacks, judged in (("s3fs", False), ("timm", True)):
        place = cluster_of(HERE, root="s3://bucket", lacks=lacks)
        place.__dict__["located"] = located
        monkeypatch.setattr(place, "ask_any", lambda _: failed)
        if judged:
            assert data.store(place).status == "FAIL"
        else:
            with pytest.raises(MissingPackageError, match="s3fs on node0"):
                data.store(place)


def test_what_follows_from_a_wrong_python_is_no_fault_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise Py4JJavaError("Cannot run program", SimpleNamespace(_target_id="o1"))

    with pytest.raises(NoPythonError):
        cluster_of("3.9.18", "3.9.18").ask_any(lambda: 1)
    assert cluster_of("3.9.18", HERE).ask_any(lambda: 1) == 1
    for pythons, error in ((("3.9.18", HERE), NoPythonError), ((HERE, HERE), Py4JJavaError)):
        place = cluster_of(*pythons)
        monkeypatch.setattr(place, "ask", dies)
        with pytest.raises(error):
            place.ask_any(lambda: 1)


def test_every_executor_is_asked_unless_the_python_of_one_is_another() -> None:
    for pythons, answers in (((HERE, HERE, HERE), [1, 1, 1]), ((HERE, "3.9.18", HERE), [1])):
        place = cluster_of(*pythons)
        place.executors = [cast(Any, None)] * len(pythons)
        assert place.ask_every(lambda: 1) == answers


@pytest.mark.parametrize(
    ("conf", "setting"),
    [
        ({"spark.pyspark.python": "/opt/python"}, "spark.pyspark.python"),
        ({"spark.pyspark.python": "/not/what/counts"}, "PYSPARK_PYTHON"),
        ({}, "PYSPARK_PYTHON"),
    ],
)
def test_the_remedy_for_a_wrong_python_names_the_setting_that_counts(conf: dict[str, str], setting: str) -> None:
    row = software.python(cluster_of("3.9.18", conf=conf))
    assert row.status == "FAIL" and row.remedy.startswith(f"point {setting} (now /opt/python) at Python {HERE}")

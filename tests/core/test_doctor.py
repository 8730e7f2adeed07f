"""What the doctor says of figures that machines and samples gave: memory, GPUs, the clock."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.checks import probe
from jobs.checks.clock import Cohort, Workforce, clock, estimate
from jobs.checks.machine import judge_gpus, judge_memory
from jobs.checks.place import Place
from jobs.runtime import encoders
from jobs.runtime.config import Config
from jobs.runtime.encoders import settle_runtime
from udfs.sample import Sample, SeenSlide
from udfs.wsi.choice import Measured

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
    """A task's: one slide of 1,000 tiles in 9 s and 5 MB, then 300 tiles in 10 s and 3 MB."""
    slides = [SeenSlide(9.0, 5_000_000, 1000), *(SeenSlide(1.0, 0, 0, error) for error in errors)]
    return Sample(slides, tiles, 10.0, 10_000 * tiles, dim=100)


COHORT = Cohort(slides=400, n_bytes=10**12, patients={"a": 100, "b": 300}, most_tiles=None)
TWO_TASKS = Workforce(tasks=2, executors=1, is_local=False)


def test_the_clock_adds_up() -> None:
    row = estimate([sampled(), sampled()], COHORT, TWO_TASKS, bytes_a_number=8)
    # 400,000 tiles at 60 a second are 1.85 h, 400 masks of 9 s by two tasks half an hour
    assert row.status == "ok" and row.remedy == ""
    for said in ("60.0 tiles/s", "400 slides", "about 400,000 tiles", "2.4 h", "reads 6.00 GB of 1,000.00 GB"):
        assert said in row.found
    assert "writes 1.04 GB" in row.found  # 2,600 bytes a tile


class OneSlide:
    """A place with one slide, and as much of a run there as the clock asks for."""

    def __init__(self, **encoder: str) -> None:
        self.config = Config.model_validate({"patients": "p.csv", "output": {"root": "tables"}, "encoder": encoder})
        self.properties: dict[str, str] = {}  # of table features
        self.images = [SimpleNamespace(image_id="a1", patient_id="001", mpp=None)]
        self.located = {"a1": SimpleNamespace(uri="a1.tif", info=SimpleNamespace(size_bytes=10**6))}
        self.stage = SimpleNamespace(slots=lambda: 1)
        self.n_executors, self.is_local, self.deadline_h = 1, True, None
        self.run, self.tables, self.tissue_spec = self, self, None
        self.models = SimpleNamespace(encoder=SimpleNamespace(fingerprint="3397d49c"))
        self.encoder_runs_by = ("torch", "fp32")

    @property
    def feature_spec(self) -> tuple[str, str]:
        return self.encoder_runs_by

    def property(self, name: str, key: str) -> str | None:
        return self.properties.get(key)

    def set_property(self, name: str, key: str, value: str) -> None:
        self.properties[key] = value

    def ask(self, function: Any) -> list[Sample]:
        self.clocked = function.args[2]
        return [sampled()]


@pytest.mark.parametrize(
    ("settings", "kept", "runs_by"),
    [
        ({"runtime": "openvino", "precision": "bf16"}, False, ("openvino", "bf16")),
        ({"runtime": "torch", "precision": "bf16"}, False, ("torch", "bf16")),
        ({"runtime": "torch"}, False, ("torch", "fp32")),
        ({"runtime": "auto"}, False, ("torch", "fp32")),  # what is fastest now
        ({"runtime": "auto"}, True, ("openvino", "bf16")),  # what was when the tables were made
    ],
)
def test_the_clock_takes_the_encoder_as_the_run_would(
    settings: dict[str, str], kept: bool, runs_by: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = OneSlide(**settings)
    if kept:
        monkeypatch.setattr(encoders, "measure_runtimes", lambda *_: [Measured("openvino", "bf16", 20.0, 1.0)])
        settle_runtime(cast(Any, place), ["a1.tif"])
    before = dict(place.properties)
    measured = [Measured("torch", "fp32", 20.0, 1.0), Measured("openvino", "bf16", 10.0, 1.0)]
    monkeypatch.setattr(encoders, "measure_runtimes", lambda *_: measured)
    row = clock(cast(Place, place))
    assert place.clocked == runs_by and row.found.startswith(f"{' '.join(runs_by)}: 30.0 tiles/s")
    assert place.properties == before  # the doctor changes nothing


def test_a_limit_on_tiles_shortens_the_run() -> None:
    limited = Cohort(COHORT.slides, COHORT.n_bytes, COHORT.patients, most_tiles=500)
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
    lost = Sample([SeenSlide(1.0, 0, 0, "x.svs is cut off: upload it again")])
    assert estimate([lost], COHORT, TWO_TASKS).found == "x.svs is cut off: upload it again"
    assert estimate([lost], COHORT, TWO_TASKS).status == "FAIL"
    empty = estimate([Sample([SeenSlide(1.0, 0, 0)])], COHORT, TWO_TASKS)
    assert (empty.status, empty.found) == ("FAIL", "no tissue on 1 slides")


def test_the_probe_tells_of_missing_packages_full_disks_and_limits(tmp_path: Path) -> None:
    asked = json.dumps({"packages": ["numpy", "no-such-package"], "scratch": [str(tmp_path), str(tmp_path / "none")]})
    said = subprocess.run([sys.executable, str(probe.__file__), asked], capture_output=True, check=True, env={})
    found = json.loads(said.stdout)
    assert found["packages"]["no-such-package"] is None and found["packages"]["numpy"]
    device, free = found["scratch"][str(tmp_path)]
    assert device == tmp_path.stat().st_dev and free > 0 and found["scratch"][str(tmp_path / "none")] is None
    assert 0 < found["memory_bytes"] < 2**50
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))

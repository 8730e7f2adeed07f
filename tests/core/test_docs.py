"""What the documentation says is what the code does."""

import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from jobs.__main__ import JOBS
from jobs.runtime.config import Config, describe_settings, load_config
from jobs.runtime.tables import SCHEMAS
from jobs.training.splitting import SPLITS, Patient, assign_splits
from tests.slides.demo import COHORT
from udfs.wsi import ErrorCode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _keys(settings: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in settings.items():
        nested = isinstance(value, dict) and f"{prefix}{key}" not in known()
        found |= _keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}"}
    return found


def known() -> set[str]:
    return {key for key, _, _ in describe_settings()}


def test_the_annotated_configuration_has_every_setting_at_its_default() -> None:
    path = ROOT / "conf/cohort.yaml"
    assert _keys(yaml.safe_load(path.read_text())) == known()
    config = load_config(str(path))
    bare = Config.model_validate(
        {"patients": config.patients, "output": {"root": config.output.root}, "slides": {"root": config.slides.root}}
    )
    assert config == bare


def test_the_demo_configuration_is_valid() -> None:
    assert load_config(str(ROOT / "conf/demo.yaml")).encoder.name == "tf_efficientnet_lite0"


def test_every_split_of_the_demo_has_a_patient_of_each_label() -> None:
    settings = load_config(str(ROOT / "conf/demo.yaml")).splits
    n_images = Counter(slide.patient_id for slide in COHORT)
    cohort = {s.patient_id: Patient(s.patient_id, s.center_id, s.label, n_images[s.patient_id]) for s in COHORT}
    fractions = {name: getattr(settings, name) for name in SPLITS}
    dealt = assign_splits(cohort.values(), fractions, {}, stratify=settings.stratify, seed=settings.seed)
    assert {(dealt[name], cohort[name].label) for name in cohort} == set(product(SPLITS, ("CE", "LAA")))


def test_the_readme_explains_every_error_code_and_no_other() -> None:
    section = README.partition("## How to read a failure")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = {code for row in rows for code in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {code.value for code in ErrorCode}


def test_the_readme_names_every_job_and_table() -> None:
    assert all(f"jobs/{job}.py" in README or f"`{job}.py`" in README for job in JOBS)
    assert all(f"| `{table}` |" in README for table in SCHEMAS)


def test_the_delta_jar_of_the_set_up_is_the_one_that_the_readme_and_the_wheel_name() -> None:
    files = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "conf/places").iterdir(), *(ROOT / "conf/spark").iterdir()]
    text = "".join(file.read_text() for file in files)
    coordinates = re.findall(r"io\.delta[: ]delta-spark_2\.13[: ]([\d.]+\d)", text)
    locked = re.search(r"^delta-spark==([\d.]+)", (ROOT / "conf/locks/dev.txt").read_text(), re.MULTILINE)
    jars = re.findall(r"delta-spark_2\.13-([\d.]+)\.jar", (ROOT / "conf/locks/jars.sha256").read_text())
    assert locked is not None
    assert {*coordinates, *jars} == {locked[1]}


def test_the_locks_name_no_host() -> None:
    locks = [path for path in (ROOT / "conf/locks").rglob("*") if path.is_file()]
    assert len(locks) >= 5
    for lock in locks:
        # npm's lock has URLs of authors and licences; where a package comes from is its "resolved"
        assert ('"resolved"' if lock.suffix == ".json" else "://") not in lock.read_text(), lock

"""What the documentation says is what the code does."""

import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pyspark
import yaml

from jobs.runtime.settings.arguments import JOBS
from jobs.runtime.settings.config import EACH, Config, describe_settings, load_config
from jobs.runtime.spark.session import delta_remedy
from jobs.training.splitting import SPLITS, Patient, assign_splits
from tests.slides.demo import COHORT
from udfs import schemas
from udfs.wsi import ErrorCode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def conf(folder: str) -> list[Path]:
    """The files of a folder of conf, without those that git ignores: somebody's own."""
    return sorted(path for path in (ROOT / "conf" / folder).iterdir() if not path.name.startswith("mine"))


EXAMPLES = ("patients", "slides.root", "output.root")  # conf/cohort.yaml has a value for these, no default


def lines_to_write(written: dict[str, Any], described: list[tuple[str, str, str]]) -> list[str]:
    """What conf/cohort.yaml lacks: each line as it must be, and below which section."""
    lines = []
    for key, default, meaning in described:
        section, _, name = key.rpartition(".")
        present = written
        for part in section.split(".") if section else ():
            present = present.get(next(iter(present)) if part == EACH else part) or {}
        if name not in present or (key not in EXAMPLES and present[name] != yaml.safe_load(default)):
            where = f"below `{section}:`" if section else "at the left margin"
            lines.append(f"{where}, write:\n{'  ' * bool(section) + f'{name}: {default}':<34} # {meaning}")
    return lines


def test_the_annotated_configuration_has_every_setting_at_its_default() -> None:
    path, described = ROOT / "conf/cohort.yaml", describe_settings()
    written = yaml.safe_load(path.read_text())
    lines = lines_to_write(written, described)
    assert not lines, f"{path}: " + "\n".join(lines)
    config = load_config(str(path))  # which refuses unknown settings
    bare = {"patients": config.patients, "output": {"root": config.output.root}, "slides": {"root": config.slides.root}}
    assert config == Config.model_validate(bare)


def test_a_setting_that_the_annotated_configuration_lacks_is_named_by_its_line() -> None:
    described = [("tiling.tile_px", "448", "edge of a tile"), ("tiling.overlap_px", "0", "overlap of tiles, pixels")]
    line = "below `tiling:`, write:\n  overlap_px: 0                    # overlap of tiles, pixels"
    assert lines_to_write({"tiling": {"tile_px": 448}}, described) == [line]
    assert lines_to_write({"tiling": {"tile_px": 448, "overlap_px": 1}}, described) == [line]
    assert lines_to_write({"tiling": {"tile_px": 448, "overlap_px": 0}}, described) == []


def test_the_demo_configuration_is_valid() -> None:
    assert load_config(str(ROOT / "conf/demo.yaml")).encoders.keys() == {"tf_efficientnet_lite0"}


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
    assert [job for job in JOBS if f"jobs/{job}.py" not in README and f"`{job}.py`" not in README] == []
    assert [table for table in schemas.TABLES if f"| `{table}` |" not in README] == []


def test_every_relative_link_of_the_pages_leads_to_a_file() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)", page.read_text())
        if not re.match(r"[a-z]+:", link)
    ]
    assert {"docs/architecture.md", "docs/glossary.md", "docs/adr"} <= {link for _, link in links}
    assert [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_every_path_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    paths = re.findall(r"`([^`\s]*/[^`\s]*)`", text)
    parents: list[tuple[int, str]] = []  # of a line of the tree of folders, by their indentation
    for line in re.findall(r"^[ │]*\w[\w/]*/ .*$", text, re.MULTILINE):
        folder = line.lstrip(" │").split()[0]
        indentation = len(line) - len(line.lstrip(" │"))
        parents = [parent for parent in parents if parent[0] < indentation]
        parents.append((indentation, folder))
        paths.append("".join(name for _, name in parents))
    assert {"udfs/wsi/tissue/", "jobs/runtime/settings/", "udfs/wsi/encoder/"} <= {*paths}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_delta_jars_of_the_set_up_are_those_that_documents_locks_and_messages_name() -> None:
    places = [*conf("places"), *conf("spark"), ROOT / "conf/k8s/Dockerfile"]
    named: dict[str, set[str]] = {}
    for file in (ROOT / "Makefile", ROOT / "README.md", *places):
        for artifact, version in re.findall(r"io\.delta[: ](delta-spark_[\d._]+)[: ]([\d.]+\d)", file.read_text()):
            named.setdefault(artifact, set()).add(version)
    oldest, newest = (_pins(lock) for lock in ("dev.txt", "newest-spark.txt"))
    assert named == {"delta-spark_2.13": {oldest["delta-spark"]}, "delta-spark_4.2_2.13": {newest["delta-spark"]}}
    sums = (ROOT / "conf/locks/jars.sha256").read_text()
    for pins, artifact in zip((oldest, newest), named, strict=True):
        assert f"  {artifact}-{pins['delta-spark']}.jar" in sums
        assert f"io.delta:{artifact}:{pins['delta-spark']} to spark-submit" in delta_remedy(pins["pyspark"])
    release = oldest["pyspark"].rpartition(".")[0]
    for place in conf("places"):
        text = place.read_text()
        assert ("io.delta:" in text) == (f"those for Spark {release}." in text), place


def test_the_jars_of_stores_are_those_of_the_hadoop_that_spark_has() -> None:
    [client] = (Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar")
    hadoop = client.stem.removeprefix("hadoop-client-api-")
    text = "".join((ROOT / "conf/k8s" / name).read_text() for name in ("Dockerfile", "README.md"))
    assert set(re.findall(r"org\.apache\.hadoop (hadoop-\w+) ([\d.]+\d)", text)) == {
        ("hadoop-azure", hadoop),
        ("hadoop-aws", hadoop),
    }
    sums = (ROOT / "conf/locks/jars.sha256").read_text()
    assert f"  hadoop-azure-{hadoop}.jar" in sums and f"  hadoop-aws-{hadoop}.jar" in sums


def test_what_hides_secrets_from_sparks_ui_knows_those_of_the_readme_and_hides_no_other_setting() -> None:
    words = [line.split(maxsplit=1) for path in conf("spark") if path.suffix == ".conf" for line in _settings(path)]
    emr = [path.read_text() for path in (ROOT / "conf/emr").glob("*.json") if "spark-defaults" in path.read_text()]
    words += [list(pair) for text in emr for pair in re.findall(r'"(spark\.[\w.]+)": "(.*)"', text)]
    found = [value for key, value in words if key == "spark.redaction.regex"]
    assert len(found) == 4 + 3 and len(set(found)) == 1
    hides = re.compile(found[0]).search
    names = {"AZURE_STORAGE_KEY", *re.findall(r"\$\{(\w+)\}", README)}
    by_settings = re.findall(r"spark\.[\w.]+\.AZURE_STORAGE_KEY", README)
    assert {key.split(".")[1] for key in by_settings} == {"yarn", "kubernetes"}
    told = ("X_SAS", "X_TOKEN", "SECRET_X", "X_PASSWORD_X", "AZURE_STORAGE_CONNECTION_STRING")
    hadoop = ("spark.hadoop.fs.azure.account.key.lab.dfs.core.windows.net", "spark.hadoop.fs.s3a.access.key")
    command = "org.apache.spark.deploy.SparkSubmit --conf spark.yarn.appMasterEnv.AZURE_STORAGE_KEY=x pyspark-shell"
    variables = [f"spark.emr-serverless.driverEnv.{name}" for name in (*names, *told)]
    assert [text for text in (*by_settings, *variables, *hadoop, command) if not hides(text)] == []
    assert [text for pair in words for text in pair if hides(text) and text not in found] == []
    sql = (
        "spark.sql.mapKeyDedupPolicy",
        "spark.sql.requireAllClusterKeysForCoPartition",
        "spark.io.encryption.keySizeBits",
    )
    assert [key for key in sql if hides(key)] == []


def _settings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def _pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "conf/locks" / lock).read_text(), re.MULTILINE))


def test_the_locks_name_no_host() -> None:
    locks = [path for path in (ROOT / "conf/locks").rglob("*") if path.is_file()]
    assert len(locks) >= 5
    for lock in locks:
        # npm's lock has URLs of authors and licences; where a package comes from is its "resolved"
        assert ('"resolved"' if lock.suffix == ".json" else "://") not in lock.read_text(), lock

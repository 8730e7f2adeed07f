"""What `make dist` builds for clusters: code that runs without the checkout, the same bytes each time, and its packages."""

import re
import subprocess
import zipfile
from importlib.metadata import version
from pathlib import Path

from tests.environments import CODE, ROOT, environment_without_checkout, make_dist, without_path


def test_the_zip_is_all_that_a_python_without_the_checkout_needs(tmp_path: Path) -> None:
    make_dist()
    python = environment_without_checkout(tmp_path / "node")

    def said(code: str, path: str) -> subprocess.CompletedProcess[str]:
        environment = without_path() | {"PYTHONPATH": path}
        command = [str(python), "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    alone = said("import udfs", "")
    assert "No module named 'udfs'" in alone.stderr
    shipped = said(
        "import jobs.runtime.settings.config as c, udfs.schemas as s; print(c.__file__, s.__file__)", str(CODE)
    )
    assert shipped.stdout.split() == [f"{CODE}/jobs/runtime/settings/config.py", f"{CODE}/udfs/schemas.py"], (
        shipped.stderr
    )
    code = "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('jobs', run_name='__main__')"
    assert said(code, str(CODE)).stdout == f"slidelake {version('slidelake')}\n"


def test_what_is_built_again_is_the_same_and_holds_every_file_of_the_code() -> None:
    make_dist()
    before = CODE.read_bytes()
    begun = CODE.stat().st_mtime_ns
    make_dist()
    assert CODE.stat().st_mtime_ns == begun, "nothing changed, and it was built again"
    make_dist("--always-make", "--assume-old=.venv/.packages")
    assert CODE.stat().st_mtime_ns > begun
    assert CODE.read_bytes() == before == CODE.with_name(f"{CODE.stem}-py3-none-any.whl").read_bytes()
    held = {name for name in zipfile.ZipFile(CODE).namelist() if name.endswith(".py")}
    assert held == {str(path.relative_to(ROOT)) for top in ("jobs", "udfs") for path in (ROOT / top).rglob("*.py")}


def test_the_packages_of_a_cluster_are_those_of_the_tests_less_what_only_tests_need() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "conf/locks" / name).read_text(), re.MULTILINE))

    cluster, tested = pins("runtime.txt"), pins("dev.txt")
    assert (ROOT / "dist/requirements.txt").read_bytes() == (ROOT / "conf/locks/runtime.txt").read_bytes()
    assert {name for name in cluster if name in tested and cluster[name] != tested[name]} == set()
    assert {"pyspark", "torch", "petastorm", "deltalake", "adlfs", "s3fs", "gcsfs", "openvino"} <= cluster.keys()
    assert not {"pytest", "mypy", "ruff", "moto", "hypothesis", "polars", "hatchling", "venv-pack"} & cluster.keys()

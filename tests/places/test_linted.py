"""Scripts and Dockerfiles of conf: what the linters of these languages say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*(ROOT / "conf").rglob("*.sh"), ROOT / ".ci/run"]
DOCKERFILES = [*(ROOT / "conf").rglob("Dockerfile")]


@pytest.mark.parametrize(("linter", "files"), [("shellcheck", SCRIPTS), ("hadolint", DOCKERFILES)])
def test_no_findings(linter: str, files: list[Path]) -> None:
    assert len(files) >= 2
    tool = Path(sys.executable).parent / linter
    done = subprocess.run([tool, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("linter", "text", "finding"),
    [("shellcheck", "#!/bin/sh\nrm $1\n", "SC2086"), ("hadolint", "FROM debian:12\nRUN cd /tmp\n", "DL3003")],
)
def test_a_finding_is_said(linter: str, text: str, finding: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    tool = Path(sys.executable).parent / linter
    done = subprocess.run([tool, tmp_path / "file"], capture_output=True, text=True, check=False)
    assert done.returncode and finding in done.stdout

"""Where the newest pyarrow, and the NumPy that it needs, hide those that petastorm needs; all else is as in .venv."""

import os
import subprocess
import sys
from pathlib import Path

_OVERLAY = Path(sys.prefix) / "newest"


def run_with_newest_pyarrow(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m module arguments` there, whatever its status."""
    assert _OVERLAY.is_dir(), f"{_OVERLAY} is not there: make test installs it"
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(_OVERLAY)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )

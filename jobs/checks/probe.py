"""A program for the Python of executors: prints what this Python and this machine have, as a line of JSON.

Executors get it as text and need only Python 3.7 or later, so that a wrong Python can say so. Its argument is JSON:
{"packages": [names], "scratch": [folders, if the environment names none]}.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    from importlib.metadata import distribution
except ImportError:  # Python 3.7: only its version matters
    distribution = None  # type: ignore[assignment]

_GROUPS = Path("/sys/fs/cgroup")


def version_of(name: str) -> str | None:
    """Returns the version of a package, None if it is missing."""
    try:
        return distribution(name).version
    except Exception:
        return None


def memory_bytes() -> int:
    """Returns what processes here may take: the machine's memory, or its container's if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        names = [line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        names = []
    for name in {*names, ""}:
        for group in [Path(name), *Path(name).parents]:
            for file in (_GROUPS / group / "memory.max", _GROUPS / "memory" / group / "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # no such group, or "max"
                    limits.append(int(file.read_text()))
    return min(limits)


def scratch_folders(configured: list[str]) -> dict[str, list[int] | None]:
    """Returns device and free bytes of each folder that Spark spills to; None if the folder cannot be written."""
    named = os.environ.get("LOCAL_DIRS") or os.environ.get("SPARK_EXECUTOR_DIRS") or os.environ.get("SPARK_LOCAL_DIRS")
    found: dict[str, list[int] | None] = {}
    for folder in named.replace(":", ",").split(",") if named else configured or [tempfile.gettempdir()]:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"slidelake")
            found[folder] = [Path(folder).stat().st_dev, shutil.disk_usage(folder).free]
        except OSError:
            found[folder] = None
    return found


def visible_gpus() -> int:
    """Returns the number of NVIDIA GPUs that are visible."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith(b"GPU ") for line in listing.stdout.splitlines())


def main(request: dict[str, Any]) -> None:
    """Prints the answer to a request."""
    found = {
        "host": socket.gethostname(),
        "executor": os.environ.get("SLIDELAKE_EXECUTOR", ""),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "packages": {name: version_of(name) for name in request["packages"]},
        "memory_bytes": memory_bytes(),
        "scratch": scratch_folders(request["scratch"]),
        "gpus": visible_gpus(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

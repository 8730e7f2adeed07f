"""The feed where there is no Java, no Spark and no way to either."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyspark", "py4j", "delta"):
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Refuse())
from jobs.training.feed import make_feed
for backend in ("petastorm", "pyarrow"):
    feed = make_feed(sys.argv[1], backend=backend)
    print(feed.backend, sum(len(bags) for bags in feed.epoch(0)))
"""


def test_the_feed_needs_no_java_and_no_spark(table: Path, tmp_path: Path) -> None:
    """Nor does it print anything."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAVA_HOME", "SPARK_HOME")}
    environment["PATH"] = str(tmp_path)  # nothing is there, java neither
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(table)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("petastorm 50\npyarrow 50\n", "", 0)

"""The place that is looked at: the session, its executors, and ways to ask them something, even those with a wrong Python."""

import inspect
import json
import pickle
import re
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark import cloudpickle
from pyspark.sql import SparkSession

from jobs.checks import probe
from jobs.runtime.cohort.locating import Located, locate
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.resources import Executor, StageResources
from jobs.runtime.spark.session import heap_bytes, is_local, size_of

# What shapes the rows, and what executors read with; further ones come with settings, see `Place.packages`.
_PACKAGES = (
    "pyarrow",
    "pandas",
    "numpy",
    "torch",
    "timm",
    "safetensors",
    "tifffile",
    "imagecodecs",
    "simplejpeg",
    "pillow",
    "fsspec",
    "tenacity",
)
_STORE_PACKAGES = {"adlfs": {"az", "abfs", "abfss"}, "s3fs": {"s3", "s3a"}, "gcsfs": {"gs", "gcs"}}
_OWN = ("jobs", "udfs")
TASKS_AN_EXECUTOR = 2  # Spark hands them out in turns: none is left out
_TRIES = 3  # of four attempts each: one executor in two may be broken, and the others still be asked
# Run by sh: what the Python of the executor says last, or if it does not run, by which host and why.
_SHELL = r"""
cat > /dev/null
export SLIDELAKE_EXECUTOR=$PPID
if answer=$("$0" -c "$1" "$2" 2>&1); then who=; else who="$(uname -n): "; fi
printf '%s%s\n' "$who" "$(printf '%s\n' "$answer" | tail -n 1)"
"""

Answer = TypeVar("Answer")


class NoPythonError(Exception):
    """No executor has a Python that runs, or that is the driver's."""


class MissingPackageError(Exception):
    """A package of others that executors lack, with the host's name."""


class ExecutorError(Exception):
    """What else a function met on an executor, with the host's name."""


@dataclass(frozen=True)
class Probe:
    """The answer of an executor's Python, about itself and its machine; see `jobs.checks.probe`."""

    host: str
    executor: str  # tells those of one host apart
    python: str
    packages: dict[str, str | None]
    memory_bytes: int
    scratch: dict[str, list[int] | None]
    gpus: int


@dataclass
class Place:
    """Where a run would happen, and what it would be about."""

    spark: SparkSession
    config: Config
    images: Sequence[Image]
    deadline_h: float | None = None
    run: Run = field(init=False)
    executors: list[Executor] = field(default_factory=list)  # filled by the first check; none in local mode
    left: list[str] = field(default_factory=list)  # checks that took too long: their threads may wait yet

    def __post_init__(self) -> None:
        self.run = Run(self.config, self.spark, Job("doctor"))

    @property
    def is_local(self) -> bool:
        """Whether all runs in one JVM."""
        return is_local(self.spark)

    @property
    def n_executors(self) -> int:
        """1 in local mode."""
        return len(self.executors) or 1

    @cached_property
    def heap_bytes(self) -> int:
        """The heap of a JVM that tasks run in: an executor's, or in local mode the driver's."""
        return heap_bytes(self.spark)

    def conf(self, key: str, default: str = "") -> str:
        """A setting of Spark."""
        return self.spark.sparkContext.getConf().get(key, default) or default

    def mib(self, key: str) -> int | None:
        """A size among Spark's settings, a bare number of which counts MiB; in bytes, None if it is not set."""
        text = self.conf(key)
        return size_of(text, "m") if text else None

    @property
    def stage(self) -> StageResources:
        """How the features stage would be scheduled; raises ConfigError."""
        return self.run.stage_resources

    @cached_property
    def located(self) -> dict[str, Located]:
        """The files of the cohort; raises ConfigError."""
        return locate(self.images, self.config)

    @cached_property
    def packages(self) -> list[str]:
        """Those that executors need for these settings."""
        runtime = {"openvino"} if self.config.encoder.runtime == "openvino" else set()
        return [*_PACKAGES, *sorted({*self.store_packages} | runtime)]

    @cached_property
    def store_packages(self) -> list[str]:
        """Those of them that reach the stores of these slides."""
        uris = [self.config.slides.root, *(image.uri for image in self.images)]
        protocols = {uri.partition("://")[0] for uri in uris if uri and "://" in uri}
        return sorted(package for package, schemes in _STORE_PACKAGES.items() if schemes & protocols)

    @cached_property
    def _answers(self) -> list[str]:
        folders = [folder for folder in self.conf("spark.local.dir").split(",") if folder]
        request = json.dumps({"packages": self.packages, "scratch": folders})
        words = ["sh", "-c", _SHELL, self.spark.sparkContext.pythonExec, inspect.getsource(probe), request]
        program = f"exec {shlex.join(words)}".replace("\\", r"\\").replace("'", r"\'")
        n = self.n_executors * TASKS_AN_EXECUTOR
        # The JVM runs the program, as it runs the Python workers, so also if the workers would not start.
        lines = self.spark.sql(f"SELECT TRANSFORM(id) USING '{program}' AS (line STRING) FROM range(0, {n}, 1, {n})")
        return [row.line for row in lines.collect()]

    @cached_property
    def probes(self) -> list[Probe]:
        """The answers of the executors whose Python runs, one per executor, by host; raises NoPythonError if there is none."""
        found = [Probe(**json.loads(line)) for line in self._answers if line.startswith("{")]
        if not found:
            raise NoPythonError
        once = {(one.host, one.executor): one for one in found}
        return [once[key] for key in sorted(once)]

    def lacking(self, packages: Sequence[str]) -> list[str]:
        """Which of these packages is missing where."""
        return sorted(
            {f"{name} on {one.host}" for one in self.probes for name in packages if one.packages[name] is None}
        )

    @cached_property
    def unprobed(self) -> list[str]:
        """What executors without a Python that runs say, a line each."""
        return sorted({line for line in self._answers if not line.startswith("{")})

    def ask(self, *functions: Callable[[], Answer]) -> list[Answer]:
        """What functions return, each in a task of its own of the features stage; in the order in which they were given.

        Raises:
            MissingPackageError, ExecutorError: what the first that failed says; Spark does not try it again.
        """
        dumps: Any = cloudpickle.dumps
        pickled = [dumps(function) for function in functions]

        def attempt(number: int) -> tuple[Any, str, str]:  # names nothing of this module, which executors may lack
            try:  # unpickling imports slidelake, which may be what fails
                return pickle.loads(pickled[number])(), "", ""
            except Exception as error:
                missing = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
                return None, f"{socket.gethostname()}: {type(error).__name__}: {error}", missing.partition(".")[0]

        tasks = self.spark.sparkContext.parallelize(range(len(functions)), len(functions))
        profile = self.stage.profile
        answers = (tasks.withResources(profile) if profile else tasks).map(attempt).collect()
        for _, error, missing in answers:
            if missing and missing not in _OWN:
                raise MissingPackageError(error)
            if error:
                raise ExecutorError(error)
        return [answer for answer, _, _ in answers]

    def ask_any(self, function: Callable[[], Answer]) -> Answer:
        """What one function returns on any executor whose Python can run it; raises NoPythonError if there is none."""
        if not any(self._serve):
            raise NoPythonError
        for _ in range(_TRIES - 1):
            with suppress(Py4JJavaError):
                return self.ask(function)[0]
        try:
            return self.ask(function)[0]
        except Py4JJavaError:
            if self.unprobed or not all(self._serve):
                raise NoPythonError from None
            raise

    def ask_every(self, function: Callable[[], Answer]) -> list[Answer]:
        """What one function returns on as many executors as there are, which Spark gives a task each while all are idle.

        On any one if the Python of some cannot run it; raises NoPythonError if none can.
        """
        if not self.unprobed and all(self._serve):
            with suppress(Py4JJavaError):
                return self.ask(*[function] * self.n_executors)
        return [self.ask_any(function)]

    @property
    def _serve(self) -> list[bool]:
        """Whether the Python of each executor that has one can run functions of this one."""
        here = list(map(str, sys.version_info[:2]))
        return [one.python.split(".")[:2] == here for one in self.probes]


def telling_line(error: Exception) -> str:
    """The line of a failed job's many that tells why."""
    text = str(getattr(error, "java_exception", error))
    lines = [
        line for line in text.splitlines() if re.match(r"[\w.$]+(Error|Exception|Mismatch)?: |\S*\[[A-Z_]+\]", line)
    ]
    return (lines or text.splitlines() or [type(error).__name__])[-1].strip()

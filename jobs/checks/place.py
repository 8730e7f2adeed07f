"""What the checks examine: the session, its executors, and ways to ask them, even executors with a wrong Python."""

import inspect
import json
import pickle
import re
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from jobs.checks import probe
from jobs.runtime.cohort.locating import Located, locate
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.resources import Executor, StageResources
from jobs.runtime.spark.session import heap_bytes, is_local, size_of

# What shapes the rows, and what executors read with; the settings add more, see `Place.packages`.
_PACKAGES = ["pyarrow", "pandas", "numpy", "torch", "timm", "safetensors", "tifffile", "imagecodecs", "simplejpeg"]
_PACKAGES += ["pillow", "fsspec", "tenacity"]
_STORE_PACKAGES = {"adlfs": {"az", "abfs", "abfss"}, "s3fs": {"s3", "s3a"}, "gcsfs": {"gs", "gcs"}}
_OWN = ("jobs", "udfs")
TASKS_PER_EXECUTOR = 2  # Spark gives them out in turns: no executor is left out
_TRIES = 3  # of four attempts each: the others answer even if one executor in two is broken
# Run by sh: the last line of the executor's Python; if that does not run, the host and why.
_SHELL = r"""
cat > /dev/null
export SLIDELAKE_EXECUTOR=$PPID
if answer=$("$0" -c "$1" "$2" 2>&1); then who=; else who="$(uname -n): "; fi
printf '%s%s\n' "$who" "$(printf '%s\n' "$answer" | tail -n 1)"
"""

Answer = TypeVar("Answer")


class NoPythonError(Exception):
    """No executor has a Python that runs and is the driver's."""


class MissingPackageError(Exception):
    """An executor lacks a package that is not slidelake's; the message names the host."""


class ExecutorError(Exception):
    """A function failed on an executor; the message names the host."""


@dataclass(frozen=True)
class Probe:
    """The answer of an executor's Python about itself and its machine; see `jobs.checks.probe`."""

    host: str
    executor: str  # tells those of one host apart
    python: str
    packages: dict[str, str | None]
    memory_bytes: int
    scratch: dict[str, list[int] | None]
    gpus: int


@dataclass
class Place:
    """Where a run would happen, and what it would work on."""

    spark: SparkSession
    config: Config
    images: Sequence[Image]
    deadline_h: float | None = None
    run: Run = field(init=False)
    executors: list[Executor] = field(default_factory=list)  # set by the first check; empty in local mode
    left: list[str] = field(default_factory=list)  # checks that took too long: their threads may still wait

    def __post_init__(self) -> None:
        self.run = Run(self.config, self.spark, Job("doctor"))

    @property
    def is_local(self) -> bool:
        """Whether driver and tasks run in one JVM."""
        return is_local(self.spark)

    @property
    def n_executors(self) -> int:
        """The number of executors; 1 in local mode."""
        return len(self.executors) or 1

    @cached_property
    def heap_bytes(self) -> int:
        """The heap of a JVM that runs tasks: an executor's, or in local mode the driver's."""
        return heap_bytes(self.spark)

    def conf(self, key: str, default: str = "") -> str:
        """Returns a setting of Spark."""
        return self.spark.sparkContext.getConf().get(key, default) or default

    def mib(self, key: str) -> int | None:
        """Returns a setting of Spark that is a size, in bytes; a bare number is in MiB. None if it is not set."""
        text = self.conf(key)
        return size_of(text, "m") if text else None

    @property
    def stage(self) -> StageResources:
        """How the features stage would be scheduled. Raises ConfigError."""
        return self.run.stage_resources

    @cached_property
    def located(self) -> dict[str, Located]:
        """The files of the cohort. Raises ConfigError."""
        return locate(self.images, self.config)

    @cached_property
    def packages(self) -> list[str]:
        """The packages that executors need for these settings."""
        runtime = {"openvino"} if self.config.inference.runtime == "openvino" else set()
        return [*_PACKAGES, *sorted({*self.store_packages} | runtime)]

    @cached_property
    def store_packages(self) -> list[str]:
        """The packages that reach the stores of these slides."""
        uris = [self.config.slides.root, *(image.uri for image in self.images)]
        protocols = {uri.partition("://")[0] for uri in uris if uri and "://" in uri}
        return sorted(package for package, schemes in _STORE_PACKAGES.items() if schemes & protocols)

    @cached_property
    def _answers(self) -> list[str]:
        folders = [folder for folder in self.conf("spark.local.dir").split(",") if folder]
        request = json.dumps({"packages": self.packages, "scratch": folders})
        words = ["sh", "-c", _SHELL, self.spark.sparkContext.pythonExec, inspect.getsource(probe), request]
        program = f"exec {shlex.join(words)}".replace("\\", r"\\").replace("'", r"\'")
        n = self.n_executors * TASKS_PER_EXECUTOR
        # The JVM runs the program, as it runs the Python workers, so also if the workers would not start.
        lines = self.spark.sql(f"SELECT TRANSFORM(id) USING '{program}' AS (line STRING) FROM range(0, {n}, 1, {n})")
        return [row.line for row in lines.collect()]

    @cached_property
    def probes(self) -> list[Probe]:
        """The answers of the executors whose Python runs, one per executor, by host. Raises NoPythonError if there is none."""
        found = [Probe(**json.loads(line)) for line in self._answers if line.startswith("{")]
        if not found:
            raise NoPythonError
        once = {(one.host, one.executor): one for one in found}
        return [once[key] for key in sorted(once)]

    def lacking(self, packages: Sequence[str]) -> list[str]:
        """Returns which of these packages is missing on which host."""
        missing = {(name, one.host) for one in self.probes for name in packages if one.packages[name] is None}
        return [f"{name} on {host}" for name, host in sorted(missing)]

    @cached_property
    def unprobed(self) -> list[str]:
        """What executors say whose Python does not run, one line each."""
        return sorted({line for line in self._answers if not line.startswith("{")})

    def ask(self, *functions: Callable[[], Answer]) -> list[Answer]:
        """Returns the results of functions, each run in a task of its own of the features stage.

        Raises MissingPackageError or ExecutorError for the first function that failed; Spark does not try it again.
        """
        dumps: Any = cloudpickle.dumps
        pickled = [dumps(function) for function in functions]

        def attempt(number: int) -> tuple[Any, str, str]:  # uses nothing of this module, which executors may lack
            try:  # unpickling imports slidelake, which may fail
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
        """Returns the result of a function on any executor whose Python can run it. Raises NoPythonError if there is none."""
        if not any(self._serve):
            raise NoPythonError
        tries = Retrying(stop=stop_after_attempt(_TRIES), retry=retry_if_exception_type(Py4JJavaError), reraise=True)
        try:
            answers: list[Answer] = tries(self.ask, function)
        except Py4JJavaError:
            if self.unprobed or not all(self._serve):
                raise NoPythonError from None
            raise
        return answers[0]

    def ask_every(self, function: Callable[[], Answer]) -> list[Answer]:
        """Returns what a function returns on as many executors as exist: Spark gives each a task while all are idle.

        On any one if the Python of some cannot run it; raises NoPythonError if none can.
        """
        if not self.unprobed and all(self._serve):
            return self.ask(*[function] * self.n_executors)
        return [self.ask_any(function)]

    @property
    def _serve(self) -> list[bool]:
        """Whether the Python of each executor that has one can run functions of this one."""
        here = list(map(str, sys.version_info[:2]))
        return [one.python.split(".")[:2] == here for one in self.probes]


def telling_line(error: Exception) -> str:
    """Returns the line of a failed job's many that says why."""
    lines = str(getattr(error, "java_exception", error)).splitlines() or [type(error).__name__]
    telling = [line for line in lines if re.match(r"[\w.$]+(Error|Exception|Mismatch)?: |\S*\[[A-Z_]+\]", line)]
    return (telling or lines)[-1].strip()

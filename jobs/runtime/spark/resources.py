"""The executors of a cluster, and the resource profile of the features stage, checked against what executors have."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from py4j.protocol import Py4JError
from pyspark.resource import ExecutorResourceRequests, ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.sections import ResourcesSettings
from jobs.runtime.spark.jvm import executor_summaries
from jobs.runtime.spark.session import is_local, slots

_log = logging.getLogger("slidelake.resources")
_GPU = "spark.executor.resource.gpu"
_PATIENCE_S = 30.0  # before a line says that the cluster has no executor yet
REQUEST_REMEDY = (
    "lower these settings to what a worker has free, as the page of the master or ResourceManager tells (Kubernetes: kubectl "
    "describe pod), or wait for it; if that page shows executors that ended at once, look at their logs"
)
_LATECOMERS_S = 3.0  # for a larger executor, if the first ones are too small


@dataclass(frozen=True)
class Executor:
    """What an executor offers to tasks."""

    cores: int
    gpus: int

    def tasks(self, cpus: int, gpus: float) -> int:
        """Returns how many tasks of so many CPUs and GPUs run at once; a GPU is shared by whole tasks: two of 0.4, one of 0.6."""
        by_cores = self.cores // cpus
        return min(by_cores, self.gpus * math.floor(1 / gpus)) if gpus else by_cores


@dataclass(frozen=True)
class StageResources:
    """How the tasks of the features stage are scheduled."""

    session: SparkSession
    profile: ResourceProfile | None = None  # for DataFrame.mapInArrow; None: Spark's own settings hold
    cpus: int = 1
    gpus: float = 0

    @property
    def gpu_share(self) -> float:
        """Part of a GPU that a task may take, if several tasks run on one GPU."""
        if is_local(self.session):  # tasks take turns with the GPUs that PyTorch finds
            return 1 / math.ceil(slots(self.session) / max(1, torch.cuda.device_count()))
        return 1 / math.floor(1 / self.gpus) if 0 < self.gpus < 1 else 1.0

    def slots(self) -> int:
        """Returns how many of its tasks run at once on today's executors; with dynamic allocation, no fewer than other tasks."""
        if self.profile is None:
            return slots(self.session)
        least = slots(self.session) if _is_dynamic(self.session) else 1
        return max(least, sum(executor.tasks(self.cpus, self.gpus) for executor in executors_of(self.session)))


def features_resources(session: SparkSession, settings: ResourcesSettings) -> StageResources:
    """Returns the resources of the features stage, with a profile if the settings ask for one and the cluster can give it.

    With a fixed number of executors the profile is about tasks alone, and they run on the executors of all stages. With dynamic
    allocation Spark starts further executors for it, with `spark.executor.resource.gpu.amount` GPUs each, as all others. If
    that amount is 0, other executors have no GPU and these have what a task takes. Raises ConfigError if a task asks for more
    than an executor has, and would wait for ever.
    """
    if not settings.gpus_per_task and settings.cpus_per_task is None:
        return StageResources(session)
    if is_local(session):
        _say("Spark runs on this machine alone: its tasks take all cores, and a GPU if it has one")
        return StageResources(session)
    conf = session.sparkContext.getConf()
    gpus, cpus = settings.gpus_per_task or 0, settings.cpus_per_task or int(conf.get("spark.task.cpus", "1") or 1)
    executors = _executors_to_count_on(session, cpus, gpus)
    most_gpus, most_cores = max(e.gpus for e in executors), max(e.cores for e in executors)
    if _is_dynamic(session) and conf.get(f"{_GPU}.amount", None) == "0":
        most_gpus = math.ceil(gpus)
    if gpus and not most_gpus:
        _say(f"executors have no GPU ({_GPU}.amount): the features stage runs without")
        gpus = 0
    if cpus > most_cores:
        raise ConfigError(
            f"resources.cpus_per_task is {cpus}, but an executor has {most_cores} cores",
            f"set it to {most_cores} or less, or spark.executor.cores to {cpus} if nodes have as many",
        )
    if not gpus and settings.cpus_per_task is None:
        return StageResources(session)
    tasks = TaskResourceRequests().cpus(cpus)
    builder = ResourceProfileBuilder().require(tasks.resource("gpu", gpus) if gpus else tasks)
    if gpus and _is_dynamic(session):
        script, vendor = conf.get(f"{_GPU}.discoveryScript", ""), conf.get(f"{_GPU}.vendor", "")
        builder.require(ExecutorResourceRequests().resource("gpu", most_gpus, script or "", vendor or ""))
    return StageResources(session, builder.build, cpus, gpus)


def _is_dynamic(session: SparkSession) -> bool:
    return session.sparkContext.getConf().get("spark.dynamicAllocation.enabled", "false") == "true"


def _executors_to_count_on(session: SparkSession, cpus: int, gpus: float) -> list[Executor]:
    """Returns the executors that run now, at least one: Spark's first task waits until one has started."""
    session.range(1).count()
    found = executors_of(session)
    if not any(executor.tasks(cpus, gpus) for executor in found):
        time.sleep(_LATECOMERS_S)
        found = executors_of(session)
    return found


@contextmanager
def telling_who_is_awaited(session: SparkSession) -> Iterator[None]:
    """Logs a line every half minute of the block in which Spark has work and no executor: it waits in silence."""
    ended = threading.Event()

    def watch() -> None:
        with suppress(Py4JError):  # a JVM that ended is reported elsewhere
            while not ended.wait(_PATIENCE_S) and not executors_of(session):
                if session.sparkContext.statusTracker().getActiveJobsIds():
                    _say(f"no executor yet: Spark waits for one, of {executor_request(session)}; {REQUEST_REMEDY}")

    thread = threading.Thread(target=watch, name="executors", daemon=True)
    if not is_local(session):
        thread.start()
    try:
        yield
    finally:
        ended.set()


def executor_request(session: SparkSession) -> str:
    """Returns what Spark asks the cluster for per executor, as far as its settings say."""
    conf = session.sparkContext.getConf()
    request = [f"{conf.get('spark.executor.memory', None) or '1g'} of memory (spark.executor.memory)"]
    for key, what in (
        ("spark.executor.memoryOverhead", "beside it"),
        ("spark.executor.cores", "cores"),
        (f"{_GPU}.amount", "GPUs"),
    ):
        if amount := conf.get(key, None):
            request.append(f"{amount} {what} ({key})")
    return ", ".join(request)


def executors_of(session: SparkSession) -> list[Executor]:
    """Returns the executors that run now."""
    return [Executor(row.totalCores(), _gpus(row.resources())) for row in executor_summaries(session) if row.isActive()]


def plain_executors(session: SparkSession) -> int:
    """Returns how many executors run the stages that have no resources of their own; 1 in local mode."""
    return sum(row.isActive() and row.resourceProfileId() == 0 for row in executor_summaries(session)) or 1


def ended_executors(session: SparkSession) -> set[str]:
    """Returns the ids of executors that ended: that died, or that the cluster took away."""
    return {row.id() for row in executor_summaries(session) if not row.isActive()}


def _gpus(resources: Any) -> int:
    return len(resources.apply("gpu").addresses()) if resources.contains("gpu") else 0


def _say(text: str) -> None:
    _log.warning("slidelake: resources: %s", text)

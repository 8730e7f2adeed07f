"""Clusters of real Spark daemons on loopback, with GPUs that only a script knows of, and what is submitted to them."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyspark

from tests.environments import ROOT, without_path
from tests.faults.commands import run_to_end, started, wait_until
from tests.stores.process import HOST, ask, free_port

_COMMAND_S = 600  # torch's agents wait up to 300 s for one another at their end, where one is gone too soon
_SPARK = Path(pyspark.__file__).parent
_ENVIRONMENT = {
    "SPARK_LOCAL_IP": HOST,
    "SPARK_DAEMON_MEMORY": "256m",
    "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1",
    "PYSPARK_PYTHON": sys.executable,  # by which spark-submit finds Spark, and executors find Python
    "PYTHONDONTWRITEBYTECODE": "",
}
_SMALL = {
    "spark.driver.host": HOST,
    "spark.driver.memory": "1g",
    "spark.executor.memory": "512m",
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.sql.shuffle.partitions": "2",  # tables of a dozen rows
    "spark.ui.enabled": "false",
}


@contextmanager
def standalone(folder: Path, *, cores: int, gpus: Sequence[int]) -> Iterator[str]:
    """A master, and a worker of so many cores for each number of GPUs; yields the master's URL, and ends them with the block.

    Executors of worker 0 start in `folder`/work0/APPLICATION/NUMBER, and so on; no variable leads them to the checkout.
    """
    port, page = free_port(), free_port()
    url = f"spark://{HOST}:{port}"
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(folder, "master.Master", "--port", str(port), "--webui-port", str(page)))
        for number, has in enumerate(gpus):
            size = ("--cores", str(cores), "--memory", "1g", "--work-dir", str(folder / f"work{number}"))
            daemons.enter_context(_daemon(folder, "worker.Worker", "--webui-port", "0", *size, url, gpus=has))

        def all_there() -> bool:
            with suppress(OSError):
                return bool(json.loads(ask(f"http://{HOST}:{page}/json/"))["aliveworkers"] == len(gpus))
            return False

        wait_until(all_there, 60, f"{len(gpus)} workers are with the master", every=0.1)
        yield url


@contextmanager
def _daemon(folder: Path, name: str, *arguments: str, gpus: int = 0) -> Iterator[None]:
    command = [str(_SPARK / "bin/spark-class"), f"org.apache.spark.deploy.{name}", "--host", HOST, *arguments]
    environment = _ENVIRONMENT | {"SPARK_WORKER_OPTS": _gpus_of_a_worker(folder, gpus)}
    with daemon(command, environment, folder / f"{name}.log"):
        yield


@contextmanager
def daemon(command: Sequence[str], environment: Mapping[str, str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that works in the folder of its log, with these variables and no way to the checkout; ends with the block."""
    with started(command, {**without_path(), **environment}, log.parent, log) as process:
        yield process


def _gpus_of_a_worker(folder: Path, gpus: int) -> str:
    options = {"amount": gpus, "discoveryScript": pretend_gpus(folder, gpus)}
    return " ".join(f"-Dspark.worker.resource.gpu.{key}={value}" for key, value in options.items()) if gpus else ""


def pretend_gpus(folder: Path, gpus: int) -> Path:
    """A discovery script that finds so many."""
    script = folder / f"{gpus}gpus.sh"
    found = {"name": "gpu", "addresses": [str(address) for address in range(gpus)]}
    script.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    script.chmod(0o755)
    return script


def submit(
    folder: Path, master: str, conf: Mapping[str, object], script: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """`spark-submit` with the settings of conf/spark/standalone.conf and these; every process of it ends with the call.

    Spark writes below `folder`.
    """
    properties = ("--properties-file", str(ROOT / "conf/spark/standalone.conf"))
    return submit_words(folder, [*properties, "--master", master, str(ROOT / script), *arguments], conf)


def submit_words(folder: Path, words: Sequence[str], conf: Mapping[str, object]) -> "subprocess.CompletedProcess[str]":
    """`spark-submit` with these words and, before them, these settings and those of a small machine."""
    settings = [part for key, value in (_SMALL | dict(conf)).items() for part in ("--conf", f"{key}={value}")]
    command = [str(_SPARK / "bin/spark-submit"), *settings, *words]
    return run_to_end(command, without_path() | _ENVIRONMENT | {"SPARK_HOME": str(_home(folder))}, _COMMAND_S)


def _home(folder: Path) -> Path:
    """Spark's own folder, but for what it writes there: the workers of local-cluster have no other place."""
    home = folder / "spark"
    if not home.exists():
        home.mkdir()
        for part in ("bin", "conf", "jars"):
            (home / part).symlink_to(_SPARK / part)
    return home

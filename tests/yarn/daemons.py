"""Real daemons of YARN on loopback, with GPUs that only a script knows of, and Spark's history server.

They run with conf/yarn as it is, but for isolation of GPUs, which takes root and GPUs.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

from tests.cluster.clusters import daemon
from tests.environments import ROOT
from tests.faults.commands import wait_until
from tests.stores.process import HOST, ask, free_port

JARS = ROOT / ".venv/hadoop"
LEAST_MB = 512  # of a container, which has a multiple of it
MEMORY_MB = 10240
_JAVA = ("java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
_OPENED = [part for name in ("lang", "util", "nio") for part in ("--add-opens", f"java.base/java.{name}=ALL-UNNAMED")]
_LOGGING = """\
log4j.rootLogger=INFO,console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.layout=org.apache.log4j.PatternLayout
log4j.appender.console.layout.ConversionPattern=%d %p %c{1}: %m%n
"""


@dataclass(frozen=True)
class Used:
    """What a queue has of the cluster."""

    mb: int
    gpus: int
    containers: int


@dataclass(frozen=True)
class Yarn:
    """A cluster that runs."""

    folder: Path  # all that daemons and containers write is below it
    url: str  # of the ResourceManager's pages

    @property
    def conf(self) -> Path:
        """HADOOP_CONF_DIR, for clients."""
        return self.folder / "conf"

    def ask(self, path: str) -> Any:
        """An answer of the ResourceManager's REST API, below /ws/v1/cluster."""
        return json.loads(ask(f"{self.url}/ws/v1/cluster/{path}"))

    def apps(self) -> list[dict[str, Any]]:
        """All applications, in the order in which they came."""
        found = (self.ask("apps")["apps"] or {}).get("app", [])
        return sorted(found, key=lambda app: int(app["id"].rpartition("_")[2]))

    def used(self, *queues: str) -> tuple[Used, ...]:
        """What these queues have now, all at one time."""
        found = self.ask("scheduler")["scheduler"]["schedulerInfo"]["queues"]["queue"]
        by_name = {each["queueName"]: each for each in found}
        return tuple(_used(by_name[queue]) for queue in queues)

    @contextmanager
    def watching(self, *queues: str) -> Iterator[list[tuple[Used, ...]]]:
        """While the block runs, what these queues have together at a time, over and over; raises what it meets at the end."""
        seen: list[tuple[Used, ...]] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                seen.append(self.used(*queues))

        with ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(watch)
            try:
                yield seen
            finally:
                ended.set()
            watcher.result()

    def log(self, app: str, name: str = "stdout") -> str:
        """What the driver of an application said."""
        [file] = self.folder.glob(f"logs/{app}/container_*_000001/{name}")
        return file.read_text()


@contextmanager
def yarn(folder: Path, *, gpus: int) -> Iterator[Yarn]:
    """A ResourceManager, and a NodeManager of 10 GB, 8 cores and so many GPUs, of which a container sees one."""
    assert list(JARS.glob("hadoop-yarn-*.jar")), f"{JARS} is not there: make cluster-test installs it"
    conf, page = folder / "conf", free_port()
    conf.mkdir()
    scheduler = ROOT / "conf/yarn/capacity-scheduler.xml"
    (conf / scheduler.name).symlink_to(scheduler)
    (conf / "log4j.properties").write_text(_LOGGING)
    _write(conf / "core-site.xml", {"fs.defaultFS": "file:///", "hadoop.tmp.dir": folder / "tmp"})
    _write(conf / "yarn-site.xml", _read(ROOT / "conf/yarn/yarn-site.xml") | _site(folder, page))
    _write(conf / "node-resources.xml", {"yarn.nodemanager.resource-type.yarn.io/gpu": gpus})
    cluster = Yarn(folder, f"http://{HOST}:{page}")
    with ExitStack() as daemons:
        names = ("resourcemanager.ResourceManager", "nodemanager.NodeManager")
        started = [daemons.enter_context(_daemon(cluster, name)) for name in names]

        def is_there() -> bool:
            for name, process in zip(names, started, strict=True):
                assert process.poll() is None, (folder / f"{name}.log").read_text()
            with suppress(OSError):
                return bool(cluster.ask("metrics")["clusterMetrics"]["activeNodes"] == 1)
            return False

        try:
            wait_until(is_there, 60, "the NodeManager has registered with the ResourceManager", every=0.1)
        except AssertionError as error:
            error.add_note("\n".join((folder / f"{name}.log").read_text()[-4000:] for name in names))
            raise
        yield cluster


@contextmanager
def history_server(folder: Path, spark: Path) -> Iterator[str]:
    """Spark's history server on the event logs of `folder`; yields the URL of its REST API."""
    port = free_port()
    options = {"fs.logDirectory": folder.as_uri(), "ui.port": port, "fs.update.interval": "1s"}
    environment = {
        "SPARK_HOME": str(spark),
        "SPARK_LOCAL_IP": HOST,
        "SPARK_DAEMON_MEMORY": "512m",
        "SPARK_HISTORY_OPTS": " ".join(f"-Dspark.history.{key}={value}" for key, value in options.items()),
    }
    command = [str(spark / "bin/spark-class"), "org.apache.spark.deploy.history.HistoryServer"]
    with daemon(command, environment, folder.with_name("history.log")):
        yield f"http://{HOST}:{port}/api/v1"


def _used(queue: Mapping[str, Any]) -> Used:
    """What a queue has, by what the ResourceManager tells of it."""
    resources = queue["resourcesUsed"]["resourceInformations"]["resourceInformation"]
    amounts = {each["name"]: each["value"] for each in resources}
    return Used(amounts["memory-mb"], amounts["yarn.io/gpu"], queue["numContainers"])


def _site(folder: Path, page: int) -> dict[str, object]:
    """yarn-site.xml beside conf/yarn's."""
    manager, node = "yarn.resourcemanager", "yarn.nodemanager"
    ports = {f"{name}.address": f"{HOST}:{free_port()}" for name in ("scheduler", "resource-tracker", "admin")}
    return {f"{manager}.{name}": address for name, address in ports.items()} | {
        f"{manager}.hostname": HOST,
        f"{manager}.address": f"{HOST}:{free_port()}",
        f"{manager}.webapp.address": f"{HOST}:{page}",
        "yarn.scheduler.minimum-allocation-mb": LEAST_MB,
        f"{node}.hostname": HOST,
        f"{node}.address": f"{HOST}:0",
        f"{node}.localizer.address": f"{HOST}:0",
        f"{node}.webapp.address": f"{HOST}:0",
        f"{node}.resource.memory-mb": MEMORY_MB,
        f"{node}.resource.cpu-vcores": 8,
        f"{node}.resource.memory.enforced": "false",  # by cgroups; so NodeManager does it
        f"{node}.local-dirs": folder / "local",
        f"{node}.log-dirs": folder / "logs",
        f"{node}.admin-env": f"PATH={_pretend_gpu(folder)}:{os.defpath}",  # of containers
        f"{node}.disk-health-checker.enable": "false",  # a disk that is almost full says nothing about the jobs
    }


def _pretend_gpu(folder: Path) -> Path:
    """The folder of an nvidia-smi that sees one GPU: a container's own, where GPUs are isolated."""
    (folder / "bin").mkdir()
    script = folder / "bin/nvidia-smi"
    script.write_text("#!/bin/sh\ncase $1 in -L) echo 'GPU 0: none' ;; *) echo '0, GPU-none' ;; esac\n")
    script.chmod(0o755)
    return script.parent


@contextmanager
def _daemon(cluster: Yarn, name: str) -> "Iterator[subprocess.Popen[bytes]]":
    """One of Hadoop's; containers, which a NodeManager gives sessions of their own, end with it."""
    command = [*_JAVA, *_OPENED, "-cp", f"{cluster.conf}:{JARS}/*", f"org.apache.hadoop.yarn.server.{name}"]
    java = shutil.which("java")
    assert java
    environment = {"JAVA_HOME": str(Path(java).resolve().parents[1])}  # for containers, which inherit it
    with daemon(command, environment, cluster.folder / f"{name}.log") as process:
        try:
            yield process
        finally:
            for container in _children(process.pid):
                with suppress(psutil.NoSuchProcess):
                    container.kill()


def _children(pid: int) -> list[psutil.Process]:
    """All that came from a process, which may have died."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _read(file: Path) -> dict[str, object]:
    """Properties of Hadoop."""
    found = ElementTree.parse(file).getroot().iter("property")
    return {str(each.findtext("name")): str(each.findtext("value")) for each in found}


def _write(file: Path, properties: Mapping[str, object]) -> None:
    root = ElementTree.Element("configuration")
    for name, value in properties.items():
        each = ElementTree.SubElement(root, "property")
        ElementTree.SubElement(each, "name").text = name
        ElementTree.SubElement(each, "value").text = str(value)
    ElementTree.ElementTree(root).write(file)

"""What the tests on YARN share: a cluster."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.environments import make_dist, pack
from tests.yarn.daemons import Yarn, yarn
from tests.yarn.teams import Team, team


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yarn]:
    """YARN with 10 GB, 8 cores and 4 GPUs."""
    with yarn(tmp_path_factory.mktemp("yarn"), gpus=4) as running:
        yield running


@pytest.fixture(scope="session")
def archive(node_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, without slidelake's, as an archive; and dist/ is built."""
    make_dist()
    return pack(node_python.parents[1], tmp_path_factory.mktemp("archive") / "environment.tar.gz")


@pytest.fixture(scope="session")
def team_of(cluster: Yarn, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Team]:
    """Makes a team's laptop from its queue and its settings of Spark."""

    def make(queue: str, conf: dict[str, object]) -> Team:
        return team(tmp_path_factory.mktemp(queue), cluster, archive, queue, SMALL | conf)

    return make


# Two Python workers beside the JVM; a driver, and what it needs beside its heap.
SMALL: dict[str, object] = {
    "spark.driver.memory": "1g",
    "spark.driver.memoryOverhead": "1g",
    "spark.executor.cores": 2,
    "spark.executor.memory": "512m",
    "spark.executor.memoryOverhead": "2560m",
}

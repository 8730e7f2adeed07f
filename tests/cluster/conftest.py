"""What the tests on clusters share: a standalone cluster of two nodes with a GPU each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import standalone
from tests.environments import environment_without_checkout


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a master with two workers of 3 cores and one GPU each."""
    with standalone(tmp_path_factory.mktemp("two_nodes"), cores=3, gpus=(1, 1)) as url:
        yield url


@pytest.fixture(scope="session")
def node_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has all packages but slidelake."""
    return environment_without_checkout(tmp_path_factory.mktemp("node") / "environment")

"""What the tests on clusters share: a standalone cluster of two nodes with a GPU each."""

from collections.abc import Iterator

import pytest

from tests.cluster.clusters import standalone


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a master with two workers of 3 cores and one GPU each."""
    with standalone(tmp_path_factory.mktemp("two_nodes"), cores=3, gpus=(1, 1)) as url:
        yield url

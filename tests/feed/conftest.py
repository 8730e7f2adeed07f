"""Tables that the tests of the feed read."""

from pathlib import Path

import pytest

from tests.feed.tables import Made, cohort, write


@pytest.fixture(scope="session")
def patients() -> list[Made]:
    """50, in two splits."""
    return cohort(50)


@pytest.fixture(scope="session")
def table(patients: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 3 files and 14 row groups; read it, do not write to it."""
    return write(tmp_path_factory.mktemp("feed") / "patients", patients, files=3)


@pytest.fixture(params=["petastorm", "pyarrow"])
def backend(request: pytest.FixtureRequest) -> str:
    """What reads the rows."""
    return str(request.param)

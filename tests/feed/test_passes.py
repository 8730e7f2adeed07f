"""Every patient once a pass, counted from outside the feed; `python -m benchmarks.feed_passes` is the same at length."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.feed_passes import count_passes
from tests.feed.tables import Made, cohort, write


@pytest.fixture(scope="module")
def patients() -> list[Made]:
    return cohort(48)


@pytest.fixture(scope="module")
def table(patients: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 row groups in 3 files."""
    return write(tmp_path_factory.mktemp("passes") / "patients", patients, files=3)


@pytest.mark.parametrize("threads", [1, 2, 10])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_nobody_is_short_or_doubled(table: Path, patients: list[Made], backend: Any, threads: int, shards: int) -> None:
    count = count_passes(table, patients, backend, threads, shards, passes=8)
    assert vars(count) == {"passes": 8, "rows": 8 * 48, "short": 0, "doubled": 0, "wrong": 0, "same_order": 0}

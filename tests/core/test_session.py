"""Where a job runs: as it is told, and with the retries of a cluster where that is one machine."""

import pytest

from jobs.runtime.session import with_retries


@pytest.mark.parametrize(
    ("told", "master"),
    [
        ("local", "local[1,4]"),
        ("local[2]", "local[2,4]"),
        ("local[*]", "local[*,4]"),
        ("local[2,1]", "local[2,1]"),
        ("local-cluster[2,1,1024]", "local-cluster[2,1,1024]"),
        ("spark://host:7077", "spark://host:7077"),
        ("yarn", "yarn"),
    ],
)
def test_a_bare_local_master_is_given_retries_and_no_other_is_touched(told: str, master: str) -> None:
    assert with_retries(told) == master

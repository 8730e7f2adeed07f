"""The feed where pyarrow is as new as it gets, which petastorm cannot be used with, held against petastorm's."""

import json
from pathlib import Path

import pytest

from jobs.training.feed.delivery import PETASTORM_FAILS_AT
from tests.feed.fed import fed
from tests.newest import run_with_newest_pyarrow


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_newest_pyarrow_feeds_what_petastorm_feeds(table: Path) -> None:
    done = run_with_newest_pyarrow("tests.feed.fed", str(table))
    assert (done.stderr, done.returncode) == ("", 0)
    there = json.loads(done.stdout)
    assert int(there["pyarrow"].partition(".")[0]) >= PETASTORM_FAILS_AT
    assert there["imported"].startswith(("ImportError", "ModuleNotFoundError", "AttributeError"))  # it really cannot
    assert there["refused"] == (
        f"petastorm needs pyarrow < {PETASTORM_FAILS_AT}, this is {there['pyarrow']}: install an older one, or take "
        "backend pyarrow"
    )
    assert there["auto"] == "pyarrow"
    here = fed(str(table), "petastorm")
    assert len(here) == 2 * 2 * 2 * 7
    assert here[:7] != here[7:14]
    assert there["fed"] == {"auto": here, "pyarrow": here}

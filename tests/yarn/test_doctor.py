"""The doctor on YARN: all is well there, and what it says of memory is what the ResourceManager gave."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.doctor import CHECKS
from jobs.runtime.settings.config import Config
from tests.yarn.daemons import LEAST_MB, Yarn
from tests.yarn.teams import Team

pytestmark = pytest.mark.yarn

_HEAP_MB, _OVERHEAD_MB = 600, 3800


def test_all_is_well_and_memory_is_that_of_the_container(
    cluster: Yarn, team_of: Callable[..., Team], small_config: Callable[..., Config]
) -> None:
    config = small_config(
        inference={"device": "auto"}, resources={"gpus_per_task": 0.5}, tiling={"max_background": 0.5}
    )
    conf = {"spark.executor.instances": 1, "spark.executor.memory": f"{_HEAP_MB}m"}
    team = team_of("team_b", conf | {"spark.executor.memoryOverhead": f"{_OVERHEAD_MB}m"})
    with cluster.watching("team_b") as seen:
        status, said = team.run("doctor", config, "--deadline", "1")
    app = cluster.apps()[-1]["id"]
    table = cluster.log(app)
    print(table)
    assert status == 0, said + cluster.log(app, "stderr")
    rows = {line.split()[1]: line for line in table.splitlines() if line[:6].strip() in ("ok", "warn", "FAIL", "skip")}
    assert {what: line.split()[0] for what, line in rows.items()} == dict.fromkeys(rows, "ok")
    assert (
        len(rows) == len(CHECKS)
        and "slidelake doctor, yarn" in table
        and f"none of {len(CHECKS)} checks failed" in table
    )
    assert (
        "an executor has 1 by Spark, 1 visible" in rows["gpus"] and "2 tasks of features at once" in rows["executors"]
    )
    assert not Path(config.output.root).exists()
    # YARN rounds up what Spark asks for, and the doctor counts on no more than was requested
    asked = (_HEAP_MB + _OVERHEAD_MB) << 20
    assert re.findall(r"([\d.]+) GB an executor, ([\d.]+) GB of it heap", rows["memory"]) == [
        (f"{asked / 1e9:.1f}", f"{(_HEAP_MB << 20) / 1e9:.1f}")
    ]
    driver, both = sorted({used.mb for [used] in seen if used.containers in (1, 2)})
    assert both - driver == -(-(_HEAP_MB + _OVERHEAD_MB) // LEAST_MB) * LEAST_MB

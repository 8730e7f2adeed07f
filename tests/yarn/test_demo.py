"""The demo's cohort on this machine, on a standalone cluster and on YARN: the same tables, to the last bit."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config, load_config
from tests.cluster.clusters import standalone, submit
from tests.conftest import preprocess_in
from tests.environments import CODE, ROOT
from tests.faults.frames import assert_same_rows, frames
from tests.slides.demo import COHORT, WEIGHTS_NAME, build_demo
from tests.yarn.teams import Team
from udfs.wsi.stain.stain_network import StainNet

pytestmark = pytest.mark.yarn


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, with a StainNet of any weights."""
    folder = build_demo(tmp_path_factory.mktemp("demo"))
    torch.manual_seed(0)
    torch.save(StainNet().state_dict(), folder / "stainnet.pth")
    return folder


def settings(demo: Path, place: str) -> Config:
    """Those of the demo, tables in a folder for a place; runtime and batches fixed, which would be measured anew in each."""
    files = {
        "patients": demo / "patients.csv",
        "slides.root": demo / "slides",
        "output.root": demo / place,
        "stain.weights": demo / "stainnet.pth",
        "encoders.tf_efficientnet_lite0.weights": demo / "weights" / WEIGHTS_NAME,
    }
    fixed = {"inference.runtime": "openvino", "inference.batch_size": 4}
    return load_config(str(ROOT / "conf/demo.yaml"), [f"{key}={value}" for key, value in (files | fixed).items()])


def test_the_demo_has_the_same_tables_here_on_a_standalone_cluster_and_on_yarn(
    demo: Path, spark: SparkSession, team_of: Callable[..., Team], archive: Path, tmp_path: Path
) -> None:
    local, alone, yarn = (settings(demo, place) for place in ("local", "standalone", "yarn"))
    preprocess_in(spark, local)

    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(alone.model_dump(mode="json")))
    conf: dict[str, object] = {
        "spark.submit.pyFiles": CODE,
        "spark.archives": f"{archive}#environment",
        "spark.pyspark.python": "./environment/bin/python",
        "spark.pyspark.driver.python": sys.executable,
    }
    with standalone(tmp_path, cores=1, gpus=(0, 0)) as master:
        said = submit(tmp_path, master, conf, "jobs/preprocess.py", "--config", str(file))
    assert said.returncode == 0, said.stderr

    team = team_of("team_a", {"spark.executor.instances": 2, "spark.executor.cores": 1})
    status, told = team.run("preprocess", yarn)
    assert status == 0, told

    expected = frames(Path(local.output.root))
    assert expected["slides"].height == len(COHORT)
    print(f"\n{ {name: table.height for name, table in expected.items()} } rows")
    for other in (alone, yarn):
        for name, found in frames(Path(other.output.root)).items():
            assert_same_rows(found, expected[name])

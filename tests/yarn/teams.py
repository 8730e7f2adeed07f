"""Teams who send jobs to YARN from a laptop with a checkout, by `slidelake submit`, to nodes with neither code nor packages."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyspark

from tests.laptop import Laptop, checkout_of
from tests.stores.process import HOST
from tests.yarn.daemons import Yarn

_SPARK = Path(pyspark.__file__).parent


@dataclass(frozen=True)
class Team(Laptop):
    """A team's laptop."""

    cluster: Yarn
    spark: Path  # SPARK_HOME


def team(folder: Path, cluster: Yarn, environment: Path, queue: str, conf: Mapping[str, object]) -> Team:
    """One with this queue and archive of packages, and these settings of Spark beside those of conf/spark/yarn.conf."""
    spark = _spark_without_delta(folder / "spark")
    own = {
        "spark.yarn.stagingDir": (cluster.folder / "staging").as_uri(),
        "spark.yarn.jars": f"local:{spark}/jars/*",  # on every node already
        "spark.yarn.appMasterEnv.SPARK_LOCAL_IP": HOST,
        "spark.executorEnv.SPARK_LOCAL_IP": HOST,
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.compress": "false",
        "spark.sql.shuffle.partitions": 2,
        **conf,
    }
    yours = {"queue": queue, "event_logs": event_logs(cluster).as_uri()}
    checkout = checkout_of(folder / "checkout", "yarn", yours, "yarn.conf", own)
    (checkout / "dist/environment.tar.gz").symlink_to(environment)
    settings = checkout / "conf/spark/yarn.conf"  # which has GPUs for those who take the # away
    settings.write_text(settings.read_text().replace("#spark.executor.resource.gpu", "spark.executor.resource.gpu"))
    variables = {"HADOOP_CONF_DIR": str(cluster.conf), "SPARK_HOME": str(spark)}
    return Team("yarn", checkout, variables, cluster, spark)


def event_logs(cluster: Yarn) -> Path:
    """The folder for those of all applications."""
    folder = cluster.folder / "events"
    folder.mkdir(exist_ok=True)
    return folder


def _spark_without_delta(home: Path) -> Path:
    """Spark as others have it: here, Delta's jars are among its own."""
    (home / "jars").mkdir(parents=True)
    for part in ("bin", "conf", "python"):
        (home / part).symlink_to(_SPARK / part)
    for jar in (_SPARK / "jars").iterdir():
        if not jar.name.startswith("delta-"):
            (home / "jars" / jar.name).symlink_to(jar)
    return home

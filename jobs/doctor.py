"""Says what works here and what does not: driver, executors, store, models, memory and GPUs, and what to do.

Start the doctor with the spark-submit settings and the configuration of the run to come. It changes nothing, and ends within
minutes whatever hangs. It prints one row per check, and a remedy below each check that failed. Last it samples the run's own
work, and estimates how long the cohort takes.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jobs.checks import clock, data, machine, software
from jobs.checks.encoder_runtimes import encoder_runtimes
from jobs.checks.output import output
from jobs.checks.place import Place
from jobs.checks.table import Check, as_text, look
from jobs.runtime.cohort.locating import read_cohort, secrets_in
from jobs.runtime.run.cli import DONE, FAILED, main_alone, report_unlabelled
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.session import open_session
from udfs.wsi.store import redact

_QUICK_S = 60.0
_LONG_S = 180.0  # of checks that may load models from a cold disk, or wait for a store that is silent
CHECKS = (
    Check("executors", software.executors, _LONG_S),
    Check("java", software.java, _QUICK_S, ("executors",)),
    Check("spark", software.spark, _QUICK_S, ("executors",)),
    Check("delta", software.delta, _QUICK_S, ("executors",)),
    Check("python", software.python, _QUICK_S, ("executors",)),
    Check("packages", software.packages, _QUICK_S, ("executors",)),
    Check("code", software.code, _QUICK_S, ("executors", "python")),
    Check("scratch", machine.scratch_space, _QUICK_S, ("executors",)),
    Check("memory", machine.memory, _QUICK_S, ("executors",)),
    Check("gpus", machine.scheduled_gpus, _QUICK_S, ("executors",)),
    Check("store", data.store, _LONG_S, ("executors",)),
    Check("output", output, _LONG_S, ("executors", "code")),
    Check("encoder", data.encoder, _LONG_S, ("executors", "packages", "memory")),
    Check("runtimes", encoder_runtimes, _LONG_S, ("python", "store", "encoder"), is_advice=True),
    Check("clock", clock.clock, _LONG_S + 2 * clock.SAMPLE_S, ("python", "store", "encoder")),
)


def examine(config: Config, arguments: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    images = read_cohort(config).images  # a bad CSV ends here: Spark takes long to start
    report_unlabelled("doctor", images)
    secrets = secrets_in(config, images)
    spark = open_session("slidelake doctor")
    try:
        place = Place(spark, config, images, arguments.deadline)
        print(f"\nslidelake doctor, {spark.sparkContext.master}")
        failed = 0
        for row in look(place, CHECKS):
            print(redact(as_text(row), secrets), flush=True)
            failed += row.status == "FAIL"
        print(f"\n{failed or 'none'} of {len(CHECKS)} checks failed")
    finally:
        spark.stop()
    if place.left:  # Python would wait for their threads, for hours if a store is silent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)
    return FAILED if failed else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return main_alone("doctor", examine, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The command `slidelake JOB ...`: hands over to jobs/JOB.py, as spark-submit does."""

import logging
import sys
from importlib import import_module
from importlib.metadata import version

from jobs.runtime.settings.arguments import BAD_CONFIG, JOBS, parse_arguments
from jobs.runtime.settings.withheld import described
from jobs.runtime.spark.streams import log_to_stderr

_log = logging.getLogger("slidelake.command")


def main() -> int:
    """Runs the job; returns the exit status."""
    job, *rest = sys.argv[1:] or ["--help"]
    log_to_stderr()
    if job in JOBS:
        parse_arguments(job, rest)  # --help and bad arguments end here: the job's own imports take seconds
        try:
            run = import_module(f"jobs.{job}").main
        except ModuleNotFoundError as error:
            if error.name != "pyspark":
                raise
            remedy = "pip install 'slidelake[spark]', or use the Python of a platform that has Spark"
            _log.error("slidelake %s: PySpark is missing: %s", job, remedy)
            return BAD_CONFIG
        return int(run(rest))
    if job in ("submit", "encoders"):
        return int(import_module(f"jobs.{job}").main(rest))
    if job in ("-h", "--help", "help"):
        lines = [f"  {name:<12} {text}" for name, text in JOBS.items()]
        print("usage: slidelake JOB --config FILE [key=value ...]\n\njobs:", *lines, sep="\n")
        print("\n`slidelake JOB --help` explains a job and every setting.")
        print(
            "`slidelake encoders [NAME]` prints the encoders that are known by name, or one of them and whether it runs here."
        )
        print("`slidelake submit --on PLACE JOB --config FILE ...` runs it elsewhere: `slidelake submit --help`.")
        return 0
    if job == "--version":
        print(f"slidelake {version('slidelake')}")
        return 0
    _log.error("slidelake: no job %s; there are %s", described(job), ", ".join(JOBS))
    return BAD_CONFIG


def task() -> None:
    """Runs the job and raises SystemExit if the exit status is not 0, for platforms that drop what an entry point returns."""
    if status := main():
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())

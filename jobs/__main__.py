"""The command `slidelake JOB ...`: hands over to jobs/JOB.py, as spark-submit does."""

import sys
from importlib import import_module
from importlib.metadata import version

from jobs.runtime.settings.arguments import BAD_CONFIG
from jobs.runtime.settings.withheld import described

JOBS = {
    "preprocess": "slides to patients, in one Spark application",
    "slides": "tables slides and tiles: headers, tissue, tile coordinates",
    "features": "table features: embeddings and colours of the tiles",
    "patients": "table patients: a row a patient, with its bags",
    "splits": "table splits, column patients.split and CSVs: who is in train, validation and test",
    "train": "a model on table patients, and how good it is on those held out",
    "predict": "table predictions and a CSV: probabilities of new patients by a trained model, from their slides on",
    "patches": "read patches of pixels ahead of a trainer",
    "stainnet": "fit a StainNet checkpoint to your slides",
    "compact": "join the small files that many waves and runs leave",
    "doctor": "what works here and what does not, and how long the cohort would take",
}


def main() -> int:
    """Dispatch; returns the exit status."""
    job, *rest = sys.argv[1:] or ["--help"]
    if job in JOBS:
        try:
            run = import_module(f"jobs.{job}").main
        except ModuleNotFoundError as error:
            if error.name != "pyspark":
                raise
            remedy = "pip install 'slidelake[spark]', or use the Python of a platform that has Spark"
            print(f"slidelake {job}: PySpark is missing: {remedy}", file=sys.stderr)
            return BAD_CONFIG
        status: int = run(rest)
        return status
    if job == "submit":
        submitted: int = import_module("jobs.submit").main(rest, JOBS)
        return submitted
    if job in ("-h", "--help", "help"):
        lines = [f"  {name:<12} {text}" for name, text in JOBS.items()]
        print("usage: slidelake JOB --config FILE [key=value ...]\n\njobs:", *lines, sep="\n")
        print("\n`slidelake JOB --help` explains a job and every setting.")
        print("`slidelake submit --on PLACE JOB --config FILE ...` runs it elsewhere: `slidelake submit --help`.")
        return 0
    if job == "--version":
        print(f"slidelake {version('slidelake')}")
        return 0
    print(f"slidelake: no job {described(job)}; there are {', '.join(JOBS)}", file=sys.stderr)
    return BAD_CONFIG


def task() -> None:
    """The same for platforms that drop what an entry point returns.

    Raises:
        SystemExit: the exit status is not 0.
    """
    status = main()
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())

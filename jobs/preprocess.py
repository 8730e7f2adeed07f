"""The main job: slides, features and patients in one Spark application, wave by wave; stop it and start it as you like."""

import sys
from collections.abc import Sequence

import pandas as pd

from jobs import features, patients, slides
from jobs.runtime.run.cli import run_job
from jobs.runtime.run.run import Job


def stale(survey: pd.DataFrame) -> "pd.Series[bool]":
    """The images that any stage has work on."""
    return slides.stale(survey) | survey["features_stale"] | patients.stale(survey)


JOB = Job(
    "preprocess",
    reads=("splits",),
    writes=("slides", "tiles", "indexes", "features", "patients"),
    stages=(slides.find, features.encode, patients.assemble),
    stale=stale,
    models="loaded",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())

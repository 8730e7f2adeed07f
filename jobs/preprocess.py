"""The main job: slides, features and patients in one Spark application, wave by wave; it may be stopped at any time."""

import sys
from collections.abc import Sequence

from jobs import features, patients, slides
from jobs.runtime.run.cli import run_job
from jobs.runtime.run.run import Job

JOB = Job(
    "preprocess",
    reads=("splits",),
    writes=("slides", "tiles", "indexes", "features", "patients"),
    stages=(*slides.JOB.stages, *features.JOB.stages, *patients.JOB.stages),
    stale=("slide_stale", "metadata_stale", "features_stale", "patient_stale"),
    models="loaded",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())

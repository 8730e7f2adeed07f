"""Submitted to a cluster: reads patches of the slides of `tests.feed.patch_slides` ahead of a trainer.

spark-submit windows.py SLIDES WINDOWS EPOCHS
"""

import sys
from pathlib import Path

from jobs.patches import read_ahead
from jobs.runtime.settings.job_sections import PatchesSettings
from jobs.runtime.spark.session import start_session
from tests.feed.patch_slides import spec_of

if __name__ == "__main__":
    spark = start_session("windows")
    settings = PatchesSettings(
        folder=sys.argv[2], epochs=int(sys.argv[3]), window_patches=25, unit_patches=5, most_unread=4, patience_s=60
    )
    read_ahead(spark, spec_of(Path(sys.argv[1])), settings)
    spark.stop()

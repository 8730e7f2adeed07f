"""What a run says at its end, for a person to read."""

import pandas as pd
from pyspark.sql import functions as F

from jobs.runtime.run import Run

_NAMED = 10


def failed_slides(run: Run, survey: pd.DataFrame) -> list[str]:
    """A line for each image of the cohort that failed, from table slides."""
    return [
        f"failed: {row.image_id}: {row.error_code}: {row.error_message}"
        for row in _slides(run, survey).itertuples()
        if row.status == "failed"
    ]


def summarise(run: Run, survey: pd.DataFrame) -> str:
    """The state of the cohort's tables and what this run did, some lines of text."""
    slides = _slides(run, survey)
    status = slides["status"].value_counts()
    failed = slides.loc[slides["status"] == "failed", "error_code"].value_counts()
    reasons = ", ".join(f"{count} {code}" for code, count in failed.items())
    patients = {row.patient_id for row in run.tables.read("patients").select("patient_id").collect()}
    cohort = sorted(set(survey.loc[~survey["gone"].astype(bool), "patient_id"]))
    without = [patient for patient in cohort if patient not in patients]
    counts, timings = run.counts, run.timings
    encoding = timings.get("features", 0.0)
    encoded = counts["tiles_encoded"]
    rate = f", {encoded / encoding:.1f} tiles/s" if encoded and encoding else ""
    counts.update(slides_ok=int(status.get("ok", 0)), slides_no_tissue=int(status.get("no_tissue", 0)))
    counts.update(slides_failed=int(status.get("failed", 0)), patients=len(cohort) - len(without))
    lines = [
        "",
        f"slidelake {run.job}, run {run.run_id}",
        f"  slides    {counts['slides_ok']} ok, {counts['slides_no_tissue']} without tissue, "
        f"{counts['slides_failed']} failed{f' ({reasons})' if reasons else ''}",
        f"  tiles     {int(slides['n_tiles'].sum()):,} with tissue, {encoded:,} encoded in this run{rate}",
        f"  patients  {len(cohort) - len(without)} of {len(cohort)} have a row, {counts['patients_built']} built in this run",
    ]
    if without:
        more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        lines.append(f"            without a row (no tiles): {', '.join(without[:_NAMED])}{more}")
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in timings.items())
    lines += [f"  seconds   {stages}", f"  tables    {run.config.output.root}/", *_next_steps(run, bool(reasons))]
    return "\n".join(lines)


def _next_steps(run: Run, failures: bool) -> list[str]:
    root = run.config.output.root
    steps = [f'  read      polars.read_delta("{root}/patients"), or notebooks/tables.ipynb for a tour']
    if failures:
        steps.append(
            "  failures  SELECT image_id, error_code, error_message in table slides; mend, then run again with --retry-failed"
        )
    return steps


def _slides(run: Run, survey: pd.DataFrame) -> pd.DataFrame:
    columns = ["image_id", "patient_id", "status", "n_tiles", "error_code", "error_message"]
    slides = run.tables.read("slides").select(columns).where(F.col("image_id").isNotNull()).toPandas()
    return slides[slides["image_id"].isin(survey.index[~survey["gone"].astype(bool)])].sort_values("image_id")

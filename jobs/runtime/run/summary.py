"""What a run says at its end, for a person to read."""

import json

import pandas as pd

from jobs.runtime.run.run import Run
from jobs.runtime.run.work import Work
from udfs.find_tissue import WITHOUT_TILES
from udfs.wording import some
from udfs.wsi.store import public_uri

_STATUSES = ("ok", *WITHOUT_TILES, "failed")
_MOST_WARNINGS = 10  # lines that a run prints of them


def failed_slides(run: Run, survey: pd.DataFrame) -> list[str]:
    """A line for each image of the cohort that failed, from table slides."""
    slides = _slides(run, survey)
    failed = slides[slides["status"] == "failed"]
    return [f"failed: {row.image_id}: {row.error_code}: {row.error_message}" for row in failed.itertuples()]


def slide_warnings(run: Run, survey: pd.DataFrame) -> list[str]:
    """A line for each image of the cohort that was read with a warning, from table slides; ten lines and a count at most."""
    slides = _slides(run, survey)
    warned = slides[slides["warnings"].notna()]
    lines = [
        f"warning: {name}: {'; '.join(said)}" for name, said in zip(warned["image_id"], warned["warnings"], strict=True)
    ]
    more = len(lines) - _MOST_WARNINGS
    return lines[:_MOST_WARNINGS] + (
        [f"... and {more:,} more, see column warnings of table slides"] if more > 0 else []
    )


def summarise(run: Run, survey: pd.DataFrame) -> str:
    """The state of the cohort's tables and what this run did, some lines of text; counts go to table runs too."""
    slides = _slides(run, survey)
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.timings.items())
    lines = ["", f"slidelake {run.job}, run {run.run_id}", *_slides_lines(run, slides), _tiles_line(run, slides)]
    lines += _read_lines(run)
    if run.job in ("patients", "preprocess", "predict"):
        lines += _patients_lines(run, survey)
    lines += [f"  seconds   {stages}", f"  tables    {public_uri(run.config.output.root)}/", *_next_steps(run)]
    return "\n".join(lines)


def _slides_lines(run: Run, slides: pd.DataFrame) -> list[str]:
    """How many slides have which status, and a line each that names those without tissue and those that are too small."""
    named = {status: slides.loc[slides["status"] == status, "image_id"].to_list() for status in _STATUSES}
    counts = run.counts
    counts.update({f"slides_{status}": len(names) for status, names in named.items()})
    reasons = slides.loc[slides["status"] == "failed", "error_code"].value_counts()
    text = ", ".join(f"{count} {code}" for code, count in reasons.items())
    counts.update(slides_with_warnings=int(slides["warnings"].notna().sum()))
    too_small = f"{counts['slides_too_small']} too small, " if named["too_small"] else ""
    lines = [
        f"  slides    {counts['slides_ok']} ok, {counts['slides_no_tissue']} without tissue, {too_small}"
        f"{counts['slides_failed']} failed{f' ({text})' if text else ''}"
    ]
    if names := named["no_tissue"]:
        lines.append(f"  no tissue {some(names, 10)}: no tile has enough of it, see tissue_fraction in table slides")
    if names := named["too_small"]:
        lines.append(f"  too small {some(names, 10)}: no tile fits on the slide, see error_message in table slides")
    return lines


def _tiles_line(run: Run, slides: pd.DataFrame) -> str:
    line = f"  tiles     {int(slides['n_tiles'].sum()):,} with tissue"
    if run.job not in ("features", "preprocess", "predict"):
        return line
    encoded, seconds = run.counts["tiles_encoded"], run.timings.get("features", 0.0)
    encoder = run.config.encoder
    how = f" by {encoder.runtime} {encoder.precision}" if encoded else ""
    rate = f", {encoded / seconds:.1f} tiles/s" if encoded and seconds else ""
    return f"{line}, {encoded:,} encoded in this run{how}{rate}"


def _read_lines(run: Run) -> list[str]:
    """What was read of the files of the slides that were read, and what workers did with it; nothing where none was."""
    if not run.reads:
        return []
    total = sum({image_id: size for (image_id, _), (size, _) in run.reads.items()}.values())
    work = sum(run.work().values(), Work())
    encoding = f", {work.encoded_s:.1f} encoding" if work.encoded_s else ""
    return [
        f"  read      {readable_size(work.bytes)} of {readable_size(total)}, the size of the slides read, in {work.requests:,} "
        f"requests; workers spent {work.waited_s:.1f} s waiting, {work.decoded_s:.1f} decoding{encoding}"
    ]


def readable_size(n_bytes: int) -> str:
    """The size for people, in powers of ten as stores bill them."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _patients_lines(run: Run, survey: pd.DataFrame) -> list[str]:
    have = {row.patient_id for row in run.tables.read("patients").select("patient_id").collect()}
    cohort = sorted(set(survey.loc[~survey["gone"].astype(bool), "patient_id"]))
    without = [patient for patient in cohort if patient not in have]
    built = run.counts["patients_built"]
    run.counts["patients"] = len(cohort) - len(without)
    lines = [f"  patients  {run.counts['patients']} of {len(cohort)} have a row, {built} built in this run"]
    if without:
        why = "no encoded tile, or more than a row can hold"
        lines.append(f"            without a row, for they have {why}: {some(without, 10)}")
    return lines


def _next_steps(run: Run) -> list[str]:
    root = public_uri(run.config.output.root)
    after = {"slides": "the features job encodes the tiles", "features": "the patients job makes a row a patient"}
    table = "predictions" if run.job == "predict" else "patients"
    place = json.dumps(f"{root}/{table}", ensure_ascii=False)  # as Python writes it
    # Without pyarrow, polars looks for a b/ in a%20b/.
    done = f"polars.read_delta({place}, use_pyarrow=True), or notebooks/tables.ipynb for a tour"
    steps = [f"  next      {after.get(run.job, done)}"]
    if run.counts["slides_failed"]:
        steps.append(
            "  failed    see error_message in table slides; mend file or cause, then run again with --retry-failed"
        )
    return steps


def _slides(run: Run, survey: pd.DataFrame) -> pd.DataFrame:
    columns = ["image_id", "patient_id", "status", "n_tiles", "error_code", "error_message", "warnings"]
    slides = run.tables.read("slides").select(columns).toPandas()
    return slides[slides["image_id"].isin(survey.index[~survey["gone"].astype(bool)])].sort_values("image_id")

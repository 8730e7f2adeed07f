"""What a run prints at its end, for a person to read."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from jobs.runtime.run.record import Record, Work
from jobs.runtime.run.run import Job, runtime_text
from jobs.runtime.settings.config import Config
from jobs.runtime.tables.tables import Tables
from udfs.find_tissue import WITHOUT_TILES
from udfs.wording import some
from udfs.wsi.store import public_uri

_STATUSES = ("ok", *WITHOUT_TILES, "failed")
_MOST_WARNINGS = 10  # lines that a run prints of them


@dataclass(frozen=True)
class CohortState:
    """What the tables hold of the cohort."""

    slides: pd.DataFrame  # by image_id: image_id, status, n_tiles, error_code, error_message, warnings
    patients: Sequence[str]
    without_row: (
        Sequence[str] | None
    )  # patients that lack the row of an encoder; None in jobs that do not write table patients

    def named(self, status: str) -> list[str]:
        """Return the slides of a status."""
        return self.slides.loc[self.slides["status"] == status, "image_id"].to_list()

    def counts(self) -> dict[str, int]:
        """Return the counts for table runs."""
        counts = {f"slides_{status}": len(self.named(status)) for status in _STATUSES}
        counts["slides_with_warnings"] = int(self.slides["warnings"].notna().sum())
        if self.without_row is not None:
            counts["patients"] = len(self.patients) - len(self.without_row)
        return counts


def read_state(tables: Tables, job: Job, survey: pd.DataFrame, encoders: Iterable[str]) -> CohortState:
    """Return the state of the cohort that was surveyed, as the tables have it now, with the rows of these encoders."""
    cohort = survey[~survey["removed"]]
    columns = ["image_id", "status", "n_tiles", "error_code", "error_message", "warnings"]
    slides = tables.read("slides").select(columns).toPandas()
    slides = slides[slides["image_id"].isin(cohort.index)].sort_values("image_id")
    patients = sorted(set(cohort["patient_id"]))
    if "patients" not in job.writes:
        return CohortState(slides, patients, None)
    rows = {(row.patient_id, row.encoder) for row in tables.read("patients").select("patient_id", "encoder").collect()}
    lacking = {patient for patient in patients for encoder in encoders if (patient, encoder) not in rows}
    return CohortState(slides, patients, sorted(lacking))


def failed_slides(slides: pd.DataFrame) -> list[str]:
    """Return a line for each row of table slides that failed."""
    failed = slides[slides["status"] == "failed"]
    return [f"failed: {row.image_id}: {row.error_code}: {row.error_message}" for row in failed.itertuples()]


def slide_warnings(slides: pd.DataFrame) -> list[str]:
    """Return a line for each row of table slides with a warning; ten lines and a count at most."""
    warned = slides.loc[slides["warnings"].notna(), ["image_id", "warnings"]]
    lines = [f"warning: {name}: {'; '.join(texts)}" for name, texts in warned.to_numpy()]
    more = len(lines) - _MOST_WARNINGS
    return lines[:_MOST_WARNINGS] + [f"... and {more:,} more, see column warnings of table slides"] * (more > 0)


def summarise(job: Job, record: Record, config: Config, state: CohortState) -> str:
    """Return the state of the cohort's tables and what this run did, as some lines of text."""
    root = public_uri(config.output.root)
    lines = ["", f"slidelake {job.name}, run {record.run_id}", *_slides_lines(state)]
    lines += [_tiles_line(job, record, config, state), *_read_lines(record)]
    if state.without_row is not None:
        with_row = len(state.patients) - len(state.without_row)
        built = record.counts["patients_built"]
        lines.append(f"  patients  {with_row} of {len(state.patients)} have a row, {built} built in this run")
    if state.without_row:
        why = "no encoded tile, more than a row can hold, or a slide without vectors of an encoder"
        lines.append(f"            without a row ({why}): {some(state.without_row, 10)}")
    return "\n".join([*lines, *end_lines(record, root), *_next_steps(job, state, root)])


def end_lines(record: Record, root: str) -> list[str]:
    """Return how long the stages took, and where the tables are."""
    seconds = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record.timings.items())
    return [f"  seconds   {seconds}", f"  tables    {root}/"]


def readable_size(n_bytes: int) -> str:
    """Return a size for people, in powers of ten as stores bill them."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _slides_lines(state: CohortState) -> list[str]:
    ok, no_tissue, too_small, failed = (state.named(status) for status in ("ok", "no_tissue", "too_small", "failed"))
    reasons = state.slides.loc[state.slides["status"] == "failed", "error_code"].value_counts()
    counts = [f"{len(ok)} ok", f"{len(no_tissue)} without tissue"]
    counts += [f"{len(too_small)} too small"] if too_small else []
    why = f" ({', '.join(f'{count} {code}' for code, count in reasons.items())})" if failed else ""
    lines = [f"  slides    {', '.join(counts)}, {len(failed)} failed{why}"]
    if no_tissue:
        lines.append(
            f"  no tissue {some(no_tissue, 10)}: no tile has enough of it, see tissue_fraction in table slides"
        )
    if too_small:
        lines.append(f"  too small {some(too_small, 10)}: no tile fits on the slide, see error_message in table slides")
    return lines


def _tiles_line(job: Job, record: Record, config: Config, state: CohortState) -> str:
    line = f"  tiles     {int(state.slides['n_tiles'].sum()):,} with tissue"
    if "features" not in job.writes:
        return line
    encoded, seconds = record.counts["tiles_encoded"], record.timings.get("features", 0.0)
    names = f"{some(list(config.encoders))}, " if len(config.encoders) > 1 else ""
    how = f" by {names}{runtime_text(config)}" if encoded else ""
    rate = f", {encoded / seconds:.1f} tiles/s" if encoded and seconds else ""
    return f"{line}, {encoded:,} encoded in this run{how}{rate}"


def _read_lines(record: Record) -> list[str]:
    if not record.reads:
        return []
    total = sum({image_id: size for (image_id, _), (size, _) in record.reads.items()}.values())
    work = sum(record.work().values(), Work())
    encoding = f", {work.encoded_s:.1f} encoding" if work.encoded_s else ""
    return [
        f"  read      {readable_size(work.bytes)} of {readable_size(total)}, the size of the slides read, in {work.requests:,} "
        f"requests; workers spent {work.waited_s:.1f} s waiting, {work.decoded_s:.1f} decoding{encoding}"
    ]


def _next_steps(job: Job, state: CohortState, root: str) -> list[str]:
    place = json.dumps(f"{root}/{job.result}", ensure_ascii=False)  # as Python writes it
    # Without pyarrow, polars looks for a b/ in a%20b/.
    done = f"polars.read_delta({place}, use_pyarrow=True), or notebooks/tables.ipynb for a tour"
    steps = [f"  next      {job.next_step or done}"]
    if state.named("failed"):
        steps.append(
            "  failed    see error_message in table slides; mend file or cause, then run again with --retry-failed"
        )
    return steps

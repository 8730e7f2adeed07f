"""What a run says at its end, held to rows of table slides."""

import pandas as pd
from pyspark.sql import Row

from jobs.runtime.run.record import Record, Work
from jobs.runtime.run.run import Job
from jobs.runtime.run.summary import CohortState, failed_slides, slide_warnings, summarise
from jobs.runtime.settings.config import Config
from udfs.schemas import RUNS, WORK

COLUMNS = ["image_id", "status", "n_tiles", "error_code", "error_message", "warnings"]
STATE = CohortState(
    pd.DataFrame(
        [
            ("a", "ok", 7, None, None, ["look"]),
            ("b", "failed", 0, "file_missing", "no such file", None),
            ("c", "no_tissue", 0, None, None, None),
        ],
        columns=COLUMNS,
    ),
    patients=["001", "002"],
    without_row=["002"],
)


def warnings_of(*warnings: list[str] | None) -> list[str]:
    names = [f"s{number:02}" for number in range(len(warnings))]
    return slide_warnings(pd.DataFrame({"image_id": names, "warnings": warnings}))


def test_a_slide_with_warnings_has_one_line() -> None:
    assert warnings_of(None, ["first", "second"], None) == ["warning: s01: first; second"]
    assert warnings_of(None, None) == []


def test_after_ten_lines_the_rest_is_counted() -> None:
    assert warnings_of(*[["look"]] * 10) == [f"warning: s{number:02}: look" for number in range(10)]
    lines = warnings_of(*[["look"]] * 12)
    assert len(lines) == 11 and lines[-1] == "... and 2 more, see column warnings of table slides"


def test_the_state_of_the_cohort_is_counted_and_no_summary_is_needed_for_it() -> None:
    assert STATE.counts() == {
        **{"slides_ok": 1, "slides_no_tissue": 1, "slides_too_small": 0, "slides_failed": 1},
        **{"slides_with_warnings": 1, "patients": 1},
    }
    assert failed_slides(STATE.slides) == ["failed: b: file_missing: no such file"]
    assert "patients" not in CohortState(STATE.slides, ["001", "002"], None).counts()


def test_a_summary_is_made_of_the_job_the_record_and_the_state() -> None:
    record = Record("a run")
    record.counts["patients_built"] = 1
    record.timings["plan"] = 1.25
    before = record.counts.copy()
    config = Config.model_validate({"patients": "p.csv", "output": {"root": "https://me:secret@host/tables"}})
    lines = summarise(Job("mine", writes=("patients",), result="mine"), record, config, STATE).splitlines()
    assert lines[1:] == [
        "slidelake mine, run a run",
        "  slides    1 ok, 1 without tissue, 1 failed (1 file_missing)",
        "  no tissue c: no tile has enough of it, see tissue_fraction in table slides",
        "  tiles     7 with tissue",
        "  patients  1 of 2 have a row, 1 built in this run",
        "            without a row (no encoded tile, more than a row can hold, or a slide without vectors of an encoder): 002",
        "  seconds   plan 1.2",
        "  tables    https://host/tables/",
        '  next      polars.read_delta("https://host/tables/mine", use_pyarrow=True), or notebooks/tables.ipynb for a tour',
        "  failed    see error_message in table slides; mend file or cause, then run again with --retry-failed",
    ]
    assert record.counts == before
    other = summarise(Job("slides", next_step="the features job"), record, config, STATE).splitlines()
    assert "  next      the features job" in other


def test_a_record_sums_the_work_of_all_attempts_and_is_a_row_of_table_runs() -> None:
    record = Record()
    unit = dict(zip((field.name for field in WORK), (2, 100, 0.5, 0.25, 1.0), strict=True))
    rows = [Row(image_id="a", size_bytes=400, work=Row(**unit)), Row(image_id="b", size_bytes=300, work=None)]
    record.count_work("features", rows)
    record.count_work("features", rows)
    record.count_work("slides", rows)
    assert record.reads[("a", "features")] == (400, Work(4, 200, 1.0, 0.5, 2.0))
    assert record.reads.keys() == {("a", "features"), ("a", "slides")}
    others = {"job": "mine", "status": "done", "config": "{}", "versions": {"pyspark": "4"}, "features": {}}
    row = dict(zip(RUNS.names, record.row(**others, tables_read={"slides": 1}, tables_written={}), strict=True))
    assert row["reads"] == [("a", "features", 400, 4, 200, 1.0), ("a", "slides", 400, 2, 100, 0.5)]
    assert row["work"]["features"] == (4, 200, 1.0, 0.5, 2.0)
    assert row["tables_read"] == {"slides": 1} and row["versions"]["pyspark"] == "4" and row["versions"]["slidelake"]

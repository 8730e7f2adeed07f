"""What a run says at its end, held to rows of table slides."""

from types import SimpleNamespace
from typing import Any, cast

import pandas as pd

from jobs.runtime.run.run import Run
from jobs.runtime.run.summary import slide_warnings


class Rows(pd.DataFrame):
    """A table as `Tables.read` gives it, as far as the summary looks at it."""

    def select(self, columns: list[str]) -> "Rows":
        return Rows(self[columns])

    def toPandas(self) -> pd.DataFrame:
        return pd.DataFrame(self)


def warnings_of(*warnings: list[str] | None) -> list[str]:
    names = [f"s{number:02}" for number in range(len(warnings))]
    row = {"patient_id": "p", "status": "ok", "n_tiles": 1, "error_code": None, "error_message": None}
    slides = Rows([{"image_id": name, "warnings": some} | row for name, some in zip(names, warnings, strict=True)])
    run: Any = SimpleNamespace(tables=SimpleNamespace(read=lambda _: slides))
    return slide_warnings(cast(Run, run), pd.DataFrame({"gone": False}, index=names))


def test_a_slide_with_warnings_has_one_line() -> None:
    assert warnings_of(None, ["first", "second"], None) == ["warning: s01: first; second"]
    assert warnings_of(None, None) == []


def test_after_ten_lines_the_rest_is_counted() -> None:
    assert warnings_of(*[["look"]] * 10) == [f"warning: s{number:02}: look" for number in range(10)]
    lines = warnings_of(*[["look"]] * 12)
    assert len(lines) == 11 and lines[-1] == "... and 2 more, see column warnings of table slides"

"""What a run says at its end, held to rows of table slides."""

import pandas as pd

from jobs.runtime.run.summary import slide_warnings


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

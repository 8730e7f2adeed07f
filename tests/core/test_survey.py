"""What shapes a patient's row, and what becomes of the row that a patient has."""

import math
from typing import Any

import pandas as pd
import pytest

from jobs.patients import decide
from jobs.runtime.run.survey import patient_hash
from jobs.runtime.settings.config import Config

CONFIG = Config.model_validate({"patients": "p.csv", "output": {"root": "tables"}})


def images(label: Any) -> pd.DataFrame:
    row = {"image_id": "a", "center_id": "n", "label": label, "status": "ok", "gone": False}
    row |= {"feature_rows": 3, "features_digest": "d", "features_hash": "h"}
    return pd.DataFrame([row], dtype=object)


def test_a_label_that_is_missing_is_the_same_however_pandas_holds_it() -> None:
    missing = [patient_hash(images(label), CONFIG) for label in (None, math.nan, pd.NA)]
    assert len(set(missing)) == 1 and missing[0] is not None
    assert patient_hash(images("nan"), CONFIG) not in missing


Fate = tuple[list[int], list[int], list[str]]  # rows to build, rows too large, patients whose row goes
ROW_IS = {None: {}, "right": {"p": "now"}, "outdated": {"p": "before"}}
BUILT: Fate = ([1], [], [])
TOO_LARGE: Fate = ([], [1], [])
GOES: Fate = ([], [], ["p"])
STAYS: Fate = ([], [], [])


@pytest.mark.parametrize(
    ("tiles", "row", "becomes"),
    [
        (10, None, BUILT),
        (10, "right", STAYS),
        (10, "outdated", BUILT),
        (11, None, TOO_LARGE),
        (11, "right", STAYS),
        (11, "outdated", TOO_LARGE),  # and stays
        (0, None, STAYS),
        (0, "right", GOES),
        (0, "outdated", GOES),
    ],
)
def test_a_row_goes_only_if_its_patient_has_no_tile(tiles: int, row: str | None, becomes: Fate) -> None:
    wanted = {"p": {"patient_id": "p", "params_hash": "now", "wanted_tiles": tiles}} if tiles else {}
    build, too_large, drop = decide(wanted, ROW_IS[row], most_tiles=10)
    assert ([1 for _ in build], [1 for _ in too_large], drop) == becomes

"""What shapes a patient's row, and what does not."""

import math
from typing import Any

import pandas as pd

from jobs.runtime.config import Config
from jobs.runtime.survey import patient_hash

CONFIG = Config.model_validate({"patients": "p.csv", "output": {"root": "tables"}})


def images(label: Any) -> pd.DataFrame:
    row = {"image_id": "a", "center_id": "n", "label": label, "status": "ok", "gone": False}
    row |= {"feature_rows": 3, "features_digest": "d", "features_hash": "h"}
    return pd.DataFrame([row], dtype=object)


def test_a_label_that_is_missing_is_the_same_however_pandas_holds_it() -> None:
    missing = [patient_hash(images(label), CONFIG) for label in (None, math.nan, pd.NA)]
    assert len(set(missing)) == 1 and missing[0] is not None
    assert patient_hash(images("nan"), CONFIG) not in missing

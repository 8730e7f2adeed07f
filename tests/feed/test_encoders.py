"""Tables with bags of several encoders: one of them is fed, each patient once, whatever lies between its rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.training.feed import make_feed
from jobs.training.refusals import FeedError
from tests.feed.tables import Made, write
from udfs.schemas import PATIENTS


def _two(n: int) -> list[Made]:
    """Patients with bags of encoders narrow and wide in turn; the first has none of wide."""
    narrow = [Made(i, i + 1, dim=4, encoder="narrow", split="train") for i in range(n)]
    wide = [Made(i, i + 1, dim=6, dtype="float16", encoder="wide", split="train") for i in range(n)]
    return [row for pair in zip(narrow, wide, strict=True) for row in pair if row not in wide[:1]]


@pytest.mark.parametrize("encoder", ["narrow", "wide"])
def test_the_bags_of_one_encoder_are_fed_each_patient_once(tmp_path: Path, encoder: str, backend: Any) -> None:
    rows = _two(11)
    table = write(tmp_path / "table", rows, files=2)
    wanted = {row.patient_id: row for row in rows if row.encoder == encoder}
    feed = make_feed(str(table), encoder=encoder, split="train", batch_size=3, backend=backend)
    assert (feed.encoder, feed.dim, feed.dtype) == (
        (encoder, 4, "float32") if encoder == "narrow" else (encoder, 6, "float16")
    )
    fed = {name: bag for bags in feed.epoch(0) for name, bag in zip(bags.patient_id, bags.split(), strict=True)}
    assert len(feed.patients) == len(fed) == len(wanted)
    for name, row in wanted.items():
        np.testing.assert_array_equal(fed[name].numpy(), row.bag())


def test_without_a_name_it_is_the_only_encoder_of_that_version(tmp_path: Path) -> None:
    rows = _two(3)
    table = write(tmp_path / "table", rows[:1])
    write(table, rows[1:])
    assert make_feed(str(table), 0).encoder == "narrow"
    with pytest.raises(FeedError, match=r"version 1 of .* has bags of 2 encoders, narrow, wide: choose one by encoder"):
        make_feed(str(table))
    with pytest.raises(FeedError, match=r"has no bags of encoder uni, but of narrow, wide: choose one of these"):
        make_feed(str(table), encoder="uni")
    with pytest.raises(FeedError, match=r"encoder wide, has no patients p0000, 1 of 2 requested"):
        make_feed(str(table), encoder="wide", patients=["p0000", "p0001"])


def test_a_table_from_before_the_column_came_is_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([row.row() for row in _two(1)], PATIENTS).drop(["encoder"])
    write_deltalake(str(tmp_path / "table"), rows)
    with pytest.raises(FeedError, match="has no column encoder, so an older version of slidelake made it"):
        make_feed(str(tmp_path / "table"))

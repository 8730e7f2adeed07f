"""The tables as polars sees them: no JVM, no code of the project."""

from pathlib import Path

import polars as pl
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

KEYS = {
    "slides": ["image_id"],
    "tiles": ["image_id", "y_px", "x_px"],
    "indexes": ["image_id"],
    "features": ["image_id", "y_px", "x_px"],
    "patients": ["patient_id"],
}


def frame(root: Path, name: str) -> pl.DataFrame:
    """All rows of a table ordered by its key, without run_id, which differs from run to run."""
    return pl.read_delta(str(root / name)).drop("run_id").sort(KEYS[name])


def frames(root: Path) -> dict[str, pl.DataFrame]:
    """`frame` of every table that a patient's data is in."""
    return {name: frame(root, name) for name in KEYS}


def versions(root: Path) -> dict[str, int]:
    """The Delta version of each of these tables that is there."""
    return {name: DeltaTable(str(root / name)).version() for name in KEYS if DeltaTable.is_deltatable(str(root / name))}


def assert_same_rows(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Equal row for row, to the last bit of every number."""
    assert_frame_equal(found, expected, check_exact=True)

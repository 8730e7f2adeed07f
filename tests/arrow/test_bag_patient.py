"""The patients pass on plain Arrow tables, held against a group-by in NumPy, to the byte."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.bag_patients import BAGS, Dtype, bag_patient
from udfs.schemas import ENCODED

BINS = 4
COLUMNS = ("patient_id", "encoder", "image_id", "x_px", "y_px", "embedding", "embedding_max", "color_histogram")
SCHEMA = pa.schema([ENCODED.field(name) for name in COLUMNS])


def feature_rows(places: list[tuple[str, int, int]], seed: int, dim: int = 6) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    rows = []
    for image_id, x_px, y_px in places:
        bins = np.sort(random.choice(BINS**3, random.integers(1, 9), replace=False))
        row: dict[str, Any] = {"patient_id": "007", "encoder": "e", "image_id": image_id, "x_px": x_px, "y_px": y_px}
        row |= {name: random.normal(size=dim).astype(np.float32) for name in ("embedding", "embedding_max")}
        counts = random.integers(1, 10_000, len(bins))
        rows.append(row | {"color_histogram": {"bin": bins.tolist(), "count": counts.tolist()}})
    return rows


def bag(rows: list[dict[str, Any]], chunks: int = 1, dtype: Dtype = "float32") -> dict[str, Any]:
    parts = [pa.Table.from_pylist(rows[start::chunks], SCHEMA) for start in range(chunks)]
    table = bag_patient(BINS, dtype)(pa.concat_tables(parts))
    assert table.schema.equals(BAGS)
    table.validate(full=True)
    [row] = table.to_pylist()
    result: dict[str, Any] = row
    return result


def check(row: dict[str, Any], rows: list[dict[str, Any]], dtype: Dtype = "float32") -> None:
    ordered = sorted(rows, key=lambda r: (r["image_id"], r["y_px"], r["x_px"]))
    for name in ("", "_max"):
        wanted = np.stack([r[f"embedding{name}"] for r in ordered]).astype({"float32": "<f4", "float16": "<f2"}[dtype])
        assert row[f"embeddings{name}"] == wanted.tobytes()
    assert row["embedding_dtype"] == dtype
    assert row["tile_index"] == [{key: r[key] for key in ("image_id", "x_px", "y_px")} for r in ordered]
    assert (row["patient_id"], row["n_tiles"], row["embedding_dim"]) == ("007", len(rows), 6)
    fractions = np.zeros((len(rows), BINS**3))
    for i, r in enumerate(rows):
        fractions[i, r["color_histogram"]["bin"]] = r["color_histogram"]["count"]
    fractions /= fractions.sum(axis=1, keepdims=True)
    assert row["color_histogram"] == pytest.approx(fractions.mean(axis=0), abs=1e-6)
    assert sum(row["color_histogram"]) == pytest.approx(1, abs=1e-5)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    places=st.sets(
        st.tuples(st.sampled_from(["a", "a10", "a2", "B", "é", "日"]), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=40,
    ),
    seed=st.integers(0, 2**31),
    chunks=st.integers(1, 3),
    dtype=st.sampled_from(("float32", "float16")),
)
def test_bags_are_a_group_by_of_the_features_in_whatever_order_they_come(
    places: set[tuple[str, int, int]], seed: int, chunks: int, dtype: Dtype
) -> None:
    rows = feature_rows(sorted(places), seed)
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    row = bag(shuffled, chunks, dtype)
    check(row, rows, dtype)
    assert row == bag(rows, dtype=dtype)  # to the last bit, mean histogram included


def test_an_encoder_that_gives_one_vector_makes_one_bag() -> None:
    rows = [row | {"embedding_max": None} for row in feature_rows([("a", 0, 0), ("a", 0, 1)], 1)]
    row = bag(rows)
    assert row["embeddings_max"] is None and row["embedding_dim"] == 6
    assert row["embeddings"] == np.stack([r["embedding"] for r in rows]).astype("<f4").tobytes()
    rows[1]["embedding_max"] = rows[1]["embedding"]
    with pytest.raises(ValueError, match="1 of 2 tiles"):
        bag(rows)


@pytest.mark.parametrize("column", ["embedding", "embedding_max"])
@pytest.mark.parametrize("value", [65520.0, -65520.0, 3e38])  # 65504 is the largest, and what rounds to it
def test_a_patient_with_what_float16_cannot_hold_has_float32(column: str, value: float) -> None:
    rows = feature_rows([("a", x, 0) for x in range(40)], 2)
    rows[17][column][3] = value
    assert bag(rows, dtype="float16") == bag(rows)
    check(bag(rows), rows)


def test_float16_goes_to_the_ends_of_its_range_and_keeps_what_never_was_finite() -> None:
    rows = feature_rows([("a", x, 0) for x in range(40)], 2)
    rows[17]["embedding_max"][:] = [65504, -65519, 1e-9, np.inf, -np.inf, np.nan]
    packed = np.frombuffer(bag(rows, dtype="float16")["embeddings_max"], "<f2").reshape(40, 6)[17]
    np.testing.assert_array_equal(packed, [65504, -65504, 0, np.inf, -np.inf, np.nan])


def test_every_tile_weighs_the_same_in_the_mean_histogram() -> None:
    rows = feature_rows([("a", 0, 0), ("a", 1, 0)], 0)
    rows[0]["color_histogram"] = {"bin": [0], "count": [100]}
    rows[1]["color_histogram"] = {"bin": [5], "count": [200_000]}
    histogram = bag(rows)["color_histogram"]
    assert (histogram[0], histogram[5], sum(histogram)) == (0.5, 0.5, 1.0)


def test_a_slice_of_a_larger_table_is_a_bag_of_its_own() -> None:
    rows = feature_rows([("a", x, 0) for x in range(9)], 1)
    sliced = pa.Table.from_pylist(rows, SCHEMA).slice(3, 4)
    [row] = bag_patient(BINS, "float32")(sliced).to_pylist()
    check(row, rows[3:7])

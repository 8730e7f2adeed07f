"""The vectors pass on plain Arrow tables: the parts of a bag, in whatever order and batches, give the vector of the whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udfs.aggregate_tiles import STATES, TILES_OF_BAGS, VECTORS, Of, aggregate_bag, finished_vectors, partial_states
from udfs.schemas import FEATURES
from udfs.wsi.aggregator.aggregator import AggregatorSpec, load_aggregator
from udfs.wsi.aggregator.gated_attention import GatedAttention
from udfs.wsi.weights.checkpoint import CheckpointError

SCHEMA = pa.schema([FEATURES.field(name) for name in TILES_OF_BAGS])
MEAN, MAX = AggregatorSpec("mean", "mean"), AggregatorSpec("largest", "max", encoder="wide")
DIMS = {"narrow": 3, "wide": 5}
OWNERS = {"a": "p", "b": "p", "c": "q"}


def tiles_of(n_tiles: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    rows = []
    for place in range(n_tiles):
        image, encoder = random.choice(list(OWNERS)), random.choice(list(DIMS))
        vector = random.normal(size=DIMS[encoder]).astype(np.float32)
        key = {"patient_id": OWNERS[image], "image_id": str(image), "encoder": str(encoder)}
        rows.append(key | {"x_px": place % 7, "y_px": place // 7, "embedding": vector})
    return rows


def states_of(rows: list[dict[str, Any]], cuts: list[int]) -> list[dict[str, Any]]:
    """What tasks give that have the rows between the cuts, each in two batches."""
    states = []
    for part in np.split(np.arange(len(rows)), sorted(cuts)):
        table = pa.Table.from_pylist([rows[i] for i in part], SCHEMA)
        batches = table.to_batches(max_chunksize=max(1, len(part) // 2))
        for batch in partial_states([MEAN, MAX])(batches):
            assert batch.schema.equals(STATES)
            states += batch.to_pylist()
    return states


def finished(states: list[dict[str, Any]], of: Of) -> dict[tuple[str, str, str], dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in states:
        groups.setdefault((row[of], row["encoder"], row["aggregator"]), []).append(row)
    found = {}
    for key, rows in groups.items():
        table = finished_vectors([MEAN, MAX], of)(pa.Table.from_pylist(rows, STATES))
        assert table.schema.equals(VECTORS)
        [found[key]] = table.to_pylist()
    return found


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    n_tiles=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    of=st.sampled_from(["image_id", "patient_id"]),
)
def test_vectors_are_a_group_by_of_the_tiles_however_they_are_cut(
    n_tiles: int, seed: int, cuts: list[int], of: Of
) -> None:
    rows = tiles_of(n_tiles, seed)
    found = finished(states_of(rows, cuts), of)
    wanted: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        wanted.setdefault((row[of], row["encoder"], "mean"), []).append(row["embedding"])
        if row["encoder"] == "wide":
            wanted.setdefault((row[of], "wide", "largest"), []).append(row["embedding"])
    assert found.keys() == wanted.keys()
    for key, vectors in wanted.items():
        assert found[key]["n_tiles"] == len(vectors)
        assert found[key]["image_id"] == (key[0] if of == "image_id" else None)
        assert found[key]["patient_id"] == OWNERS.get(key[0], key[0])
        pooled = np.max(vectors, 0) if key[2] == "largest" else np.mean(vectors, 0, dtype=np.float64)
        np.testing.assert_allclose(found[key]["vector"], pooled, rtol=1e-6, atol=1e-7)
    shuffled = np.random.default_rng(seed).permutation(len(states := states_of(rows, cuts)))
    assert finished([states[i] for i in shuffled], of) == found  # to the last bit, whichever task ends first


@pytest.fixture
def attention(tmp_path: Path) -> AggregatorSpec:
    torch.manual_seed(1)
    shapes = {"tile.1": (4, 5), "value": (3, 4), "gate": (3, 4), "score": (1, 3)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    return AggregatorSpec("stroke", "gated_attention", str(tmp_path / "model.safetensors"), "wide")


def test_a_bag_is_pooled_in_the_order_of_its_tiles_whatever_order_they_come_in(attention: AggregatorSpec) -> None:
    rows = [row for row in tiles_of(60, 2) if row["patient_id"] == "p" and row["encoder"] == "wide"]
    loaded = load_aggregator(attention)
    pool = aggregate_bag([attention, AggregatorSpec("other", "gated_attention", "none", "narrow")], "patient_id",
                         {"stroke": loaded.identity})  # fmt: skip
    found = [
        pool(pa.Table.from_pylist([rows[i] for i in order], SCHEMA)).to_pylist()
        for order in (range(len(rows)), np.random.default_rng(0).permutation(len(rows)))
    ]
    assert found[0] == found[1]
    [row] = found[0]
    names = ("patient_id", "image_id", "encoder", "aggregator", "n_tiles")
    assert [row[name] for name in names] == ["p", None, "wide", "stroke", len(rows)]
    assert len(row["vector"]) == 4


def test_an_aggregator_that_is_not_the_drivers_ends_the_task(attention: AggregatorSpec) -> None:
    identity = load_aggregator(attention).identity
    tiles = pa.Table.from_pylist([row for row in tiles_of(20, 0) if row["encoder"] == "wide"], SCHEMA)
    pool = aggregate_bag([attention], "image_id", {"stroke": identity})
    pool(tiles)
    assert attention.weights
    tensors = safetensors.torch.load_file(attention.weights)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, attention.weights)
    replaced = GatedAttention.load(attention.weights).identity
    assert (
        aggregate_bag([attention], "image_id", {"stroke": replaced})(tiles).num_rows == 1
    )  # another run, the new file
    with pytest.raises(CheckpointError, match=r"stroke of this worker is method=gated_attention.*the driver"):
        pool(tiles)

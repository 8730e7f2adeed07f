"""The vectors pass: feature rows in, one vector per slide or patient out.

Streaming aggregators get tiles in parts (mapInArrow, then applyInArrow on states): no worker holds a bag. Others get one bag
at a time (applyInArrow).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from udfs.schemas import FEATURES, SLIDE_VECTORS
from udfs.spark_task import slot_cpus
from udfs.wsi.aggregator.aggregator import Aggregator, AggregatorSpec, StreamingAggregator, TileBag, load_aggregator
from udfs.wsi.store import StorageOptions
from udfs.wsi.weights.checkpoint import CheckpointError

VERSION = 1  # raise it when the same settings begin to give other rows: they are then redone
MAX_BAG_BYTES = 1 << 30  # of the embeddings that an aggregator gets at once; the worker holds them up to four times

_BAG = ("patient_id", "image_id", "encoder")
_AGGREGATED = (*_BAG, "aggregator", "n_tiles")
# The columns of both tables that come from tiles; image_id is null in vectors of patients.
VECTORS = pa.schema(
    [SLIDE_VECTORS.field(name).with_nullable(True) for name in (*_AGGREGATED, "vector")]
)  # fmt: skip
STATES = pa.schema([*(VECTORS.field(name) for name in _AGGREGATED), pa.field("state", pa.list_(pa.float64()))])
TILES_OF_BAGS = tuple(FEATURES.field(name).name for name in (*_BAG, "x_px", "y_px", "embedding"))  # that the pass reads

Of = Literal["image_id", "patient_id"]  # whose vectors


def partial_states(
    specs: Sequence[AggregatorSpec],
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Returns the mapInArrow function from feature rows, in any order, to one row of `STATES` per slide, encoder and aggregator.

    Args:
        specs: of streaming aggregators.
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        aggregators = {spec.name: (spec, _streaming(spec)) for spec in specs}
        states: dict[tuple[str, ...], tuple[int, NDArray[np.float64]]] = {}
        for batch in batches:
            for bag, embeddings in _by_bag(batch):
                for name, (spec, aggregator) in aggregators.items():
                    if spec.encoder not in (None, bag[-1]):
                        continue
                    n_tiles, state = len(embeddings), aggregator.partial(embeddings)
                    if (*bag, name) in states:
                        n_before, before = states[*bag, name]
                        n_tiles, state = n_before + n_tiles, aggregator.merge(before, state)
                    states[*bag, name] = n_tiles, state
        for key, (n_tiles, state) in states.items():
            row = dict(zip(STATES.names, (*key, n_tiles, state), strict=True))
            yield pa.RecordBatch.from_pylist([row], STATES)

    return run


def finished_vectors(specs: Sequence[AggregatorSpec], of: Of) -> Callable[[pa.Table], pa.Table]:
    """Returns the applyInArrow function from all rows of `STATES` of one bag and aggregator to its row of `VECTORS`."""

    def run(states: pa.Table) -> pa.Table:
        first = states.slice(0, 1).to_pylist()[0]
        [aggregator] = [_streaming(spec) for spec in specs if spec.name == first["aggregator"]]
        # In one order, whatever order the tasks end in: sums of floats depend on it.
        rows = sorted(states.select(["image_id", "n_tiles", "state"]).to_pylist(), key=lambda row: tuple(row.values()))
        state = np.asarray(rows[0]["state"])
        for row in rows[1:]:
            state = aggregator.merge(state, np.asarray(row["state"]))
        n_tiles = sum(row["n_tiles"] for row in rows)
        return _vectors(first, of, [(first["aggregator"], n_tiles, aggregator.finish(state, n_tiles))])

    return run


def aggregate_bag(
    specs: Sequence[AggregatorSpec],
    of: Of,
    identities: Mapping[str, tuple[str, ...]],
    storage_options: StorageOptions | None = None,
) -> Callable[[pa.Table], pa.Table]:
    """Returns the applyInArrow function from all feature rows of one bag to its rows of `VECTORS`.

    Args:
        specs: of aggregators that take a whole bag; each has a row if it takes the encoder's tiles.
        of: whose bags.
        identities: those of the driver's aggregators, by name.
        storage_options: of the store of their weights.
    """

    def run(tiles: pa.Table) -> pa.Table:
        tiles = tiles.sort_by([(name, "ascending") for name in ("image_id", "y_px", "x_px")])
        first = tiles.select(_BAG).slice(0, 1).to_pylist()[0]
        xy_px = np.stack([tiles[name].to_numpy() for name in ("x_px", "y_px")], 1)
        _, slide = np.unique(tiles["image_id"].to_numpy(), return_inverse=True)
        bag = TileBag(_matrix(tiles["embedding"]), xy_px, slide.astype(np.int32))
        of_encoder = [spec for spec in specs if spec.encoder in (None, first["encoder"])]
        rows = [
            (spec.name, len(tiles), _of_this_worker(spec, identities[spec.name], storage_options).pool(bag))
            for spec in of_encoder
        ]
        return _vectors(first, of, rows)

    return run


_loaded: dict[AggregatorSpec, Aggregator] = {}


def _of_this_worker(
    spec: AggregatorSpec, driver: tuple[str, ...], storage_options: StorageOptions | None
) -> Aggregator:
    """The aggregator, loaded once per worker process. Raises CheckpointError if it is not the driver's."""
    torch.set_num_threads(slot_cpus())
    if spec not in _loaded or _loaded[spec].identity != driver:  # a file may be replaced between two runs
        _loaded[spec] = load_aggregator(spec, storage_options)
    if _loaded[spec].identity != driver:
        here = ", ".join(_loaded[spec].identity)
        raise CheckpointError(
            f"aggregator {spec.name} of this worker is {here}, and that of the driver {', '.join(driver)}: every node needs the "
            "same file of weights at this path; run again if the file was replaced during the run"
        )
    return _loaded[spec]


def _streaming(spec: AggregatorSpec) -> StreamingAggregator:
    aggregator = load_aggregator(spec)
    if not isinstance(aggregator, StreamingAggregator):
        raise TypeError(f"aggregator {spec.name} takes whole bags")
    return aggregator


def _vectors(first: Mapping[str, Any], of: Of, rows: Sequence[tuple[str, int, NDArray[np.float32]]]) -> pa.Table:
    """Rows of `VECTORS`: aggregator, n_tiles and vector of each; the rest is that of the bag's first row."""
    bag = {name: first[name] for name in _BAG} | ({} if of == "image_id" else {"image_id": None})
    names = ("aggregator", "n_tiles", "vector")
    return pa.Table.from_pylist([bag | dict(zip(names, row, strict=True)) for row in rows], VECTORS)


def _by_bag(batch: pa.RecordBatch) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
    """(patient_id, image_id, encoder) and embeddings [n, d] of the rows of each bag in a batch."""
    columns = [batch.column(name).dictionary_encode() for name in _BAG]
    codes = np.stack([column.indices.to_numpy(zero_copy_only=False) for column in columns], 1)
    bags, bag_of_row = np.unique(codes, axis=0, return_inverse=True)
    for number, bag in enumerate(bags):
        rows = pa.array(np.flatnonzero(bag_of_row.reshape(-1) == number))
        key = tuple(column.dictionary[int(code)].as_py() for column, code in zip(columns, bag, strict=True))
        yield key, _matrix(batch.column("embedding").take(rows))


def _matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of vectors of equal length as float32 [n, d]."""
    values: NDArray[np.float32] = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)

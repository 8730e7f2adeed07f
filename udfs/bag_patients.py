"""The patients pass: all feature rows of one patient and encoder in, one row with the bag out (applyInArrow)."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udfs.schemas import PATIENTS, TILE_INDEX

VERSION = 2  # raise it when the same settings begin to give other rows: they are then redone

# Of one bag. A row holds two, and Spark's rows hold less than 2 GiB.
MAX_BAG_BYTES = 1 << 29
# A row passes through Arrow, Spark's rows and Parquet's pages in many copies: measured, heaps of 32 times a bag were too small
# for a task that makes its row, those of 64 times were not.
HEAP_A_BAG = 64

_EMBEDDINGS = ("embedding_dim", "embedding_dtype", "embeddings", "embeddings_max")
BAGS = pa.schema(
    map(PATIENTS.field, ("patient_id", "encoder", "n_tiles", *_EMBEDDINGS, "tile_index", "color_histogram"))
)

Dtype = Literal["float32", "float16"]  # of the numbers in a bag


def bag_patient(bins: int, dtype: Dtype) -> Callable[[pa.Table], pa.Table]:
    """Returns the applyInArrow function of the patients pass.

    Input: feature rows of one patient and encoder in any order. Output: one row of `BAGS`. Rows of the bags are ordered by
    image_id, y_px, x_px; the histogram is the mean over tiles of each tile's fractions, which sum to 1.

    Args:
        bins: of the histogram, per channel.
        dtype: of the bags, little-endian. float16 rounds to 11 significant bits, and below 6.1e-5 to multiples of 6e-8; a
            patient with a number beyond its range has float32, as column embedding_dtype says.
    """

    def run(features: pa.Table) -> pa.Table:
        order = [("image_id", "ascending"), ("y_px", "ascending"), ("x_px", "ascending")]
        features = features.sort_by(order).combine_chunks()
        vectors = {name: _matrix(features[name]) for name in ("embedding", "embedding_max")}
        matrices = {name: matrix for name, matrix in vectors.items() if matrix is not None}
        kept: Dtype = dtype if all(_fits(matrix, dtype) for matrix in matrices.values()) else "float32"
        stored = np.dtype(kept).newbyteorder("<")
        bags = {name: matrix.astype(stored, copy=False).tobytes() for name, matrix in matrices.items()}
        place = list(TILE_INDEX.value_type)
        index = pa.StructArray.from_arrays([features[f.name].combine_chunks() for f in place], fields=place)
        offsets = pa.array([0, len(features)], pa.int32())
        row = {
            "patient_id": features["patient_id"].combine_chunks()[:1],
            "encoder": features["encoder"].combine_chunks()[:1],
            "n_tiles": [len(features)],
            "embedding_dim": [matrices["embedding"].shape[1]],
            "embedding_dtype": [kept],
            "embeddings": [bags["embedding"]],
            "embeddings_max": [bags.get("embedding_max")],
            "tile_index": pa.ListArray.from_arrays(offsets, index).cast(TILE_INDEX),
            "color_histogram": [_mean_histogram(features["color_histogram"], bins)],
        }
        return pa.Table.from_pydict(row, BAGS)

    return run


def _matrix(column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """A list column of equal lengths as float32 [n, dim]; None if the encoder has no such output, so that all are null."""
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} tiles of a patient have no vector: run again")
    values = pc.list_flatten(column).to_numpy()
    matrix: np.ndarray[Any, np.dtype[np.float32]] = values.reshape(len(column), -1).astype(np.float32, copy=False)
    return matrix


def _fits(matrix: np.ndarray[Any, np.dtype[np.float32]], dtype: Dtype) -> bool:
    """Whether no finite number becomes infinite."""
    try:
        with np.errstate(over="raise"):
            matrix.astype(dtype, copy=False)
    except FloatingPointError:
        return False
    return True


def _mean_histogram(column: pa.ChunkedArray, bins: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [bins ** 3]. Each tile weighs the same whatever its number of pixels."""
    histograms = column.combine_chunks()
    where, count = histograms.field("bin"), histograms.field("count")
    tile = pc.list_parent_indices(where).to_numpy()
    counts = pc.list_flatten(count).to_numpy().astype(np.float64)
    pixels = np.bincount(tile, counts, minlength=len(column))
    total = np.bincount(pc.list_flatten(where).to_numpy(), counts / pixels[tile], minlength=bins**3)
    return (total / len(column)).astype(np.float32)

"""Work units and what the features pass makes of them, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.schemas import ENCODED
from udfs.wsi import open_slide

TILE_PX, INPUT_PX, ENCODER = 448, 96, "e"
CORNERS = np.array([[896, 448], [0, 0], [448, 448], [7, 11], [0, 896], [960, 1408]])  # tissue, glass and off the grid

Rows = list[dict[str, Any]]


def unit(path: Path, corners: NDArray[np.int64], **reading: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"image_id": path.stem, "patient_id": "007", "uri": str(path), "tile_px": TILE_PX}
    row |= {
        "level_read": 0,
        "downsample": 1.0,
        "encoders": [{"encoder": ENCODER, "params_hash": "p"}],
        "index": None,
    } | reading
    return row | {"x_px": corners[:, 0].tolist(), "y_px": corners[:, 1].tolist()}


def encode(spec: FeatureSpec, *units: dict[str, Any]) -> tuple[Rows, Rows]:
    """The UDF's rows of tiles, and its rows on how units went; each batch must have the schema to the letter, for Spark
    checks nothing.
    """
    batches = list(encode_tiles(spec, "run")([pa.RecordBatch.from_pylist(list(units))]))
    assert all(batch.schema.equals(ENCODED) for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    rows: Rows = pa.Table.from_batches(batches).to_pylist()
    tiles = [row for row in rows if row["x_px"] is not None]
    ends = [row for row in rows if row["x_px"] is None]
    assert [end["image_id"] for end in ends if not end["encoder"]] == [unit["image_id"] for unit in units]
    assert all(end["embedding"] is None and end["run_id"] == "run" for end in ends)
    n_encoders = [len(unit["encoders"]) for unit in units]
    n_tiles = [end["n_tiles"] for end in ends if not end["encoder"]]
    assert sum(number * n for number, n in zip(n_tiles, n_encoders, strict=True)) == len(tiles)
    return tiles, ends


def indexed(path: Path, corners: NDArray[np.int64], **reading: Any) -> dict[str, Any]:
    """The unit with the whole index of its slide."""
    with open_slide(str(path)) as slide:
        assert slide.index is not None
        return unit(path, corners, index=slide.index.to_bytes(), **reading)


def dense(sparse: dict[str, Any], bins: int = 16) -> NDArray[np.int64]:
    assert sparse["bin"] == sorted(set(sparse["bin"])) and all(sparse["count"])
    histogram = np.zeros(bins**3, np.int64)
    histogram[sparse["bin"]] = sparse["count"]
    return histogram


def histogram_by_numpy(tile: NDArray[np.uint8]) -> NDArray[np.int64]:
    counts, _ = np.histogramdd(tile.reshape(-1, 3), bins=16, range=[(0, 256)] * 3)
    return counts.reshape(-1).astype(np.int64)


def tile_at(pixels: NDArray[np.uint8], row: dict[str, Any], edge: int = TILE_PX) -> NDArray[np.uint8]:
    return pixels[row["y_px"] : row["y_px"] + edge, row["x_px"] : row["x_px"] + edge]

"""Delta tables of patients as the patients job writes them, made by deltalake: the bags tell who and which tile they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from deltalake import WriterProperties, write_deltalake

from udfs.schemas import PATIENTS

_BINS = 4096


@dataclass(frozen=True)
class Made:
    """A row: a patient and an encoder. Row t of its bag is (number, t, 0, 1, ...), of its maximum bag the same plus a half."""

    number: int
    n_tiles: int
    dim: int = 4
    dtype: str | None = "float32"
    label: str | None = None
    split: str | None = None
    has_maximum: bool = True
    encoder: str = "made"

    @property
    def patient_id(self) -> str:
        return f"p{self.number:04d}"

    def bag(self, kind: str = "embeddings") -> np.ndarray[Any, Any]:
        """As it should be fed."""
        bag = np.tile(np.arange(self.dim, dtype=self.dtype or "float32"), (self.n_tiles, 1))
        bag[:, 0], bag[:, 1] = self.number, np.arange(self.n_tiles)
        return bag + np.float16(0.5) if kind == "embeddings_max" else bag

    def row(self) -> dict[str, Any]:
        """Of the table."""
        histogram = np.zeros(_BINS, np.float32)
        histogram[self.number % _BINS] = 1
        return {
            "patient_id": self.patient_id,
            "encoder": self.encoder,
            "center_id": f"centre {self.number % 3}",
            "label": self.label,
            "split": self.split,
            "n_images": 1,
            "n_images_failed": 0,
            "n_images_without_tiles": 0,
            "n_tiles": self.n_tiles,
            "complete": True,
            "embedding_dim": self.dim,
            "embedding_dtype": self.dtype,
            "embeddings": self.bag().tobytes(),
            "embeddings_max": self.bag("embeddings_max").tobytes() if self.has_maximum else None,
            "tile_index": [
                {"image_id": f"s{self.number}", "x_px": 448 * i, "y_px": 7 * i} for i in range(self.n_tiles)
            ],
            "color_histogram": histogram,
            "params_hash": "made",
            "run_id": "run",
        }


def cohort(n: int, **same: Any) -> list[Made]:
    """Patients with 1 to 9 tiles, four of five in split train, two labels."""
    return [
        Made(i, i * 7 % 9 + 1, label=("CE", "LAA")[i % 2], split="test" if i % 5 == 4 else "train", **same)
        for i in range(n)
    ]


def schema() -> pa.Schema:
    """Of the table."""
    return PATIENTS


def write(
    table: Path,
    patients: Sequence[Made],
    *,
    files: int = 1,
    rows_a_group: int = 4,
    mode: Literal["append", "overwrite"] = "append",
) -> Path:
    """A commit a file."""
    for part in np.array_split(np.arange(len(patients)), files):
        rows = pa.Table.from_pylist([patients[i].row() for i in part], schema())
        properties = WriterProperties(max_row_group_size=rows_a_group, write_batch_size=rows_a_group)
        write_deltalake(str(table), rows, mode=mode, writer_properties=properties)
    return table

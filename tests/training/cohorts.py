"""A synthetic cohort with a known signal: table patients as the patients job writes it, of bags that are drawn, not encoded.

Most tiles of a patient are noise around an offset of the patient's own, as stain and scanner make it. A few, `Signal.tiles`
of each patient of a class, lie `Signal.strength` standard deviations away in the direction of that class. The offset drowns
that in the mean tile: only who looks at single tiles can tell the classes apart.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import WriterProperties, write_deltalake
from numpy.typing import NDArray

from tests.feed.tables import schema
from udfs.schemas import RUNS

_BINS = 4096


@dataclass(frozen=True)
class Signal:
    """What tells the classes apart, and what hides it. Standard deviations are those of a tile around its patient."""

    dim: int = 64
    tiles: int = 4  # that carry it, of each patient; the first class has none
    strength: float = 5.0
    offset: float = 0.5  # standard deviation of the patient's own offset, in every column
    bag: tuple[int, int] = (60, 240)  # fewest and most tiles of a patient


@dataclass(frozen=True)
class Drawn:
    """A patient."""

    patient_id: str
    center_id: str
    label: str | None
    split: str | None
    embeddings: NDArray[np.float32]  # [n, dim]
    carriers: tuple[int, ...]  # rows of the bag that carry the signal
    encoder: str = "drawn"
    run_id: str = "drawn"

    def row(self) -> dict[str, Any]:
        """Of the table."""
        n, dim = self.embeddings.shape
        histogram = np.zeros(_BINS, np.float32)
        histogram[len(self.center_id)] = 1
        return {
            "patient_id": self.patient_id,
            "encoder": self.encoder,
            "center_id": self.center_id,
            "label": self.label,
            "split": self.split,
            "n_images": 1,
            "n_images_failed": 0,
            "n_images_without_tiles": 0,
            "n_tiles": n,
            "complete": True,
            "embedding_dim": dim,
            "embedding_dtype": "float32",
            "embeddings": self.embeddings.tobytes(),
            "embeddings_max": (self.embeddings + np.float32(1)).tobytes(),
            "tile_index": [{"image_id": f"{self.patient_id}_0", "x_px": 448 * i, "y_px": 0} for i in range(n)],
            "color_histogram": histogram,
            "params_hash": f"hash of {self.patient_id}",
            "run_id": self.run_id,
        }


def draw_cohort(
    n: int,
    signal: Signal | None = None,
    *,
    classes: Sequence[str] = ("CE", "LAA"),
    centers: int = 3,
    held_out: tuple[float, float] = (0.2, 0.2),
    seed: int = 0,
) -> list[Drawn]:
    """Patients of all classes in turn; the last shares of them are validation and test."""
    signal = signal or Signal()
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(signal.dim, len(classes))))[0].T
    ends = np.cumsum([1 - sum(held_out), *held_out]) * n
    patients = []
    for i in range(n):
        k = i % len(classes)
        bag = rng.normal(size=(int(rng.integers(*signal.bag)), signal.dim)) + rng.normal(0, signal.offset, signal.dim)
        carriers = np.sort(rng.choice(len(bag), signal.tiles if k else 0, replace=False))
        bag[carriers] += signal.strength * directions[k]
        patients.append(
            Drawn(
                f"{i:04d}",
                f"centre {rng.integers(centers)}",
                classes[k],
                ("train", "validation", "test")[int(np.searchsorted(ends, i, side="right"))],
                bag.astype(np.float32),
                tuple(int(row) for row in carriers),
            )
        )
    return patients


def shuffled_labels(patients: Sequence[Drawn], seed: int = 0) -> list[Drawn]:
    """The same patients, their labels dealt anew: there is nothing to learn."""
    labels = np.random.default_rng(seed).permutation([str(patient.label) for patient in patients])
    return [replace(patient, label=str(label)) for patient, label in zip(patients, labels, strict=True)]


def write_patients(root: Path, patients: Sequence[Drawn], mode: str = "overwrite") -> Path:
    """Table patients below the root of the tables, in two files of row groups of 16 patients."""
    table = root / "patients"
    for number, part in enumerate(np.array_split(np.arange(len(patients)), 2)):
        rows = pa.Table.from_pylist([patients[i].row() for i in part], schema())
        how: Any = mode if number == 0 else "append"
        properties = WriterProperties(max_row_group_size=16, write_batch_size=16)
        write_deltalake(str(table), rows, mode=how, writer_properties=properties)
    return table


Recipes = dict[str, dict[str, dict[str, str]] | None]  # by run, by encoder; None if the run has none


def runs_table(root: Path, recipes: Recipes, config: Mapping[str, Any] | None = None) -> str:
    """Table runs, a commit per run and day, of which the first is from before the column features came."""
    old = pa.schema([field for field in RUNS if field.name != "features"])
    for number, (run_id, of_run) in enumerate(recipes.items()):
        started_at = datetime(2026, 1, 1 + number, tzinfo=UTC)
        row: dict[str, Any] = {"run_id": run_id, "started_at": started_at, "config": json.dumps(config or {})}
        features = [(encoder, list(recipe.items())) for encoder, recipe in (of_run or {}).items()] if of_run else None
        rows = pa.Table.from_pylist([row | {"features": features}] if number else [row], RUNS if number else old)
        write_deltalake(str(root / "runs"), rows, mode="append", schema_mode="merge")
    return str(root / "runs")

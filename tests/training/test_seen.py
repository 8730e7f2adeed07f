"""Slides to be predicted that the model learned from: named whatever their names are, in these tables or in others."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.training import seen as seen_module
from jobs.training.model.files import ModelCard
from jobs.training.model.mil import ModelSpec
from jobs.training.refusals import FeedError
from jobs.training.seen import Seen, seen_by_model
from udfs.schemas import PATIENTS, SLIDES
from udfs.wsi.store import File

# image, patient, split, label, number of its content
TRAINED = [
    ("a", "p1", "train", "CE", 1),
    ("b", "p2", "validation", "LAA", 2),
    ("c", "p3", "test", "CE", 3),
    ("d", "p4", "train", None, 4),  # without a label, nobody learns from it
]


def tables(root: Path, rows: list[tuple[Any, ...]], mode: Any = "overwrite") -> Path:
    """Tables slides and patients, and the files of the slides."""
    root.mkdir(exist_ok=True)
    slides = []
    for image, patient, *_, content in rows:
        path = root / f"{image}.tif"
        path.write_bytes(np.random.default_rng(content).bytes(5000))
        info = File(str(path)).info
        slides.append(
            {"image_id": image, "patient_id": patient, "uri": str(path)}
            | {"size_bytes": info.size_bytes, "file_version": info.version}
        )
    patients = {row[1]: {"patient_id": row[1], "encoder": "e", "split": row[2], "label": row[3]} for row in rows}
    write_deltalake(str(root / "slides"), pa.Table.from_pylist(slides, SLIDES), mode=mode)
    write_deltalake(str(root / "patients"), pa.Table.from_pylist(list(patients.values()), PATIENTS), mode=mode)
    return root


def card(root: Path, version: int = 0) -> ModelCard:
    spec = ModelSpec("mean", 4, ("CE", "LAA"))
    return ModelCard("m", spec, ("embeddings",), (0.5, 0.5), str(root / "patients"), version, "e", (), {}, 0, {})


def seen(model: ModelCard, root: Path, *images: str) -> Seen:
    return seen_by_model(model, str(root), dict.fromkeys(images))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return tables(tmp_path / "trained", TRAINED)


def test_copies_in_other_tables_are_named_though_names_collide(trained: Path, tmp_path: Path) -> None:
    rows = [
        *(("a", "p1", None, None, 11), ("n", "p2", None, None, 1), ("o", "p9", None, None, 2)),
        *(("q", "p8", None, None, 3), ("r", "p7", None, None, 4), ("s", "p6", None, None, 1)),
    ]
    found = seen(card(trained), tables(tmp_path / "new", rows), "a", "n", "o", "q", "r")
    assert found.patients == []  # a p1 of other tables need not be the same
    assert found.copies == [
        "n (patient p2, new) is a (patient p1, learned from) by content (5,000 bytes)",
        "o (patient p9, new) is b (patient p2, learned from) by content (5,000 bytes)",
    ]
    first, second = found.lines()[0], found.lines()[-1]
    assert first == second and first.startswith("  seen      2 slides that the model learned from: n (patient p2, new)")
    shutil.rmtree(trained / "slides")
    lines = seen(card(trained), tmp_path / "new", "n").lines()
    assert len(lines) == 1 and "slides were not compared with those that the model learned from: no Delta" in lines[0]


def test_the_same_file_in_other_tables_is_named_by_its_uri(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "moved")
    assert seen(card(trained), tmp_path / "moved", "a").copies == [
        f"a (patient p1, new) is a (patient p1, learned from) by its URI {trained}/a.tif"
    ]


def test_in_the_same_tables_patients_are_named_and_copies_of_theirs(trained: Path) -> None:
    rows = [*TRAINED, ("n", "p9", None, None, 2), ("o", "p8", None, None, 3)]
    tables(trained, rows)  # later, patients to be predicted came to the tables
    everybody = seen(card(trained), trained, *(row[0] for row in rows))
    assert everybody.patients == ["p1", "p2"]
    assert everybody.copies == ["n (patient p9, new) is b (patient p2, learned from) by content (5,000 bytes)"]
    assert "2 patients that the model learned from: p1, p2" in everybody.lines()[0]
    nobody = seen(card(trained), trained, "o", "c")
    assert (nobody.patients, nobody.copies, nobody.lines()) == ([], [], [])


def test_of_several_encoders_that_of_the_model_counts_and_each_patient_once(trained: Path) -> None:
    other = [{"patient_id": name, "encoder": "other", "split": "train", "label": "CE"} for name in ("p1", "p3", "p5")]
    write_deltalake(str(trained / "patients"), pa.Table.from_pylist(other, PATIENTS), mode="append")
    assert seen(card(trained, 1), trained, "a", "b", "c").patients == ["p1", "p2"]
    assert seen(replace(card(trained, 1), encoder="other"), trained, "a", "b", "c").patients == ["p1", "p3"]


def test_where_the_version_trained_on_was_vacuumed_the_newest_tells(trained: Path) -> None:
    tables(trained, [*TRAINED, ("n", "p9", None, None, 1)])
    DeltaTable(str(trained / "patients")).vacuum(0, dry_run=False, enforce_retention_duration=False)
    assert len(seen(card(trained), trained, "n").copies) == 1


def test_what_can_not_be_opened_is_counted(trained: Path, tmp_path: Path) -> None:
    new = tables(tmp_path / "new", [("n", "p9", None, None, 1)])
    (trained / "a.tif").unlink()
    [line] = seen(card(trained), new, "n").lines()
    assert line == "  seen      1 slides of equal size could not be opened, so not be compared"


@pytest.mark.parametrize("at", ["slide_files", "read_columns", "shared_slides"])
@pytest.mark.parametrize(
    "error", [FeedError("x is gone"), OSError("x is gone"), RuntimeError("x is\ngone"), KeyError("x is gone")]
)
def test_an_error_while_slides_are_compared_is_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: Exception
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(seen_module, at, fail)
    [line] = seen(card(trained), trained, "a").lines()
    assert "slides were not compared with those that the model learned from: " in line and "\n" not in line
    assert "x is gone" in line


@pytest.mark.parametrize("table", ["slides", "patients"])
def test_a_table_that_is_lost_after_predictions_were_written_is_one_line(
    trained: Path, tmp_path: Path, table: str
) -> None:
    new = tables(tmp_path / "new", [("n", "p9", None, None, 1)])
    shutil.rmtree((new if table == "slides" else trained) / table)
    [line] = seen(card(trained), new, "n").lines()
    assert "slides were not compared with those that the model learned from: no Delta" in line


def test_the_line_on_an_error_holds_no_secret(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "https://user:hunter22@host/a.svs?signature=abcdefghijklmnop"

    def fail(*arguments: object) -> None:
        raise OSError(f"no route to {uri}")

    monkeypatch.setattr(seen_module, "shared_slides", fail)
    [line] = seen_by_model(card(trained), str(trained), {"a": uri}).lines()
    assert "no route to" in line and "hunter22" not in line and "abcdefghijklmnop" not in line

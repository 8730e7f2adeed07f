"""The notebooks, executed on the tables of a small cohort as a newcomer would on their own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pyarrow as pa
import pytest
import torch
import yaml
from deltalake import DeltaTable, write_deltalake
from nbclient import NotebookClient
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import SMALL_COHORT, preprocess_in
from tests.spark.conftest import Again, rows_of

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
Execute = Callable[[str, Config], Any]


@pytest.fixture
def stain_weights(tmp_path: Path) -> Path:
    """A checkpoint in the published layout: random weights, so that no colour stays what it was."""
    torch.manual_seed(11)
    shapes = {"0": (32, 3), "2": (32, 32), "4": (3, 32)}
    tensors = {f"rgb_trans.{at}.weight": torch.randn(*shape, 1, 1) * 0.3 for at, shape in shapes.items()}
    tensors |= {f"rgb_trans.{at}.bias": torch.randn(shape[0]) * 0.1 for at, shape in shapes.items()}
    path = tmp_path / "stainnet.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Run a notebook on one's own tables and settings; gives it with its outputs."""

    def run(name: str, config: Config) -> Any:
        settings = tmp_path / "own.yaml"
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        monkeypatch.setenv("SLIDELAKE_TABLES", config.output.root)
        monkeypatch.setenv("SLIDELAKE_CONFIG", str(settings))
        notebook = read_notebook(NOTEBOOKS / name)
        folder = {"metadata": {"path": str(NOTEBOOKS)}}  # where Jupyter starts a kernel
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()  # raises on an error
        return notebook

    return run


def read_notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def outputs(notebook: Any, kind: str) -> list[str]:
    found = [output.get("data", {}).get(kind) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [content for content in found if content]


def printed(notebook: Any) -> str:
    streams = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    return "".join(stream["text"] for stream in streams if stream["name"] == "stdout")


def test_the_tour_of_the_tables_draws_them(
    spark: SparkSession, small_config: Callable[..., Config], stain_weights: Path, execute: Execute
) -> None:
    rows = [*SMALL_COHORT, ("lost", "north", "005", 0, "LAA")]
    config = small_config(rows, stain={"weights": str(stain_weights)})
    preprocess_in(spark, config).write_record("done")

    notebook = execute("tables.ipynb", config)

    assert len(outputs(notebook, "image/png")) == 3  # mask with kept tiles, before and after StainNet, a bag
    shown = "\n".join(outputs(notebook, "text/html"))
    for table in ("slides", "tiles", "features", "patients", "runs"):
        assert f"<td>&quot;{table}&quot;</td>" in shown
    assert "file_missing" in shown  # the slide that is lost, with its reason
    bag = spark.read.format("delta").load(f"{config.output.root}/patients").where("patient_id = '001'").first()
    assert bag is not None
    assert f"bag of patient 001: float32 [{bag.n_tiles}, 256]\n" in printed(notebook)


def test_a_model_is_trained_judged_and_its_attention_drawn(again: Again, execute: Execute) -> None:
    config = again(training={"epochs": 4, "batch_size": 2})
    dealt = {  # as the job splits might; 007 and 009 came without a label
        "train": {"001": "CE", "002": "LAA"},
        "validation": {"007": "CE", "009": "LAA"},
        "test": {"003": "CE", "004": "LAA"},
    }
    table = DeltaTable(f"{config.output.root}/patients")
    rows = table.to_pyarrow_table()
    of_patient = {patient: (split, label) for split, labels in dealt.items() for patient, label in labels.items()}
    told = zip(*(of_patient[patient] for patient in rows["patient_id"].to_pylist()), strict=True)
    for name, values in zip(("split", "label"), told, strict=True):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(name), pa.array(values, pa.string()))
    write_deltalake(table, rows, mode="overwrite")

    notebook = execute("training.ipynb", config)

    assert len(outputs(notebook, "image/png")) == 4  # loss, ROC, attention on a slide, tiles
    said = printed(notebook)
    assert f"2 patients in 1 steps an epoch, version {table.version()}" in said
    assert "4 epochs; the model has the weights of epoch " in said
    assert "test: 2 patients (1 CE, 1 LAA)" in said and "    auroc " in said
    shown = "\n".join(outputs(notebook, "text/html"))
    for split, labels in dealt.items():  # whom it was asked about: patient, centre, split, label
        for patient, label in labels.items():
            cells = (f"&quot;{text}&quot;" for text in (patient, r"\w+", split, label))
            assert re.search("".join(f"<td>{cell}</td>" for cell in cells), shown), patient
    most = max(rows_of(config, "patients"), key=lambda row: (row["n_tiles"], row["patient_id"]))
    assert (
        f"patient {most['patient_id']}, split {most['split']}, label {most['label']}: {most['n_tiles']} tiles\n" in said
    )


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read_notebook(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None and not cell.metadata for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"

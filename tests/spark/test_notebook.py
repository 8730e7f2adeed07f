"""The notebook, executed on the tables of a small cohort as a newcomer would on their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from pyspark.sql import SparkSession

from jobs.runtime.config import Config
from tests.conftest import SMALL_COHORT, preprocess_in

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "tables.ipynb"


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


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def outputs(notebook: Any, kind: str) -> list[str]:
    found = [output.get("data", {}).get(kind) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [content for content in found if content]


def test_the_notebook_runs_on_ones_own_tables_and_draws_them(
    spark: SparkSession,
    small_config: Callable[..., Config],
    stain_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [*SMALL_COHORT, ("lost", "north", "005", 0, "LAA")]
    config = small_config(rows, stain={"weights": str(stain_weights)})
    preprocess_in(spark, config).record("done", {})
    settings = tmp_path / "own.yaml"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setenv("SLIDELAKE_TABLES", config.output.root)
    monkeypatch.setenv("SLIDELAKE_CONFIG", str(settings))

    notebook = read_notebook()
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts a kernel
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()  # raises on an error

    assert len(outputs(notebook, "image/png")) == 3  # mask with kept tiles, before and after StainNet, a bag
    shown = "\n".join(outputs(notebook, "text/html"))
    for table in ("slides", "tiles", "features", "patients", "runs"):
        assert f"<td>&quot;{table}&quot;</td>" in shown
    assert "file_missing" in shown  # the slide that is lost, with its reason
    printed = [o["text"] for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    bag = spark.read.format("delta").load(f"{config.output.root}/patients").where("patient_id = '001'").first()
    assert bag is not None
    assert f"bag of patient 001: float32 [{bag.n_tiles}, 256]\n" in printed


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None and not cell.metadata for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"

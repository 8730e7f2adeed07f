"""The benchmark of a GPU runs without one, on small models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.measure import show
from udfs.wsi.encoder import EncoderSpec

SMALL = (
    EncoderSpec("test_efficientnet", None, 96, precision="bf16"),
    EncoderSpec("test_vit", None, 160, precision="bf16", pooling="cls"),
)
NOT_NEEDED = ("pyspark", "delta", "pyarrow", "openvino", "openslide", "pyvips", "transformers", "tiffslide")


def test_it_measures_the_path_and_the_network_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDELAKE_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = dict(os.environ)
    lines = list(gpu.run(SMALL))
    assert dict(os.environ) == before
    assert not list(tmp_path.iterdir())
    paths, ways = lines[::2], lines[1::2]
    assert [line["encoder"] for line in paths] == [line["encoder"] for line in ways] == [spec.name for spec in SMALL]
    for line in paths:
        assert show("gpu", line).startswith("bench=gpu gpu=none encoder=test_")
        assert line["of_bare"] == line["tiles_per_s"] / line["bare_tiles_per_s"] > 0  # type: ignore[operator]
        assert float(line["jpeg_tiles_per_s"]) > 0
        assert float(line["vs_autocast"]) > 0
        assert float(line["cosine_min"]) > 0.99
    for line in ways:
        assert line["way"] == "compiled"
        assert float(line["tiles_per_s"]) > 0


def test_it_needs_few_packages() -> None:
    """Machines with a GPU have PyTorch, and seldom all that the jobs need."""
    code = f"import sys, benchmarks.gpu; print([name for name in {NOT_NEEDED} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

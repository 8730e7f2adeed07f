"""A new tissue method and a new tile metric are one file each: settings, tables and the slides pass know them at once."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from udfs.wsi import open_slide

ROOT = Path(__file__).parents[2]

METHOD = '''
from dataclasses import dataclass

import numpy as np

from udfs.wsi.tissue.method import TissueMethod, method_setting


@dataclass(frozen=True)
class LeftSide(TissueMethod):
    """All that is right of a column is background."""

    name = "left_side"
    version = 3
    left_columns: int = method_setting(60, "columns of the mask that are tissue", ge=1)
    left_notes: str = method_setting("", "notes, of no effect", shapes_mask=False)

    def background(self, pixels):
        mask = np.ones(pixels.shape[:2], np.bool_)
        mask[:, : self.left_columns] = False
        return mask
'''

METRIC = '''
from udfs.wsi.quality.mask_metric import MaskMetric


class PinkFraction(MaskMetric):
    """The share of a tile that is more red than green."""

    column = "pink_fraction"
    comment = "share of the tile that is more red than green, 0 to 1"
    type = "float64"
    version = 1

    def measure(self, tiles):
        return tiles.share_of(tiles.pixels[..., 0] > tiles.pixels[..., 1])
'''

# A folder that is added to a package's path stands for a file that is added to the package.
SCRIPT = """
import json, sys
import pandas as pd
import udfs.wsi.quality.tile_metrics, udfs.wsi.tissue
udfs.wsi.tissue.__path__.append(sys.argv[1] + "/methods")
udfs.wsi.quality.tile_metrics.__path__.append(sys.argv[1] + "/metrics")

from jobs.runtime.settings.config import describe_settings, load_config
from udfs.find_tissue import TissueSpec, find_tissue
from udfs.schemas import FOUND_TISSUE, TILES
from udfs.wsi.quality.mask_metric import MaskMetric

def method(*overrides):
    return load_config(sys.argv[1] + "/config.yaml", ["tissue.method=left_side", *overrides]).tissue_method

spec = TissueSpec(448, None, 16, method("tissue.left_columns=28"), 0.1)
row = {"image_id": "a1", "patient_id": "p", "uri": sys.argv[2], "mpp": None}
[found] = find_tissue(spec, "run")([pd.DataFrame([row], dtype=object)])
assert list(found.columns) == FOUND_TISSUE.names
named = ["status", "x_px", "y_px", "background_fraction", "pink_fraction"]
print(json.dumps({
    "row": {name: getattr(found[name][0], "tolist", lambda: found[name][0])() for name in named},
    "settings": [line for line in describe_settings() if line[0].startswith("tissue.")],
    "identities": [method(*one).identity for one in ([], ["tissue.left_columns=5"], ["tissue.left_notes=x"])],
    "other_method": load_config(sys.argv[1] + "/config.yaml", ["tissue.left_columns=5"]).tissue_method.identity,
    "columns": {field.name: [str(field.type), field.metadata[b"comment"].decode()] for field in TILES},
    "versions": {metric.column: metric.version for metric in MaskMetric.defined()},
}))
"""


@pytest.fixture(scope="module")
def seen(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a Python that has both files prints."""
    folder = tmp_path_factory.mktemp("added")
    for name, text in {"methods/left_side.py": METHOD, "metrics/pink_fraction.py": METRIC}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    (folder / "config.yaml").write_text(yaml.safe_dump({"patients": "p.csv", "output": {"root": "tables"}}))
    return json.loads(run_python(SCRIPT, ROOT, str(folder), str(small_slides / "a1.tif")))


def run_python(code: str, path: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    environment = {"PYTHONPATH": str(path), "PATH": ""}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_method_chooses_the_tiles_and_the_metric_has_its_column(seen: Any, small_slides: Path) -> None:
    with open_slide(str(small_slides / "a1.tif")) as slide:
        pixels = slide.downsampled(16)
    row, rows = seen["row"], pixels.shape[0] // 28
    assert (row["status"], row["x_px"], row["y_px"]) == ("ok", [0] * rows, list(range(0, 448 * rows, 448)))
    assert row["background_fraction"] == [0.0] * rows
    pink = pixels[: 28 * rows, :28, 0] > pixels[: 28 * rows, :28, 1]
    assert row["pink_fraction"] == pytest.approx([share.mean() for share in np.split(pink, rows)])
    assert seen["columns"]["pink_fraction"] == ["double", "share of the tile that is more red than green, 0 to 1"]


def test_the_section_tissue_has_the_settings_of_the_method(seen: Any) -> None:
    first, *others = seen["settings"]
    assert first[:2] == ["tissue.method", "brightness"]
    assert {"brightness", "left_side"} <= {*first[2].removeprefix("how the mask is made: ").split(", ")}
    for line in (
        [
            "tissue.background_brightness",
            "190",
            "brightness: a mask pixel is background if R, G and B are all above this",
        ],
        ["tissue.left_columns", "60", "left_side: columns of the mask that are tissue"],
        ["tissue.left_notes", "''", "left_side: notes, of no effect"],
    ):
        assert line in others


def test_only_settings_of_the_chosen_method_that_shape_the_mask_identify_it(seen: Any) -> None:
    plain, other_columns, notes = seen["identities"]
    assert plain == notes == {"method": "left_side", "version": 3, "left_columns": 60}
    assert other_columns == plain | {"left_columns": 5}
    assert seen["other_method"] == {"method": "brightness", "version": 1, "background_brightness": 190}
    assert seen["versions"].items() >= {"background_fraction": 1, "pink_fraction": 1}.items()


def test_methods_and_metrics_are_found_in_the_zip_that_spark_sends(tmp_path: Path) -> None:
    code = tmp_path / "code.zip"
    with zipfile.ZipFile(code, "w") as archive:
        for path in (ROOT / "udfs").rglob("*.py"):
            archive.write(path, path.relative_to(ROOT))
    printed = run_python("import udfs.schemas as s; print(s.__file__, 'background_fraction' in s.TILES.names)", code)
    assert printed.split() == [f"{code}/udfs/schemas.py", "True"]
    printed = run_python("from udfs.wsi.tissue.method import tissue_methods; print(*tissue_methods())", code)
    assert "brightness" in printed.split()

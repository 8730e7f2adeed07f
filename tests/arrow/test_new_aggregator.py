"""A new aggregator is one file: settings, the pass and the job know it at once."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]

AGGREGATOR = '''
import numpy as np

from udfs.wsi.aggregator.aggregator import Aggregator


class Widest(Aggregator):
    """The embedding of the tile furthest to the right on the last slide, and where it lies."""

    name = "widest"
    version = 7

    def pool(self, bag):
        last = np.flatnonzero(bag.slide == bag.slide.max())
        place = last[bag.xy_px[last, 0].argmax()]
        return np.concatenate([bag.embeddings[place], bag.xy_px[place]]).astype(np.float32)
'''

# A folder that is added to a package's path stands for a file that is added to the package.
SCRIPT = """
import json, sys
import pyarrow as pa
import udfs.wsi.aggregator
udfs.wsi.aggregator.__path__.append(sys.argv[1] + "/aggregators")

from jobs.runtime.settings.config import load_config
from jobs.vectors import TilesOfSlide, load_all, wanted_rows
from udfs.aggregate_tiles import TILES_OF_BAGS, aggregate_bag
from udfs.schemas import FEATURES

config = load_config(sys.argv[1] + "/config.yaml", ["aggregators={right: {method: widest}}"])
loaded = load_all(config)
spec, aggregator = loaded["right"]
places = [("b", 5, 0), ("a", 9, 0), ("b", 7, 448), ("b", 0, 896)]
tiles = [dict(zip(TILES_OF_BAGS, ("p", image, "e", x, y, [x / 2]))) for image, x, y in places]
table = pa.Table.from_pylist(tiles, pa.schema([FEATURES.field(name) for name in TILES_OF_BAGS]))
[row] = aggregate_bag([spec], "patient_id", {"right": aggregator.identity})(table).to_pylist()
keys = wanted_rows([TilesOfSlide("a", "e", "p", 1, "x"), TilesOfSlide("b", "e", "p", 3, "y")], loaded, "patient_id")
print(json.dumps({"row": row, "identity": aggregator.identity, "keys": list(keys)}))
"""


def test_a_file_in_the_folder_is_an_aggregator_of_the_settings_and_of_the_pass(tmp_path: Path) -> None:
    (tmp_path / "aggregators").mkdir()
    (tmp_path / "aggregators/widest.py").write_text(AGGREGATOR)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"patients": "p.csv", "output": {"root": "tables"}}))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["row"]["vector"] == [3.5, 7, 448]  # of slide b, not of a, whose tile is further to the right
    assert (seen["row"]["aggregator"], seen["row"]["n_tiles"]) == ("right", 4)
    assert seen["identity"] == ["method=widest", "version=7"]
    assert seen["keys"] == [["p", "e", "right"]]

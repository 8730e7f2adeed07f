"""A new metric of a tile's pixels is one file: table features has its column, and the features pass measures it."""

import json
from pathlib import Path

import pytest
import tifffile
import torch
import yaml

from jobs.runtime.settings.config import load_config
from jobs.runtime.settings.identity import Identity
from tests.arrow.test_new_method_and_metric import ROOT, run_python
from udfs.schemas import FEATURES
from udfs.wsi.stain.stain_network import StainNet, load_stainnet

CORNERS = [(896, 448), (448, 448), (7, 11), (960, 1408), (0, 896)]

METRIC = '''
from udfs.wsi.quality.pixel_metric import PixelMetric


class MeanRed(PixelMetric):
    """The mean of red over a tile."""

    column = "mean_red"
    comment = "mean of red over the stain-normalised tile, 0 to 255"
    type = "float32"
    version = 1

    def measure(self, tiles):
        return tiles[..., 0].mean(axis=(1, 2))
'''

# A folder that is added to a package's path stands for a file that is added to the package.
SCRIPT = """
import json, sys
import pyarrow as pa
import udfs.wsi.quality.tile_metrics
udfs.wsi.quality.tile_metrics.__path__.append(sys.argv[1])

from jobs.runtime.settings.config import load_config
from jobs.runtime.settings.identity import Identity
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.schemas import ENCODED, FEATURES
from udfs.wsi.encoder import EncoderSpec
from udfs.wsi.quality.pixel_metric import PixelMetric

folder, slide, encoder, stain, corners = sys.argv[1:]
x_px, y_px = zip(*json.loads(corners))
unit = {"image_id": "a1", "patient_id": "p", "uri": slide, "tile_px": 448, "level_read": 0, "downsample": 1.0,
        "encoders": [{"encoder": "e", "params_hash": "h"}], "index": None, "x_px": x_px, "y_px": y_px}
spec = FeatureSpec({"e": EncoderSpec("test_efficientnet", encoder, 96, batch_size=2, device="cpu")}, stain, 16)
batches = list(encode_tiles(spec, "run")([pa.RecordBatch.from_pylist([unit])]))
assert all(batch.schema.equals(ENCODED) for batch in batches)
rows = pa.Table.from_batches(batches).select(["x_px", "y_px", "mean_red", "error_message"]).to_pylist()

config = load_config(folder + "/config.yaml", [])
hashes = []
[metric] = PixelMetric.defined()
for version in (1, 2):
    type(metric).version = version
    identity = Identity(config, {"efficientnet_b0": {"weights": "w"}})
    hashes.append([identity.slide_hash("p", "1", None), identity.features_hashes("p", "1", None)["efficientnet_b0"]])
field = FEATURES.field("mean_red")
print(json.dumps({"rows": rows, "column": [str(field.type), field.metadata[b"comment"].decode()], "hashes": hashes,
                  "recipe": identity.recipe("efficientnet_b0")}))
"""


def test_a_metric_of_pixels_is_a_column_of_features_and_shapes_its_rows(
    small_slides: Path, encoder_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "mean_red.py").write_text(METRIC)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"patients": "p.csv", "output": {"root": "tables"}}))
    torch.manual_seed(3)
    stain = tmp_path / "stainnet.pth"
    torch.save(StainNet().state_dict(), stain)
    slide = small_slides / "a2.tif"
    arguments = str(tmp_path), str(slide), str(encoder_weights), str(stain), json.dumps(CORNERS)
    seen = json.loads(run_python(SCRIPT, ROOT, *arguments))

    *rows, end = seen["rows"]
    assert end == {"x_px": None, "y_px": None, "mean_red": None, "error_message": None}
    assert sorted((row["x_px"], row["y_px"]) for row in rows) == sorted(CORNERS)
    pixels = tifffile.imread(slide, key=0)
    for row in rows:
        tile = pixels[row["y_px"] : row["y_px"] + 448, row["x_px"] : row["x_px"] + 448]
        tile = load_stainnet(str(stain)).normalise(tile)
        assert row["mean_red"] == pytest.approx(tile[..., 0].mean(), rel=1e-5)

    assert seen["column"] == ["float", "mean of red over the stain-normalised tile, 0 to 255"]
    without = Identity(load_config(str(tmp_path / "config.yaml"), []), {"efficientnet_b0": {"weights": "w"}})
    (slide_hash, first), (slide_hash_2, second) = seen["hashes"]
    assert slide_hash == slide_hash_2 == without.slide_hash("p", "1", None)
    assert len({first, second, without.features_hashes("p", "1", None)["efficientnet_b0"]}) == 3
    assert seen["recipe"] == without.recipe("efficientnet_b0"), "a model does not depend on a metric"
    assert "mean_red" not in FEATURES.names

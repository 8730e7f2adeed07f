"""Patches from tables written without Spark: splits, pinned versions, stores, and patches larger than a tile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.training.patches.from_tables import grid_on_tissue, patches_of_tables
from jobs.training.patches.patch_units import cut_units
from jobs.training.patches.selection import PatchSpec
from jobs.training.refusals import FeedError
from jobs.training.table_versions import read_columns
from tests.stores.moto import moto
from udfs.schemas import INDEXES, SLIDES, TILES

TILE_PX, SLIDE_PX = 100, 400
TISSUE = [(x, y) for x in (100, 200) for y in (100, 200)]  # the middle of each slide


def rows(schema: pa.Schema, *values: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in values], schema)


@pytest.fixture
def root(tmp_path: Path) -> str:
    slides, tiles = [], []
    for number, (patient, label) in enumerate((("p1", "CE"), ("p2", "LAA"), ("p3", None))):
        image = f"i{number}"
        size = {
            "width_px": SLIDE_PX,
            "height_px": SLIDE_PX,
            "mpp_x": 0.5,
            "mpp_y": 0.5,
            "level_downsamples": [1.0, 4.0],
        }
        who = {"image_id": image, "patient_id": patient, "status": "ok"}
        slides.append(who | size | {"label": label, "uri": f"{image}.tif", "file_version": "1"})
        tile = {"image_id": image, "patient_id": patient, "tile_px": TILE_PX, "downsample": 1.0}
        tiles += [tile | {"x_px": x, "y_px": y} for x, y in TISSUE]
    slides.append(slides[0] | {"image_id": "bad", "status": "failed", "level_downsamples": None})
    write_deltalake(str(tmp_path / "slides"), rows(SLIDES, *slides))
    write_deltalake(str(tmp_path / "tiles"), rows(TILES, *tiles))
    write_deltalake(
        str(tmp_path / "indexes"), rows(INDEXES, {"image_id": "i0", "file_version": "1", "index": b"of i0"})
    )
    return str(tmp_path)


def images(spec: PatchSpec) -> list[str]:
    return [slide.image_id for slide in spec.slides]


def test_splits_choose_patients_and_versions_are_pinned(root: str) -> None:
    assert images(patches_of_tables(root, 50)) == ["i0", "i1", "i2"]
    assert patches_of_tables(root, 50).slides[0].index == b"of i0"
    with pytest.raises(ValueError, match=r"no table patients in .*: run the slides job"):
        patches_of_tables(root, 50, split="train")
    write_deltalake(f"{root}/patients", pa.table({"patient_id": ["p1", "p2"]}))
    with pytest.raises(ValueError, match="has no column split: run the splits job first"):
        patches_of_tables(root, 50, split="train")
    split = pa.table({"patient_id": ["p1", "p2", "p3"], "split": ["train", "test", "train"]})
    write_deltalake(f"{root}/patients", split, mode="overwrite", schema_mode="overwrite")
    spec = patches_of_tables(root, 50, split="train")
    assert (images(spec), spec.classes, len(spec)) == (["i0", "i2"], ("CE",), 2 * 16)
    assert images(patches_of_tables(root, 50, split=["train", "test"], patients=["p2", "p3"])) == ["i1", "i2"]
    with pytest.raises(ValueError, match=r"no patient of split validation in .*: correct the name"):
        patches_of_tables(root, 50, split="validation")

    write_deltalake(f"{root}/tiles", rows(TILES), mode="overwrite")  # no tile is left in the newest version
    with pytest.raises(ValueError, match="no patch of 50 px"):
        patches_of_tables(root, 50)
    pinned = patches_of_tables(root, 50, split="train", versions={"tiles": 0})
    assert pinned.fingerprint == spec.fingerprint


def test_patches_of_another_size_or_spacing_are_centred_on_tissue(root: str) -> None:
    spec = patches_of_tables(root, 50, mpp=2.0, patients=["p1"])  # 200 level-0 pixels: centres at 100 and 300
    corners = list(zip(spec.x_px.tolist(), spec.y_px.tolist(), strict=True))
    assert corners == [(0, 0)], "of the four only the centre at 100, 100 is in a tile"
    at_level = patches_of_tables(root, 25, level=1, patients=["p1"])  # the tiles' own size
    assert sorted(zip(at_level.x_px.tolist(), at_level.y_px.tolist(), strict=True)) == TISSUE
    with pytest.raises(ValueError, match="i0: unsupported_format: no level 2, the last one is 1: set mpp"):
        patches_of_tables(root, 25, level=2)
    with pytest.raises(ValueError, match=r"i0: mpp_too_coarse: scanned at 0\.5"):
        patches_of_tables(root, 25, mpp=0.25)


def test_slides_that_can_not_be_read_at_the_spacing_are_left_out_on_request_and_counted(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = pa.table(read_columns(f"{root}/slides", SLIDES.names)[1]).to_pylist()
    for row in slides:
        if row["image_id"] == "i1":
            row |= {"mpp_x": None, "mpp_y": None}  # unknown
        if row["image_id"] == "i2":
            row |= {"mpp_x": 4.0, "mpp_y": 4.0}  # scanned too coarse
    write_deltalake(f"{root}/slides", rows(SLIDES, *slides), mode="overwrite")
    with pytest.raises(ValueError, match="i1: mpp_unknown"):
        patches_of_tables(root, 50, mpp=0.5)
    capsys.readouterr()
    spec = patches_of_tables(root, 50, mpp=0.5, on_bad_slide="skip")
    assert images(spec) == ["i0"] and spec.left_out.keys() == {"i1", "i2"}
    assert "slidelake: 2 slides left out: i1: mpp_unknown" in capsys.readouterr().err
    _, skipped = cut_units(replace(spec, slides=(replace(spec.slides[0], index=None),)), 16, None, "skip")
    assert {image: n for image, (n, _) in skipped.skipped.items()} == {
        "i0": 16,
        "i1": 0,
        "i2": 0,
    }  # i0.tif is not there
    assert "mpp_too_coarse" in skipped.skipped["i2"][1]
    level = patches_of_tables(root, 25, level=1, on_bad_slide="skip")
    assert images(level) == ["i0", "i1", "i2"] and not level.left_out  # no spacing is asked for
    with pytest.raises(ValueError, match="no patch of 25 px"):
        patches_of_tables(root, 25, level=2, on_bad_slide="skip")


def test_a_grid_holds_no_patch_that_leaves_the_slide_and_none_off_the_tissue() -> None:
    tiles = np.array([(0, 0), (300, 300)])
    corners = grid_on_tissue(tiles, 100, 390, 390, 60)
    assert corners.tolist() == [[0, 0], [60, 0], [0, 60], [60, 60], [300, 300]]
    assert (corners + 60 <= 390).all()
    assert grid_on_tissue(tiles, 100, 390, 390, 400).shape == (0, 2)


def test_tables_in_a_store_are_read_as_those_on_a_disk(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with moto() as s3:
        s3.upload(Path(root))
        remote = patches_of_tables(f"s3://{s3.bucket}", 50, storage_options=s3.storage_options())
        local = patches_of_tables(root, 50)
        assert remote.fingerprint == local.fingerprint
        assert remote.slides == local.slides, "indexes and URIs are the same, too"
        with pytest.raises(ValueError, match=r"no table patients in s3://"):
            patches_of_tables(f"s3://{s3.bucket}", 50, split="train", storage_options=s3.storage_options())
        with pytest.raises(FeedError, match=r"s3://.* has no version 7, it has versions 0 to 0"):
            patches_of_tables(f"s3://{s3.bucket}", 50, versions={"tiles": 7}, storage_options=s3.storage_options())

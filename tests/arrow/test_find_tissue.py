"""The slides pass on plain pandas frames: a row out for each row in, whatever is wrong with the slide."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tifffile
from numpy.typing import NDArray

from tests.slides.damage import BAD_SLIDES
from tests.slides.foreign import write_mirax
from tests.slides.make import write_slide
from tests.slides.oracle import background_fractions, kept_tiles
from udfs import failures
from udfs.find_tissue import TissueSpec, failed_row, find_tissue
from udfs.schemas import FOUND_TISSUE, SLIDES
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.tiff.index import SlideIndex
from udfs.wsi.tissue.brightness import Brightness

SPEC = TissueSpec(tile_px=448, mpp=None, mask_downsample=16, method=Brightness(), max_background=0.1)
Found = Callable[..., list[dict[str, Any]]]


def slide_row(path: Path | str | None, **columns: Any) -> dict[str, Any]:
    name = Path(path).stem if path else "nowhere"
    row: dict[str, Any] = {"image_id": name, "patient_id": "007", "center_id": "north", "image_num": 0, "label": None}
    row |= {"uri": str(path) if path else None, "mpp": None}
    return row | {"params_hash": "p", "file_version": "v", "size_bytes": 1} | columns


def find(rows: list[dict[str, Any]], spec: TissueSpec = SPEC) -> list[dict[str, Any]]:
    """What the UDF gives, held against the schema that Spark will hold it against."""
    frames = list(
        find_tissue(spec, "run")([pd.DataFrame(rows[:1]), pd.DataFrame(rows[1:])] if rows[1:] else [pd.DataFrame(rows)])
    )
    tables = []
    for frame in frames:
        assert list(frame.columns) == FOUND_TISSUE.names
        tables.append(pa.Table.from_pandas(frame, FOUND_TISSUE, preserve_index=False, safe=True))
    table = pa.concat_tables(tables)
    assert not any(table[field.name].null_count for field in FOUND_TISSUE if not field.nullable)
    result: list[dict[str, Any]] = table.to_pylist()
    assert [row["image_id"] for row in result] == [row["image_id"] for row in rows]
    return result


def pretend_attempt(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    context = SimpleNamespace(attemptNumber=lambda: number)
    monkeypatch.setattr(failures, "TaskContext", SimpleNamespace(get=lambda: context))


@pytest.mark.parametrize("name", ["a1", "a2", "b1", "c1", "d1"])
def test_tiles_are_those_of_the_oracle(small_slides: Path, name: str) -> None:
    path = small_slides / f"{name}.tif"
    pixels = tifffile.imread(path, key=0)
    [row] = find([slide_row(path)])
    corners = list(zip(row["x_px"], row["y_px"], strict=True))
    assert corners == [(int(x), int(y)) for x, y in kept_tiles(pixels)]
    fractions = background_fractions(pixels)
    close = 0.005 if name == "a1" else 1e-7  # a1 is averaged from its own lower level, of lossy JPEG
    assert row["background_fraction"] == pytest.approx([fractions[y // 448, x // 448] for x, y in corners], abs=close)
    assert (row["width_px"], row["height_px"]) == (pixels.shape[1], pixels.shape[0])
    assert (row["status"], row["n_tiles"]) == ("ok", len(corners))
    assert (row["level_read"], row["downsample"], row["error_code"]) == (0, 1.0, None)
    assert (row["patient_id"], row["params_hash"], row["run_id"]) == ("007", "p", "run")


def test_the_index_and_what_reading_cost_come_with_the_row(
    small_slides: Path, pixels: NDArray[Any], tmp_path: Path
) -> None:
    path = small_slides / "a1.tif"
    flat = write_slide(tmp_path / "flat.tif", pixels[:1856, :1408])
    flipped = BAD_SLIDES["flipped_tile_data"](flat, tmp_path, "bad")  # which the mask meets
    [good, bad, gone] = find([slide_row(path), slide_row(flipped), slide_row(tmp_path / "gone.tif")])
    index = SlideIndex.from_bytes(good["index"])
    assert index is not None
    assert (index.width_px, index.height_px, len(index.levels)) == (good["width_px"], good["height_px"], 3)
    assert index.file.size_bytes == good["size_bytes"] == path.stat().st_size
    assert good["work"]["requests"] >= 1 and 0 < good["work"]["bytes"] < good["size_bytes"]
    assert good["work"]["decoded_s"] > 0 and good["work"]["encoded_s"] == 0
    assert (gone["index"], gone["work"]) == (None, None)
    assert (bad["status"], bad["index"]) == ("failed", None) and bad["work"]["bytes"] > 0


def test_a_slide_that_openslide_reads_has_tiles_and_no_index(pixels: NDArray[Any], tmp_path: Path) -> None:
    same = pixels[1408:2944, 768:1792]
    foreign, tiff = find(
        [
            slide_row(write_mirax(tmp_path / "foreign.mrxs", same)),
            slide_row(write_slide(tmp_path / "tiff.tif", same, compression="deflate")),
        ],
        TissueSpec(448, None, 16, Brightness(), 0.5),
    )
    assert (foreign["status"], foreign["index"]) == ("ok", None)
    assert tiff["index"] is not None
    assert [foreign[name] for name in ("x_px", "y_px", "n_tiles")] == [
        tiff[name] for name in ("x_px", "y_px", "n_tiles")
    ]


def test_every_bad_slide_is_a_row_with_a_code_and_a_remedy(small_slides: Path, tmp_path: Path) -> None:
    good = small_slides / "a1.tif"
    rows = [slide_row(make(good, tmp_path, name)) for name, make in BAD_SLIDES.items()]
    found = {row["image_id"]: row for row in find([*rows, slide_row(good)])}
    for name, row in found.items():
        if name in ("no_tissue", "flipped_tile_data", "a1"):  # damage under tiles may show only when they are read
            continue
        assert row["status"] == "failed", name
        assert ErrorCode(row["error_code"]) is not ErrorCode.INTERNAL_ERROR, name
        assert len(row["error_message"]) > 20 and "\n" not in row["error_message"]
        assert row["n_tiles"] == 0 and row["x_px"] is None
    assert (found["no_tissue"]["status"], found["no_tissue"]["n_tiles"]) == ("no_tissue", 0)
    assert found["a1"]["status"] == "ok"


@pytest.mark.parametrize(("uri", "shown"), [(None, None), ("https://me:pw@host/x.svs?sig=a", "https://host/x.svs")])
def test_the_row_of_a_slide_that_was_not_found_has_the_error_and_no_secret(uri: str | None, shown: str | None) -> None:
    error = SlideError(ErrorCode.FILE_MISSING, "no file of that name")
    row = failed_row(slide_row(uri, image_id="x", file_version=None, size_bytes=None), error, "run")
    found = {name: value for name, value in row.items() if name in SLIDES.names and value is not None}
    assert found.pop("uri", None) == shown
    known = {
        "image_id": "x",
        "patient_id": "007",
        "center_id": "north",
        "image_num": 0,
        "params_hash": "p",
        "run_id": "run",
    }
    told = {"status": "failed", "n_tiles": 0, "error_code": "file_missing", "error_message": "no file of that name"}
    assert found == known | told


ALL = {"max_background": 1.0}


@pytest.mark.parametrize(
    ("width", "height", "settings", "status"),
    [
        (400, 400, {}, "too_small"),
        (447, 2000, {}, "too_small"),  # narrow in one direction only
        (2000, 447, {}, "too_small"),
        (448, 448, {}, "ok"),
        (9, 5, {}, "too_small"),  # smaller than a pixel of the mask
        (460, 9, ALL, "too_small"),
        (9, 5, ALL, "too_small"),
        (1, 1, {"tile_px": 16, "mask_downsample": 1}, "too_small"),
        (700, 700, {"mpp": 0.8}, "too_small"),  # a tile spans 716.8 px
        (717, 717, {"mpp": 0.8}, "ok"),
        (430, 430, {"mpp": 0.48}, "too_small"),  # a tile of a slide that is a little coarser spans 430.08 px
        (431, 431, {"mpp": 0.48}, "ok"),
    ],
)
def test_a_slide_on_which_no_tile_fits_has_a_status_of_its_own(
    tmp_path: Path, width: int, height: int, settings: dict[str, Any], status: str
) -> None:
    tissue = np.random.default_rng(0).integers(0, 150, (height, width, 3), np.uint8)
    path = write_slide(tmp_path / "slide.tif", tissue, compression="deflate")  # at 0.5 um/px
    spec = replace(SPEC, **settings)
    [row] = find([slide_row(path)], spec)
    assert (row["status"], row["error_code"], row["width_px"], row["height_px"]) == (status, None, width, height)
    assert (row["n_tiles"], len(row["x_px"])) == ((1, 1) if status == "ok" else (0, 0))
    if status == "too_small":
        span = spec.tile_px * (spec.mpp or 0.5) / 0.5
        assert f"{width} x {height} level-0 px" in row["error_message"]
        assert f"{span:g} x {span:g} level-0 px" in row["error_message"] and "tiling.tile_px" in row["error_message"]
    else:
        assert row["error_message"] is None
    has_mask = width >= spec.mask_downsample <= height
    assert row["tissue_fraction"] == (1.0 if has_mask else None)


def test_glass_smaller_than_a_tile_is_too_small_and_larger_glass_has_no_tissue(tmp_path: Path) -> None:
    rows = [
        slide_row(write_slide(tmp_path / f"{edge}.tif", np.full((edge, edge, 3), 240, np.uint8), compression="deflate"))
        for edge in (400, 500)
    ]
    small, large = find(rows)
    assert (small["status"], small["tissue_fraction"]) == ("too_small", 0.0)
    assert (large["status"], large["error_message"], large["tissue_fraction"]) == ("no_tissue", None, 0.0)


def test_a_small_slide_that_openslide_reads_is_too_small(pixels: NDArray[Any], tmp_path: Path) -> None:
    [row] = find([slide_row(write_mirax(tmp_path / "small.mrxs", pixels[1792:2048, 1024:1536]))])
    assert (row["status"], row["error_code"], row["n_tiles"]) == ("too_small", None, 0)
    assert "512 x 256 level-0 px" in row["error_message"] and row["tissue_fraction"] > 0.5


def test_an_error_nobody_foresaw_is_a_row_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str, options: Any, **how: Any) -> None:
        raise RuntimeError(f"refused {options['key']} at {uri}")

    monkeypatch.setattr("udfs.find_tissue.open_slide", broken)
    spec = TissueSpec(448, None, 16, Brightness(), 0.1, {"key": "topsecretkey"})
    [row] = find([slide_row("https://host/slide.svs?sig=abcdefgh")], spec)
    assert (row["status"], row["error_code"]) == ("failed", "internal_error")
    assert "RuntimeError: refused *** at " in row["error_message"]
    assert "topsecretkey" not in str(row) and "abcdefgh" not in str(row)


@pytest.mark.parametrize(("attempt", "code"), [(0, None), (1, None), (2, "worker_died"), (3, "worker_died")])
def test_a_slide_that_killed_its_worker_twice_is_given_up(
    small_slides: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, code: str | None
) -> None:
    pretend_attempt(monkeypatch, attempt)
    [row] = find([slide_row(small_slides / "c1.tif")])
    assert row["error_code"] == code
    assert row["status"] == ("failed" if code else "ok")


def test_at_a_target_mpp_tiles_span_more_of_the_slide(small_slides: Path) -> None:
    spec = TissueSpec(448, 0.8, 16, Brightness(), 1.0)
    [row] = find([slide_row(small_slides / "a1.tif")], spec)
    span = 448 * 0.8 / 0.5
    assert row["downsample"] == pytest.approx(1.6) and row["level_read"] == 0
    assert list(zip(row["x_px"], row["y_px"], strict=True)) == [(0, int(k * span)) for k in range(int(1856 // span))]


def test_the_mpp_of_the_csv_wins_over_the_header(small_slides: Path) -> None:
    spec = TissueSpec(448, 1.0, 16, Brightness(), 1.0)
    header, csv = find([slide_row(small_slides / "a1.tif"), slide_row(small_slides / "a1.tif", mpp=0.25)], spec)
    assert (header["mpp_x"], header["downsample"], header["level_read"]) == (pytest.approx(0.5), pytest.approx(2.0), 0)
    assert (csv["mpp_x"], csv["mpp_y"], csv["downsample"], csv["level_read"]) == (0.25, 0.25, 4.0, 1)


def test_an_unknown_mpp_fails_only_where_a_target_is_set(small_slides: Path) -> None:
    unknown = slide_row(small_slides / "c1.tif")
    [row] = find([unknown])
    assert (row["status"], row["mpp_x"]) == ("ok", None)
    [row] = find([unknown], TissueSpec(448, 0.5, 16, Brightness(), 0.1))
    assert (row["status"], row["error_code"]) == ("failed", "mpp_unknown")
    assert "mpp column" in row["error_message"]


def test_progress_counts_slides(small_slides: Path) -> None:
    counted: list[int] = []
    rows = pd.DataFrame([slide_row(small_slides / "c1.tif"), slide_row(small_slides / "gone.tif")])
    list(find_tissue(SPEC, "run", counted.append)([rows]))
    assert sum(counted) == 2

"""The slides pass: one row per image in, the same row with header, tissue and tile coordinates out (mapInPandas)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, cast

import pandas as pd

from udfs.failures import as_slide_error, check_quarantine
from udfs.schemas import FOUND_TISSUE
from udfs.spark_task import slot_cpus
from udfs.wsi import Slide, SlideError, open_slide
from udfs.wsi.quality.mask_metric import MaskedTiles, MaskMetric
from udfs.wsi.quality.tile_metrics.background_fraction import BackgroundFraction
from udfs.wsi.reading.foreign import ForeignSlide
from udfs.wsi.reading.spacing import mean_mpp, plan_reading
from udfs.wsi.store import StorageOptions, public_uri
from udfs.wsi.tissue.grid import tile_grid
from udfs.wsi.tissue.method import TissueMethod

VERSION = 2  # raise it when the same settings begin to give other rows: they are then redone
WITHOUT_TILES = ("no_tissue", "too_small")  # statuses of slides that were read and have no tile


@dataclass(frozen=True)
class TissueSpec:
    """The settings that shape tables slides and tiles."""

    tile_px: int
    mpp: float | None
    mask_downsample: int
    method: TissueMethod
    max_background: float
    storage_options: StorageOptions = field(default_factory=dict, repr=False)


def find_tissue(
    spec: TissueSpec, run_id: str, done: Callable[[int], None] = lambda _: None
) -> Callable[[Iterable[pd.DataFrame]], Iterable[pd.DataFrame]]:
    """Returns the mapInPandas function of the slides pass; each partition must hold one slide.

    Input columns: image_id, patient_id, center_id, image_num, label, uri (as it is opened), mpp (um/px or null), params_hash,
    file_version, size_bytes. Output: `udfs.schemas.FOUND_TISSUE`, one row per input row, whatever is wrong with the slide.
    `done` is called with numbers of finished slides.
    """

    def run(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            rows = [_row(spec, cast(dict[str, Any], record), run_id) for record in batch.to_dict("records")]
            cells = [[row.get(name) for name in FOUND_TISSUE.names] for row in rows]
            yield pd.DataFrame(cells, columns=FOUND_TISSUE.names, dtype=object)
            done(len(rows))

    return run


def failed_row(record: Mapping[str, Any], error: SlideError, run_id: str) -> dict[str, Any]:
    """Returns the row of table slides of an image that failed; `record` has the input columns of `find_tissue`."""
    uri = public_uri(record["uri"]) if record["uri"] else None
    failure = {"status": "failed", "n_tiles": 0, "error_code": error.code.value, "error_message": error.message}
    return {**record, "uri": uri, "run_id": run_id, **failure}


def _row(spec: TissueSpec, record: dict[str, Any], run_id: str) -> dict[str, Any]:
    record = {key: None if pd.isna(value) else value for key, value in record.items()}
    uri, cost = record["uri"], dict[str, Any]()
    try:
        check_quarantine(record["image_id"])
        with open_slide(uri, spec.storage_options, threads=slot_cpus()) as slide:
            begun, waited_s = perf_counter(), slide.traffic.waited_s
            try:
                found = _read_slide(spec, slide, record["mpp"])
            finally:
                decoded_s = perf_counter() - begun - (slide.traffic.waited_s - waited_s)
                work = asdict(slide.traffic) | {"decoded_s": decoded_s, "encoded_s": 0.0}
                cost = {"size_bytes": slide.file.size_bytes, "work": work}
    except Exception as error:
        return failed_row(record, as_slide_error(error, uri, spec.storage_options), run_id) | cost
    return {**record, "uri": public_uri(uri), "run_id": run_id, **found, **cost}


def _read_slide(spec: TissueSpec, slide: Slide | ForeignSlide, csv_mpp: float | None) -> dict[str, Any]:
    """The columns of the slide's row that follow from its header and from the slide at 1/mask_downsample."""
    mpp_x, mpp_y = csv_mpp or slide.mpp_x, csv_mpp or slide.mpp_y
    downsamples = [level.downsample for level in slide.levels]
    reading = plan_reading(downsamples, spec.tile_px, mean_mpp(mpp_x, mpp_y), spec.mpp)
    pixels = slide.downsampled(spec.mask_downsample)
    mask = spec.method.background(pixels)
    grid = tile_grid(slide.width_px, slide.height_px, reading.span_px)
    tiles = MaskedTiles(pixels, mask, grid, reading.span_px, spec.mask_downsample)
    measured = {metric.column: metric.measure(tiles) for metric in MaskMetric.defined()}
    keep = measured[BackgroundFraction.column] <= spec.max_background
    fits = len(grid) > 0
    too_small = (
        f"the slide is {slide.width_px} x {slide.height_px} level-0 px, smaller than a tile, which spans "
        f"{reading.span_px:g} x {reading.span_px:g} level-0 px: lower tiling.tile_px, or leave the slide out"
    )
    return {
        "vendor": slide.vendor,
        "width_px": slide.width_px,
        "height_px": slide.height_px,
        "mpp_x": mpp_x,
        "mpp_y": mpp_y,
        "level_downsamples": downsamples,
        "status": "ok" if keep.any() else "no_tissue" if fits else "too_small",
        "error_message": None if fits else too_small,
        "warnings": list(slide.warnings) or None,
        "n_tiles": int(keep.sum()),
        "tissue_fraction": float(1 - mask.mean()) if mask.size else None,
        "x_px": grid[keep, 0],
        "y_px": grid[keep, 1],
        **{column: values[keep] for column, values in measured.items()},
        "level_read": reading.level,
        "downsample": reading.downsample,
        "index": slide.index.to_bytes() if slide.index else None,
    }

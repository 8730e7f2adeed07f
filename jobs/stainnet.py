"""Fit a StainNet checkpoint to your own slides, so that all look like a reference slide. It needs tables slides and tiles."""

import argparse
import io
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from pyspark.sql import functions as F

from jobs.runtime.cohort.locating import locate
from jobs.runtime.cohort.patient_csv import Image as CohortImage
from jobs.runtime.run.cli import DONE
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.job_sections import StainnetSettings
from jobs.runtime.tables.tables import Tables
from udfs.wording import named
from udfs.wsi import SlideError, open_slide
from udfs.wsi.reading.spacing import region_edge, resample
from udfs.wsi.stain.fitting import Teacher, TeacherGap, Tiles, fit_stainnet, split_tiles, teacher_gaps
from udfs.wsi.stain.stain_network import StainNet
from udfs.wsi.store import public_uri, write_bytes

JOB = Job("stainnet", reads=("slides", "tiles"))
_SLIDES_AT_ONCE = 4
_PICTURE_ROWS, _PICTURE_PX, _CAPTION_PX, _GAP_PX = 6, 224, 18, 4


def fit_to_reference(run: Run, arguments: argparse.Namespace) -> int:
    """Draws tiles, fits, reports, writes checkpoint and picture."""
    del arguments
    config, settings = run.config, run.config.stainnet
    if not settings.reference or not settings.checkpoint:
        raise ConfigError("stainnet.reference (an image_id) and stainnet.checkpoint (a path to write) are required")
    with run.progress.stage("sample"):
        drawn = draw_tiles(run.tables, settings, run.images)
        tiles = _read_sample(config, run.images, drawn)
        centers = dict(zip(drawn["image_id"], drawn["center_id"], strict=True))
    if settings.reference not in tiles:
        raise ConfigError(
            f"stainnet.reference = {named(settings.reference)} has no tiles in {public_uri(config.output.root)}/tiles: choose "
            f"one of {', '.join(sorted(tiles)[:5])}, or run the slides job first"
        )
    with run.progress.stage("fit"):
        torch.set_num_threads(1)
        teacher = Teacher(tiles, centers, settings.reference, config.tissue_method)
        seen, held_out = split_tiles(tiles)
        net = fit_stainnet(seen, teacher, settings.steps, settings.seed)
        gaps = teacher_gaps(net, held_out, teacher)
    picture = re.sub(r"\.(pth?|ckpt|bin)$", "", settings.checkpoint) + ".png"
    checkpoint = io.BytesIO()
    torch.save(net.state_dict(), checkpoint)
    write_bytes(settings.checkpoint, checkpoint.getvalue(), config.slides.storage_options)
    write_bytes(picture, _before_and_after(net, held_out, teacher), config.slides.storage_options)
    run.record.counts["tiles_sampled"] = sum(len(pixels) for pixels in tiles.values())
    place, n_bytes = public_uri(settings.checkpoint), len(checkpoint.getvalue())
    print(
        f"\nslidelake stainnet, run {run.record.run_id}",
        *_gap_lines(gaps),
        f"  checkpoint  {place}, {n_bytes:,} bytes, weights {net.fingerprint[:12]}",
        f"  picture     {public_uri(picture)}",
        f"  use it      stain.weights={place}",
        sep="\n",
    )
    return DONE


def draw_tiles(tables: Tables, settings: StainnetSettings, images: Sequence[CohortImage]) -> pd.DataFrame:
    """Returns a sample of the rows of tiles: the same rows for the same seed.

    The sample is spread evenly over the reference and other good slides of the cohort. It has at least two tiles per slide.
    """
    root = public_uri(tables.root)
    if not all(map(tables.exists, JOB.reads)):
        raise ConfigError(f"no tables in {root}: run the slides job first")
    cohort = tables.spark.createDataFrame([(image.image_id,) for image in images], "image_id string")
    good = tables.read("slides").where("status = 'ok'").join(cohort, "image_id").select("image_id", "center_id")
    others_last = (F.col("image_id") != settings.reference).cast("int")
    by_chance = F.xxhash64(F.lit(settings.seed), "image_id")
    chosen = good.orderBy(others_last, by_chance, "image_id").limit(max(1, settings.tiles // 2)).collect()
    if not chosen:
        raise ConfigError(f"no slide of the cohort has tissue in {root}/slides: run the slides job first")
    draw = F.xxhash64(F.lit(settings.seed), "image_id", "x_px", "y_px")
    slides = F.broadcast(tables.spark.createDataFrame(chosen, "image_id string, center_id string"))
    tiles = tables.read("tiles").join(slides, "image_id").withColumn("draw", draw)
    place = F.expr("row_number() OVER (PARTITION BY image_id ORDER BY draw, x_px, y_px)")
    quota = max(2, -(-settings.tiles // len(chosen)))
    return tiles.withColumn("place", place).where(F.col("place") <= quota).orderBy("image_id", "place").toPandas()


def _read_sample(config: Config, images: Sequence[CohortImage], drawn: pd.DataFrame) -> dict[str, Tiles]:
    """Returns the pixels of the drawn tiles by image_id, in the order drawn."""
    sampled = set(drawn["image_id"])
    located = locate([image for image in images if image.image_id in sampled], config)

    def read(item: tuple[Any, pd.DataFrame]) -> tuple[str, Tiles]:
        image_id, rows = str(item[0]), item[1]
        uri = located[image_id].uri
        if uri is None:
            raise ConfigError(f"{image_id} is in table slides, but its file is missing: run the slides job again")
        first = rows.iloc[0]
        try:
            with open_slide(uri, config.slides.storage_options) as slide:
                level = int(first["level_read"])
                region_px = region_edge(int(first["tile_px"]) * first["downsample"], slide.levels[level].downsample)
                pixels = dict(slide.read_tiles(rows[["x_px", "y_px"]].to_numpy(), region_px, level))
        except SlideError as error:
            raise ConfigError(f"{image_id} cannot be sampled: {error}; leave it out of the CSV, or repair it") from None
        return image_id, np.stack([resample(pixels[i], int(first["tile_px"])) for i in range(len(rows))])

    with ThreadPoolExecutor(_SLIDES_AT_ONCE) as pool:
        return dict(pool.map(read, drawn.groupby("image_id")))


def _before_and_after(net: StainNet, tiles: dict[str, Tiles], teacher: Teacher) -> bytes:
    """Returns a PNG with one row per slide: a tile as scanned, by the teacher and by StainNet."""
    rows = [(name, pixels[0]) for name, pixels in sorted(tiles.items()) if len(pixels)][:_PICTURE_ROWS]
    edge, pad = _PICTURE_PX, _CAPTION_PX
    sheet = Image.new("RGB", (3 * edge + 2 * _GAP_PX, len(rows) * (edge + pad)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, (name, tile) in enumerate(rows):
        top = row * (edge + pad)
        images = {
            f"{name}, as scanned": tile,
            "Reinhard": teacher.normalise(name, tile),
            "StainNet": net.normalise(tile),
        }
        for column, (caption, image) in enumerate(images.items()):
            draw.text((column * (edge + _GAP_PX) + 2, top + 1), caption[:32], fill="black", font=font)
            sheet.paste(Image.fromarray(resample(image, edge)), (column * (edge + _GAP_PX), top + pad))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _gap_lines(gaps: Sequence[TeacherGap]) -> list[str]:
    lines = [
        "  mean absolute difference from the teacher on held-out tiles, grey levels of 255",
        f"  {'slide':<28} {'tiles':>5} {'as scanned':>11} {'StainNet':>9}",
    ]
    lines += [f"  {gap.image_id:<28} {gap.tiles:>5} {gap.untouched:>11.2f} {gap.student:>9.2f}" for gap in gaps]
    n = sum(gap.tiles for gap in gaps)
    if n:
        untouched, student = (sum(getattr(g, name) * g.tiles for g in gaps) / n for name in ("untouched", "student"))
        lines.append(f"  {'all':<28} {n:>5} {untouched:>11.2f} {student:>9.2f}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return run_main(JOB, fit_to_reference, argv)


if __name__ == "__main__":
    sys.exit(main())

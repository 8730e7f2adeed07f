"""The demo cohort: `python -m tests.slides.demo DEST` writes slides, patients.csv, new.csv and encoder weights into DEST.

Seven patients of two centres, every pixel from the public sample slide. One slide has no tissue and one is cut
half-way, as in every real cohort. new.csv has two patients without labels to predict: slides of the seven under other
names, one of them the slide without tissue. What is there already is left alone.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tests.slides.atomic import whole_file
from tests.slides.damage import truncated
from tests.slides.make import Pixels, stain_shift, write_mosaic, write_slide
from tests.slides.sample import SAMPLE_FOLDER, SAMPLE_MPP, SampleError, fetch_sample, real_pixels

WEIGHTS_NAME = "tf_efficientnet_lite0.safetensors"
_COLUMNS = ("image_id", "center_id", "patient_id", "image_num", "label", "mpp")
_NEW_COLUMNS = ("image_id", "center_id", "patient_id", "image_num", "uri")

Maker = Callable[[Path, Pixels], object]
"""(path to write, pixels of the sample uint8 [2967, 2220, 3]) -> nothing of interest."""


@dataclass(frozen=True)
class DemoSlide:
    """One row of patients.csv, and how its slide is made. mpp (um/px) stands in the CSV only where the header lacks it."""

    name: str
    patient_id: str
    center_id: str
    label: str
    image_num: int
    make: Maker
    mpp: float | None = None


def _sample(path: Path, pixels: Pixels) -> None:
    path.write_bytes(fetch_sample(SAMPLE_FOLDER).read_bytes())


def _pyramid(path: Path, pixels: Pixels) -> None:
    write_mosaic(path, pixels[1408:2944, 768:2048], width=8192, height=8448, mpp=SAMPLE_MPP)


def _flat(path: Path, pixels: Pixels) -> None:
    region = stain_shift(pixels[1152:2944, 768:2048])[::-1]
    write_mosaic(path, region, width=8448, height=8064, pyramid=False, mpp=SAMPLE_MPP)


def _lzw_strips(path: Path, pixels: Pixels) -> None:
    write_slide(path, pixels[1536:2944, 352:1760], tile_px=None, compression="lzw", mpp=None)


def _deflate_tiles(path: Path, pixels: Pixels) -> None:
    write_slide(path, pixels[672:2528, 448:1856][:, ::-1], compression="deflate", predictor=True, mpp=SAMPLE_MPP)


def _glass(path: Path, pixels: Pixels) -> None:
    corner = pixels[128:960, 64:704]
    glass = np.concatenate([corner, corner[:, ::-1]], axis=1)
    write_slide(path, np.concatenate([glass, glass[::-1]], axis=0), pyramid=True, mpp=SAMPLE_MPP)


def _transparent_border(path: Path, pixels: Pixels) -> None:
    tissue = stain_shift(pixels[1536:2944, 800:1760])
    # Scanners leave what they did not scan transparent, and black beneath: read without alpha it looks like tissue.
    image = np.zeros((448 + tissue.shape[0] + 200, 448 + tissue.shape[1] + 200, 4), np.uint8)
    image[448:-200, 448:-200] = np.dstack([tissue, np.full(tissue.shape[:2], 255, np.uint8)])
    write_slide(path, image, compression="lzw", predictor=True, pyramid=True, mpp=SAMPLE_MPP)


def _cut_half_way(path: Path, pixels: Pixels) -> None:
    good = path.with_name(f"{path.name}.whole")
    try:
        write_slide(good, stain_shift(pixels[1152:2944, 448:1856]), pyramid=True, mpp=SAMPLE_MPP)
        truncated(good, path.parent, good.stem + ".cut").replace(path)
    finally:
        good.unlink(missing_ok=True)


def _subifds(path: Path, pixels: Pixels) -> None:
    tissue = stain_shift(np.rot90(pixels[1536:2944, 704:1760]), haematoxylin=1.2, eosin=0.75, tint=(0.98, 0.985, 0.96))
    write_slide(path, tissue, pyramid=True, subifds=True, subsampling=(1, 1), mpp=SAMPLE_MPP)


def _jpeg2000(path: Path, pixels: Pixels) -> None:
    tissue = stain_shift(pixels[1536:2944, 800:1760][:, ::-1], haematoxylin=1.1, eosin=0.9, tint=(0.99, 0.99, 0.98))
    write_slide(path, tissue, compression="jpeg2000", pyramid=True, mpp=SAMPLE_MPP)


COHORT = (
    DemoSlide("CMU-1-Small-Region.svs", "001", "north", "CE", 0, _sample),
    DemoSlide("002_0.tif", "002", "north", "LAA", 0, _pyramid),
    DemoSlide("003_0.tif", "003", "south", "CE", 0, _flat),
    DemoSlide("004_0.tif", "004", "north", "CE", 0, _lzw_strips, mpp=SAMPLE_MPP),
    DemoSlide("004_1.tif", "004", "north", "CE", 1, _deflate_tiles),
    DemoSlide("004_2.tif", "004", "north", "CE", 2, _glass),
    DemoSlide("005_0.tif", "005", "south", "LAA", 0, _transparent_border),
    DemoSlide("005_1.tif", "005", "south", "LAA", 1, _cut_half_way),
    DemoSlide("006_0.tif", "006", "south", "CE", 0, _subifds),
    DemoSlide("007_0.tif", "007", "north", "LAA", 0, _jpeg2000),
)

NEW = {"101": "006_0.tif", "102": "004_2.tif"}
"""The slide of each patient of new.csv. Their ids are new, so that no label of the seven is emptied."""


def build_demo(folder: Path) -> Path:
    """Write what is not there yet of the demo cohort into `folder`, and return it.

    folder/slides/*, folder/patients.csv, folder/new.csv, folder/weights/tf_efficientnet_lite0.safetensors. Each file
    appears whole or not at all. Raises SampleError where the sample cannot be fetched.
    """
    slides = [slide for slide in COHORT if not (folder / "slides" / slide.name).exists()]
    weights = folder / "weights" / WEIGHTS_NAME
    steps: list[tuple[str, Callable[[], object]]] = []
    if slides:
        pixels = real_pixels(fetch_sample(SAMPLE_FOLDER))
        steps += [(slide.name, partial(_make, slide, folder / "slides", pixels)) for slide in slides]
    if not weights.exists():
        steps.append((weights.name, partial(convert_lite0_weights, weights)))
    if steps:
        bar = tqdm(steps, desc="demo cohort", unit="file", disable=None)
        for name, step in bar:
            bar.set_postfix_str(name)
            step()
    _write_csvs(folder)
    return folder


def convert_lite0_weights(path: Path) -> Path:
    """Write the demo's encoder weights: `tests.slides.weights`, imported late because torch takes seconds to import."""
    from tests.slides import weights  # noqa: PLC0415

    return weights.convert_lite0_weights(path)


def main(arguments: list[str] | None = None) -> int:
    """Build the cohort; 0 when it is there, 1 with one line on stderr when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tests.slides.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DEST", help="folder for the cohort, e.g. data/demo")
    folder: Path = parser.parse_args(arguments).folder
    try:
        build_demo(folder)
    except (SampleError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum((folder / "slides" / slide.name).stat().st_size for slide in COHORT)
    patients = len({slide.patient_id for slide in COHORT})
    print(f"{folder}: {len(COHORT)} slides of {patients} patients, {size / 1e6:.0f} MB", file=sys.stderr)
    return 0


def _make(slide: DemoSlide, folder: Path, pixels: Pixels) -> None:
    with whole_file(folder / slide.name) as temporary:
        slide.make(temporary, pixels)


def _write_csvs(folder: Path) -> None:
    rows = [(Path(s.name).stem, s.center_id, s.patient_id, s.image_num, s.label, s.mpp or "") for s in COHORT]
    _write_csv(folder / "patients.csv", _COLUMNS, rows)
    new = [(f"{patient}_0", "north", patient, 0, folder / "slides" / slide) for patient, slide in NEW.items()]
    _write_csv(folder / "new.csv", _NEW_COLUMNS, new)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    if not path.exists() or path.read_text() != text.getvalue():
        with whole_file(path) as temporary:
            temporary.write_text(text.getvalue())


if __name__ == "__main__":
    sys.exit(main())

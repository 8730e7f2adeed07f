"""The main job on the small cohort: each table held against readers, models and group-bys that had no part in it."""

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import safetensors.torch
import tifffile
import timm
import timm.data
import torch
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.classic.dataframe import DataFrame as ClassicDataFrame

from jobs.features import in_tasks
from jobs.runtime.settings.config import Config
from jobs.runtime.tables.tables import spark_schema
from tests.conftest import preprocess_in
from tests.slides.make import write_mosaic
from tests.slides.oracle import kept_tiles
from tests.spark.conftest import COHORT, Again, Finished, by, rows_of
from udfs.schemas import UNITS

OPENSLIDE_CAN_READ = ("a1", "c1")  # the tiled JPEG ones
MISSING = {"gone", "e1"}
Key = tuple[str, int, int]


def key_of(row: dict[str, Any]) -> Key:
    return row["image_id"], row["x_px"], row["y_px"]


def test_every_row_of_the_csv_is_one_row_of_slides(finished: Finished) -> None:
    slides = by(rows_of(finished.config, "slides"), "image_id")
    columns = ("image_id", "center_id", "patient_id", "image_num", "label")
    assert sorted((tuple(row[name] for name in columns) for row in slides.values()), key=str) == sorted(COHORT, key=str)
    assert {name for name, row in slides.items() if row["status"] == "failed"} == MISSING
    assert all(slides[name]["error_code"] == "file_missing" and slides[name]["n_tiles"] == 0 for name in MISSING)
    assert all(row["run_id"] == finished.run.record.run_id and row["params_hash"] for row in slides.values())


def test_tiles_are_those_of_the_oracle_and_features_has_just_these(finished: Finished) -> None:
    tiles = [key_of(row) for row in rows_of(finished.config, "tiles")]
    expected = [
        (path.stem, int(x), int(y))
        for path in finished.slides.glob("*.tif")
        for x, y in kept_tiles(tifffile.imread(path, key=0), max_background=0.5)
    ]
    assert sorted(tiles) == sorted(expected) and len(tiles) > 15
    assert [key_of(row) for row in rows_of(finished.config, "features")] == tiles
    counted = Counter(image_id for image_id, _, _ in tiles)
    assert {row["image_id"]: row["n_tiles"] for row in rows_of(finished.config, "slides") if row["n_tiles"]} == counted


def test_patients_are_a_group_by_of_features_to_the_byte(finished: Finished) -> None:
    features = sorted(rows_of(finished.config, "features"), key=lambda row: (row["image_id"], row["y_px"], row["x_px"]))
    patients = by(rows_of(finished.config, "patients"), "patient_id")
    assert set(patients) == {"001", "002", "003", "004", "007", "009"}
    for patient_id, patient in patients.items():
        rows = [row for row in features if row["patient_id"] == patient_id]
        for name in ("", "_max"):
            matrix = np.array([row[f"embedding{name}"] for row in rows], "<f4")
            assert patient[f"embeddings{name}"] == matrix.tobytes()
        assert (patient["n_tiles"], patient["embedding_dim"]) == (len(rows), 256)
        assert [key_of(place) for place in patient["tile_index"]] == [key_of(row) for row in rows]
        fractions = np.zeros((len(rows), 4096))
        for i, row in enumerate(rows):
            fractions[i, row["color_histogram"]["bin"]] = np.array(row["color_histogram"]["count"]) / 448**2
        assert patient["color_histogram"] == pytest.approx(fractions.mean(axis=0), abs=1e-7)
        assert math.isclose(sum(patient["color_histogram"]), 1, abs_tol=1e-5)
        images = [row for row in COHORT if row[2] == patient_id]
        failed = sum(row[0] in MISSING for row in images)
        assert (patient["n_images"], patient["n_images_failed"]) == (len(images), failed)
        assert patient["complete"] is (failed == 0)
        assert (patient["center_id"], patient["label"]) == (images[0][1], images[0][4])


def pixels_of(path: Path, x_px: int, y_px: int) -> NDArray[np.uint8]:
    if path.stem in OPENSLIDE_CAN_READ:
        with openslide.OpenSlide(str(path)) as slide:
            return np.asarray(slide.read_region((x_px, y_px), 0, (448, 448)))[..., :3]
    pixels: NDArray[np.uint8] = tifffile.imread(path, key=0)[y_px : y_px + 448, x_px : x_px + 448]
    return pixels


def test_embeddings_are_those_of_timm_run_by_hand_on_another_readers_pixels(
    finished: Finished, encoder_weights: Path
) -> None:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, global_pool="").eval()
    model.load_state_dict(safetensors.torch.load_file(encoder_weights))
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    for row in rows_of(finished.config, "features"):
        tile = pixels_of(finished.slides / f"{row['image_id']}.tif", row["x_px"], row["y_px"])
        x = torch.from_numpy(tile.copy()).permute(2, 0, 1)[None].float()
        x = torch.nn.functional.interpolate(x, size=(96, 96), mode="area") / 255
        with torch.inference_mode():
            features = model((x - mean) / std)[0].double()
        for name, wanted in (("embedding", features.mean((1, 2))), ("embedding_max", features.amax((1, 2)))):
            got = torch.tensor(row[name], dtype=torch.float64)
            assert torch.nn.functional.cosine_similarity(got, wanted, dim=0) >= 0.99999


def fix_partitions(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = ClassicDataFrame.repartitionByRange

    def fixed(self: Any, _: int, *columns: str) -> DataFrame:
        return original(self, number, *columns)

    monkeypatch.setattr(ClassicDataFrame, "repartitionByRange", fixed)


@pytest.mark.parametrize(("partitions", "wave_slides"), [(1, 100), (2, 2), (5, 3)])
def test_the_bytes_are_the_same_however_the_work_is_cut(
    spark: SparkSession,
    finished: Finished,
    again: Again,
    monkeypatch: pytest.MonkeyPatch,
    partitions: int,
    wave_slides: int,
) -> None:
    config = again(run={"unit_tiles": 3, "wave_slides": wave_slides}, rows=COHORT[:5])
    for name in ("features", "patients"):
        shutil.rmtree(f"{config.output.root}/{name}")
    fix_partitions(monkeypatch, partitions)
    run = preprocess_in(spark, config)
    assert run.record.counts["slides_processed"] == 0
    before = by(rows_of(finished.config, "patients"), "patient_id")
    after = by(rows_of(config, "patients"), "patient_id")
    assert set(after) == {"001", "002", "003", "004"}
    for patient_id, patient in after.items():
        for name in ("embeddings", "embeddings_max", "color_histogram", "tile_index"):
            assert patient[name] == before[patient_id][name]


def test_one_slide_with_half_of_all_tiles_is_spread_over_tasks(
    spark: SparkSession,
    pixels: NDArray[Any],
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "slides"
    root.mkdir()
    write_mosaic(root / "big.tif", pixels[:1024, :1024], width=448 * 8, height=448 * 5)
    for name in "abcde":
        write_mosaic(root / f"{name}.tif", pixels[:1024, :1024], width=448 * 4, height=448 * 2)
    rows = [(name, "north", name, 0, None) for name in ("big", *"abcde")]
    config = small_config(rows, root=root, tiling={"max_background": 1.0}, run={"unit_tiles": 4})
    seen: list[Any] = []
    original = ClassicDataFrame.mapInArrow

    def spy(self: Any, *arguments: Any, **options: Any) -> DataFrame:
        if "unit" in self.columns:
            task = F.spark_partition_id().alias("task")
            seen.extend(self.select(task, "image_id", F.size("x_px").alias("tiles")).collect())
        return original(self, *arguments, **options)

    monkeypatch.setattr(ClassicDataFrame, "mapInArrow", spy)
    assert spark.conf.get("spark.sql.adaptive.enabled") == "true"
    run = preprocess_in(spark, config)
    assert run.record.counts["tiles_encoded"] == 80
    assert all(row.tiles == 4 for row in seen)
    assert (
        sorted(Counter(row.task for row in seen).values()) == [1] * 20
    )  # 20 units, 20 tasks, 10 of them on the big one
    assert Counter(row.image_id for row in seen)["big"] == 10


def test_units_of_a_task_are_alone_in_a_partition_in_order_and_the_costliest_task_is_the_first(
    spark: SparkSession,
) -> None:
    random = np.random.default_rng(5)
    names = [name for name in UNITS.names if name not in ("image_id", "unit", "patient_id", "cost")]
    rows = [
        {"image_id": image_id, "unit": unit, "patient_id": "007", "cost": float(random.uniform(1, 9))}
        for image_id in "abc"
        for unit in range(80)
    ]
    random.shuffle(rows)  # type: ignore[arg-type]
    frame = spark.createDataFrame([row | dict.fromkeys(names) for row in rows], spark_schema(UNITS))
    assert spark.conf.get("spark.sql.adaptive.enabled") == "true"
    placed = in_tasks(frame, frame.collect(), at_once=spark.sparkContext.defaultParallelism)
    found = placed.select(F.spark_partition_id().alias("task"), "image_id", "unit", "cost").collect()
    assert sorted((row.image_id, row.unit) for row in found) == [(name, unit) for name in "abc" for unit in range(80)]
    tasks = [[row for row in found if row.task == task] for task in range(placed.rdd.getNumPartitions())]
    assert all(len({row.image_id for row in task}) == 1 for task in tasks)
    assert all([row.unit for row in task] == list(range(task[0].unit, task[-1].unit + 1)) for task in tasks)
    assert max(len(task) for task in tasks) > 1
    costs = [sum(row.cost for row in task) for task in tasks]
    assert costs == pytest.approx(sorted(costs, reverse=True))

"""What tests share: one Spark session, a small encoder with fixed weights, a small cohort of real pixels."""

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from jobs import preprocess
from jobs.runtime.run.run import Run
from jobs.runtime.run.waves import work_in_waves
from jobs.runtime.settings.config import Config
from jobs.runtime.spark.session import start_session
from tests.environments import environment_without_checkout
from tests.slides.make import write_slide
from tests.slides.sample import SAMPLE_FOLDER, fetch_sample, real_pixels

TILE_PX = 448
Rows = list[Mapping[str, Any]]


class _Stack(ctypes.Structure):
    """POSIX's stack_t."""

    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


@pytest.fixture(autouse=True)
def _stack_for_signals() -> None:
    """Let signals use the ordinary stack: OpenVINO leaves a freed one for them, and the next signal would crash pytest."""
    ss_disable = 2
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, ss_disable, 0)), None)


@pytest.fixture(autouse=True)
def _logging_of_slidelake() -> Iterator[None]:
    """Let no entry point's handler outlive its test."""
    yield
    for name in ("slidelake", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What hosts keep for all their processes: a folder of this test run's own, for jobs in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDELAKE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def sample() -> Path:
    """CMU-1-Small-Region.svs."""
    return fetch_sample(SAMPLE_FOLDER)


@pytest.fixture(scope="session")
def pixels(sample: Path) -> NDArray[Any]:
    """Its pixels, uint8 [2967, 2220, 3]."""
    return real_pixels(sample)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The session of the whole test run; jobs that are run in subprocesses have their own."""
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # A long session: here the JVM's slower compiler pays, which conf/spark/local.conf leaves out for single jobs.
    os.environ["PYSPARK_SUBMIT_ARGS"] = (
        "--driver-memory 3g --conf spark.driver.extraJavaOptions=-XX:+TieredCompilation pyspark-shell"
    )
    session = start_session("slidelake tests")
    del os.environ["PYSPARK_SUBMIT_ARGS"]
    session.conf.set("spark.sql.shuffle.partitions", "2")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def encoder_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights of timm's smallest EfficientNet (256 features), so that tests encode hundreds of tiles a second."""
    torch.manual_seed(7)
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, global_pool="")
    path = tmp_path_factory.mktemp("weights") / "test_efficientnet.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small_slides(pixels: NDArray[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small good slides of several kinds, tissue in each; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("slides")
    tissue = pixels[:1856, :1408]
    write_slide(folder / "a1.tif", tissue, compression="jpeg", pyramid=True)
    write_slide(folder / "a2.tif", tissue[::-1], compression="deflate", predictor=True)
    write_slide(folder / "b1.tif", tissue[:, ::-1], compression="lzw", tile_px=None)
    write_slide(folder / "c1.tif", pixels[2 * TILE_PX : 4 * TILE_PX, : 3 * TILE_PX], compression="jpeg", mpp=None)
    write_slide(folder / "d1.tif", tissue[::-1, ::-1], compression="none", tile_px=None)
    return folder


@pytest.fixture(scope="session")
def node_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has all packages but slidelake."""
    return environment_without_checkout(tmp_path_factory.mktemp("node") / "environment")


SMALL_COHORT = [
    # image_id, center_id, patient_id, image_num, label
    ("a1", "north", "001", 0, "CE"),
    ("a2", "north", "001", 1, "CE"),
    ("b1", "south", "002", 0, "LAA"),
    ("c1", "south", "003", 0, "CE"),
    ("d1", "north", "004", 0, "LAA"),
]


def write_csv(
    path: Path, rows: list[tuple[Any, ...]], header: str = "image_id,center_id,patient_id,image_num,label"
) -> Path:
    """A patient CSV."""
    lines = [header, *(",".join("" if cell is None else str(cell) for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def config_in(
    folder: Path, root: Path, encoder_weights: Path, rows: list[tuple[Any, ...]] | None = None, /, **sections: Any
) -> Config:
    """Settings for a CSV of these rows (the small cohort's where None) and tables, both in `folder`; see `small_config`.

    ``encoder={...}`` overrides settings of the one encoder.
    """
    csv = write_csv(folder / "patients.csv", SMALL_COHORT if rows is None else rows)
    settings: dict[str, Any] = {
        "patients": str(csv),
        "slides": {"root": str(root)},
        "output": {"root": str(folder / "tables")},
        "encoders": {"test_efficientnet": {"weights": str(encoder_weights), "input_px": 96}},
        "inference": {"device": "cpu"},
    }
    encoder = {"test_efficientnet": settings["encoders"]["test_efficientnet"] | sections.pop("encoder", {})}
    for name, section in ({"encoders": encoder} | sections).items():
        settings[name] = {**settings.get(name, {}), **section} if isinstance(section, dict) else section
    return Config.model_validate(settings)


@pytest.fixture
def small_config(tmp_path: Path, small_slides: Path, encoder_weights: Path) -> Callable[..., Config]:
    """Make settings for the small cohort, in a folder of the test's own; sections given override, for example
    ``small_config(tiling={"max_background": 0.3}, run={"wave_slides": 2})``.
    """

    def make(rows: list[tuple[Any, ...]] | None = None, *, root: Path | None = None, **sections: Any) -> Config:
        return config_in(tmp_path, root or small_slides, encoder_weights, rows, **sections)

    return make


def preprocess_in(spark: SparkSession, config: Config, *, retry_failed: bool = False) -> Run:
    """The main job in the shared session."""
    run = Run(config, spark, preprocess.JOB)
    work_in_waves(run, retry_failed=retry_failed)
    return run


def table_rows(spark: SparkSession, config: Config, name: str) -> Rows:
    """All rows of a table as plain dicts, ordered by its keys, without run_id, which differs from run to run."""
    rows = spark.read.format("delta").load(f"{config.output.root}/{name}").drop("run_id").toPandas()
    keys = [key for key in ("patient_id", "image_id", "encoder", "y_px", "x_px") if key in rows.columns]
    ordered = rows.sort_values(keys).astype(object)
    return [dict(zip(ordered.columns, row, strict=True)) for row in ordered.itertuples(index=False, name=None)]

"""The main job on slides in Azure's store: the same tables as from a disk, also where the store fails now and then."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import Config
from tests.conftest import config_in, preprocess_in, table_rows
from tests.stores.azurite import Azurite, azurite
from tests.stores.faulty import KINDS, faulty

OF_THE_PLACE = ("uri", "file_version", "params_hash")  # what differs with where and when a slide was stored
TABLES = ("slides", "tiles", "features", "patients")


@pytest.fixture(scope="module")
def store(small_slides: Path) -> Iterator[Azurite]:
    with azurite() as running:
        running.upload(small_slides, "slides")
        yield running


def contents(spark: SparkSession, config: Config) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {key: value for key, value in row.items() if key not in OF_THE_PLACE}
            for row in table_rows(spark, config, name)
        ]
        for name in TABLES
    }


@pytest.fixture(scope="module")
def local(
    spark: SparkSession, small_slides: Path, encoder_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    config = config_in(tmp_path_factory.mktemp("local"), small_slides, encoder_weights)
    preprocess_in(spark, config)
    return contents(spark, config)


def assert_same(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> None:
    for name in TABLES:
        assert len(found[name]) == len(expected[name]) > 0
        for row, other in zip(found[name], expected[name], strict=True):
            assert {key: str(value) for key, value in row.items()} == {key: str(value) for key, value in other.items()}


@pytest.mark.parametrize("share", [0.0, 0.05], ids=["healthy", "5 % of reads fail"])
def test_the_tables_are_those_of_a_local_run(
    spark: SparkSession,
    small_config: Callable[..., Config],
    store: Azurite,
    local: dict[str, list[dict[str, Any]]],
    share: float,
) -> None:
    with faulty(store.url, share=share, seed=11, stall_s=2.0, kinds=KINDS) as proxy:
        options = store.storage_options(proxy.url)
        config = small_config(slides={"root": "az://slides", "storage_options": options})
        run = preprocess_in(spark, config)
        injected = proxy.injected()
    assert_same(contents(spark, config), local)
    images = {row["image_id"] for row in local["slides"]}
    assert set(run.record.reads) == {(image, stage) for image in images for stage in ("slides", "features")}
    for size, traffic in run.record.reads.values():
        assert traffic.requests > 0
        assert traffic.waited_s > 0
        assert 0 < traffic.bytes < 3 * size  # small files: a header's read-ahead is most of them
    assert injected["reads"] > 0
    assert (sum(injected[kind] for kind in KINDS) > 0) == (share > 0)
    secret = options["connection_string"].split("AccountKey=")[1].split(";")[0]
    for name in (*TABLES, "indexes"):
        assert secret not in str(table_rows(spark, config, name))

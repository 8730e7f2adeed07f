"""Tables in Azure's and in Amazon's store: the same bags as from a disk, by copies in a folder of bounded size."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from deltalake import DeltaTable
from torch.utils.data import DataLoader

from jobs.training.feed import FeedDataset, delivery, make_feed
from jobs.training.refusals import FeedError
from tests.feed.tables import Made, cohort, write
from tests.stores.azurite import azurite
from tests.stores.moto import moto
from udfs.wsi.reading import staging


@dataclass(frozen=True)
class Store:
    uri: str  # of a folder in which the tables are
    options: dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table long of 11 versions, a checkpoint among them; table gone, vacuumed."""
    folder = tmp_path_factory.mktemp("stores")
    write(folder / "long", cohort(44), files=11)
    DeltaTable(str(folder / "long"), version=8).create_checkpoint()
    write(folder / "gone", cohort(8))
    write(folder / "gone", cohort(6), mode="overwrite")
    DeltaTable(str(folder / "gone")).vacuum(0, dry_run=False, enforce_retention_duration=False)
    return folder


@pytest.fixture(scope="module", params=["azure", "s3"])
def store(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        if request.param == "azure":
            with azurite() as blobs:
                blobs.upload(folder, "tables")
                yield Store("az://tables", blobs.storage_options())
        else:
            with moto() as s3:
                s3.upload(folder)
                yield Store(f"s3://{s3.bucket}", s3.storage_options())


@pytest.fixture(autouse=True)
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staged"))
    return tmp_path / "staged"


def _copies(staged: Path) -> list[Path]:
    return [path for path in staged.rglob("*.parquet") if path.is_file()]


def _check(feed: Any, epoch: int, patients: list[Made]) -> None:
    came = []
    for bags in feed.epoch(epoch):
        for name, bag in zip(bags.patient_id, bags.split(), strict=True):
            patient = patients[int(name[1:])]
            assert bag.tolist() == patient.bag().tolist()
            came.append(patient.number)
    assert sorted(came) == [patient.number for patient in patients]


def test_a_remote_table_is_fed_as_a_local_one(store: Store, folder: Path, staged: Path, backend: Any) -> None:
    feed = make_feed(f"{store.uri}/long", storage_options=store.options, batch_size=3, seed=2, backend=backend)
    assert feed.version == 10
    assert not staged.exists()  # nothing was copied to see who is there
    local = make_feed(str(folder / "long"), batch_size=3, seed=2, backend=backend)
    for epoch in (0, 1):
        assert [bags.patient_id for bags in feed.epoch(epoch)] == [bags.patient_id for bags in local.epoch(epoch)]
    workers = DataLoader(FeedDataset(feed), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [bags.patient_id for bags in workers] == [bags.patient_id for bags in local.epoch(0)]
    assert len(_copies(staged)) == 11
    _check(feed, 2, cohort(44))


@pytest.mark.parametrize("version", [0, 7, 8, 9])
def test_versions_before_at_and_behind_a_checkpoint(store: Store, version: int) -> None:
    feed = make_feed(f"{store.uri}/long", version, storage_options=store.options, backend="pyarrow")
    assert (feed.version, feed.n_patients) == (version, 4 * (version + 1))


def test_a_shard_copies_the_files_of_its_part(store: Store, staged: Path) -> None:
    feed = make_feed(f"{store.uri}/long", storage_options=store.options, shard=(1, 4))
    assert len(list(feed.epoch(0))) == 11
    assert len(_copies(staged)) <= 4  # of 11


def test_copies_are_bounded_and_come_again_when_they_went(
    store: Store, staged: Path, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    feed = make_feed(f"{store.uri}/long", storage_options=store.options, backend=backend)
    size = max(file.n_bytes for file in feed.table.files)
    monkeypatch.setattr(delivery, "TOGETHER_BYTES", size)  # a file at a time, and the next meanwhile
    monkeypatch.setattr(staging, "MAX_BYTES", 4 * size)
    for epoch in (0, 1):
        _check(feed, epoch, cohort(44))
        assert sum(path.stat().st_size for path in _copies(staged)) <= 4 * size


def test_a_folder_that_is_too_small_for_copies_is_named(
    store: Store, staged: Path, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 1000)
    feed = make_feed(f"{store.uri}/long", storage_options=store.options, backend=backend)
    with pytest.raises(
        FeedError, match=rf"bytes, {staged} may hold 1,000 .* name a folder on a larger disk in SLIDELAKE_STAGING"
    ):
        list(feed.epoch(0))


def test_an_epoch_that_is_left_leaves_its_copies_free(
    store: Store, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "TOGETHER_BYTES", 1)
    feed = make_feed(f"{store.uri}/long", storage_options=store.options)
    epoch = feed.epoch(0)
    next(epoch)
    epoch.close()
    monkeypatch.setattr(staging, "MAX_BYTES", 2 * max(file.n_bytes for file in feed.table.files))
    _check(feed, 0, cohort(44))  # has room only where nobody holds the copies of before


def test_a_vacuumed_version_is_refused(store: Store) -> None:
    with pytest.raises(FeedError, match=rf"version 0 of {store.uri}/gone is not whole any more, .* it was vacuumed"):
        make_feed(f"{store.uri}/gone", 0, storage_options=store.options)
    assert make_feed(f"{store.uri}/gone", storage_options=store.options).n_patients == 6


def test_nothing_there_is_named_and_no_secret_is(store: Store) -> None:
    with pytest.raises(
        FeedError, match=f"no Delta table at {store.uri}/none: run the patients job, or correct the URI"
    ):
        make_feed(f"{store.uri}/none", storage_options=store.options)
    wrong = {key: value.replace(":", ":1") if isinstance(value, str) else value for key, value in store.options.items()}
    secrets = [value for value in map(str, store.options.values()) if len(value) > 8]
    fsspec.config.conf.clear()
    with pytest.raises(FeedError) as caught:
        make_feed("nostore://tables/long", storage_options=wrong)
    assert re.match(r"nostore://tables/long cannot be read \(ValueError: Protocol not known", str(caught.value))
    assert not any(secret in str(caught.value) for secret in secrets)

"""What the feed hands out: whose bags, which tiles, which labels, in which order, by either reader."""

import logging
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petastorm.workers_pool import EmptyResultError

from jobs.training.feed import delivery, make_feed
from jobs.training.feed import row_groups as reading
from jobs.training.feed.bags import Bags
from jobs.training.refusals import FeedError
from tests.feed.tables import Made, cohort, write

# pytest sets aside the filters that the feed has for what petastorm says of pyarrow and of tile_index
TRAIN = [i for i in range(50) if i % 5 != 4]


def _flat(bags: Bags) -> tuple[Any, ...]:
    index = None if bags.tile_index is None else [each.tolist() for each in bags.tile_index]
    histogram = None if bags.color_histogram is None else bags.color_histogram.tolist()
    return (
        *(bags.patient_id, bags.center_id, bags.label.tolist(), bags.offsets.tolist(), bags.embeddings.tolist()),
        *(histogram, index, bags.repeated.tolist()),
    )


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_bags_are_the_patients_as_they_are(table: Path, patients: list[Made], backend: Any) -> None:
    feed = make_feed(
        str(table),
        split="train",
        batch_size=3,
        columns=("tile_index", "embeddings_max", "color_histogram", "embeddings"),
        backend=backend,
    )
    assert (feed.version, feed.backend, feed.classes, feed.dim, feed.dtype) == (2, backend, ("CE", "LAA"), 8, "float32")
    assert (feed.n_patients, feed.n_steps) == (40, 14)
    seen = []
    for bags in feed.epoch(0):
        assert bags.tile_index is not None and bags.color_histogram is not None
        for i, bag in enumerate(bags.split()):
            patient = patients[int(bags.patient_id[i][1:])]
            expected = np.concatenate([patient.bag("embeddings"), patient.bag("embeddings_max")], axis=1)
            np.testing.assert_array_equal(bag.numpy(), expected)
            assert bags.label[i] == patient.number % 2
            assert bags.center_id[i] == f"centre {patient.number % 3}"
            assert bags.color_histogram[i].argmax() == patient.number
            assert [tuple(tile) for tile in bags.tile_index[i]] == [
                tuple(tile.values()) for tile in patient.row()["tile_index"]
            ]
            seen.append(patient.number)
    assert sorted(seen) == TRAIN


def test_a_bag_that_the_encoder_has_not_is_refused_by_name(tmp_path: Path, backend: Any) -> None:
    table = str(write(tmp_path / "patients", cohort(3, has_maximum=False)))
    assert sum(len(bags) for bags in make_feed(table, backend=backend).epoch(0)) == 3
    with pytest.raises(FeedError, match=r"embeddings_max is null.*one vector per tile.*training\.columns=embedding"):
        list(make_feed(table, columns=("embeddings_max",), backend=backend).epoch(0))


@pytest.mark.parametrize("bag_size", [None, 5])
def test_both_readers_feed_the_same_in_the_same_order_whatever_the_threads(table: Path, bag_size: int | None) -> None:
    columns = ("embeddings", "color_histogram", "tile_index")
    readers: list[tuple[Any, int]] = [("petastorm", 1), ("petastorm", 10), ("pyarrow", 1), ("pyarrow", 10)]
    fed = [
        [
            _flat(bags)
            for epoch in (0, 1)
            for bags in make_feed(
                str(table), batch_size=4, bag_size=bag_size, seed=3, columns=columns, backend=backend, threads=threads
            ).epoch(epoch)
        ]
        for backend, threads in readers
    ]
    assert fed[0] == fed[1] == fed[2] == fed[3]
    assert fed[0][:13] != fed[0][13:]


def test_an_epoch_is_resumed_at_a_step(table: Path, backend: Any) -> None:
    feed = make_feed(str(table), batch_size=4, bag_size=3, shard=(1, 2), backend=backend)
    whole = [_flat(bags) for bags in feed.epoch(5)]
    assert len(whole) == feed.n_steps == 7
    for first in (1, 4, 7):
        again = make_feed(str(table), batch_size=4, bag_size=3, shard=(1, 2), backend=backend)
        assert [_flat(bags) for bags in again.epoch(5, first_step=first)] == whole[first:]
    with pytest.raises(ValueError, match="first_step is 8: an epoch has 7 steps"):
        next(feed.epoch(5, first_step=8))


def test_a_resumed_epoch_reads_only_what_is_left(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = reading.decoded

    def counted(table: Any, group: reading.Wanted, decoder: Any) -> Any:
        read.append(group.index)
        return real(table, group, decoder)

    monkeypatch.setattr(reading, "decoded", counted)
    monkeypatch.setattr("jobs.training.feed.epochs.MIX_BYTES", 0)
    feed = make_feed(str(table), backend="pyarrow")
    assert len(list(feed.epoch(0, first_step=45))) == 5
    assert len(read) <= 3  # of 14 row groups


def test_tiles_are_sampled_anew_each_epoch_and_alike_in_any_company(
    table: Path, patients: list[Made], backend: Any
) -> None:
    def tiles(epoch: int, **how: Any) -> dict[str, list[int]]:
        feed = make_feed(str(table), bag_size=4, backend=backend, **how)
        fed: dict[str, list[int]] = {}
        for bags in feed.epoch(epoch):
            numbers = bags.embeddings.view(len(bags), 4, feed.dim)[:, :, 1].int().tolist()
            fed.update(zip(bags.patient_id, numbers, strict=True))
        return fed

    first = tiles(0)
    for patient in patients:
        sampled = first[patient.patient_id]
        if patient.n_tiles >= 4:
            assert len(set(sampled)) == 4  # without replacement
        else:
            assert set(sampled) == set(range(patient.n_tiles))  # each of them, some again
    assert first == tiles(0, batch_size=7, shuffle=False)
    assert first != tiles(1)
    assert first != tiles(0, seed=1)


def test_float16_stays_and_mixed_bags_become_float32(tmp_path: Path, backend: Any) -> None:
    halves = [Made(i, 3, dtype="float16", label="CE") for i in range(4)]
    older = [Made(i, 2, dtype=None, label="CE") for i in range(4, 8)]  # null: float32, as before the column was there
    write(tmp_path / "half", halves)
    feed = make_feed(str(tmp_path / "half"), backend=backend)
    assert feed.dtype == "float16"
    assert {bags.embeddings.dtype for bags in feed.epoch(0)} == {torch.float16}
    mixed = make_feed(str(write(tmp_path / "mixed", halves + older)), batch_size=8, backend=backend)
    [bags] = mixed.epoch(0)
    assert bags.embeddings.dtype == torch.float32
    for name, bag in zip(bags.patient_id, bags.split(), strict=True):
        assert torch.equal(bag, torch.from_numpy((halves + older)[int(name[1:])].bag().astype("float32")))


def test_bags_may_be_changed(table: Path, patients: list[Made], backend: Any) -> None:
    """A trainer that normalises in place changes its own bag and no other."""
    feed = make_feed(str(table), backend=backend)
    for bags in feed.epoch(0):
        expected = patients[int(bags.patient_id[0][1:])].bag()
        np.testing.assert_array_equal(bags.embeddings.numpy(), expected)
        bags.embeddings.fill_(-1)


def test_who_is_fed(table: Path, backend: Any) -> None:
    def fed(**how: Any) -> set[str]:
        return {name for bags in make_feed(str(table), backend=backend, **how).epoch(0) for name in bags.patient_id}

    assert fed(split=["train", "test"]) == fed() == {f"p{i:04d}" for i in range(50)}
    assert fed(split="test") == {f"p{i:04d}" for i in range(4, 50, 5)}
    assert fed(patients=["p0007", "p0003"]) == {"p0003", "p0007"}


def test_without_shuffling_rows_come_as_they_lie(table: Path, backend: Any) -> None:
    feed = make_feed(str(table), batch_size=50, shuffle=False, backend=backend)
    [first], [second] = feed.epoch(0), feed.epoch(1)
    assert first.patient_id == second.patient_id
    numbers = [int(name[1:]) for name in first.patient_id]
    assert sum(here + 1 != ahead for here, ahead in pairwise(numbers)) <= 2  # where files meet


def test_a_shard_that_runs_out_repeats_a_patient_and_says_so(tmp_path: Path, backend: Any) -> None:
    write(tmp_path / "table", cohort(2), files=2)
    fed = [
        [
            (bags.patient_id, bags.repeated.tolist())
            for bags in make_feed(str(tmp_path / "table"), shard=(rank, 3), backend=backend).epoch(0)
        ]
        for rank in range(3)
    ]
    assert [len(steps) for steps in fed] == [1, 1, 1]
    assert sorted(repeated for steps in fed for _, [repeated] in steps) == [False, False, True]
    assert {name for steps in fed for [name], [repeated] in steps if not repeated} == {"p0000", "p0001"}


def test_labels_are_numbers_of_the_classes_that_are_given(tmp_path: Path, backend: Any) -> None:
    made = [Made(0, 1, label="LAA"), Made(1, 1, label=None), Made(2, 1, label="CE")]
    table = str(write(tmp_path / "table", made))
    [bags] = make_feed(table, batch_size=3, shuffle=False, classes=("LAA", "Other", "CE"), backend=backend).epoch(0)
    assert bags.label.tolist() == [0, -1, 2]
    feed = make_feed(table, patients=["p0000"], backend=backend)
    assert feed.classes == ("CE", "LAA")  # of the whole version: the same for all splits of it
    with pytest.raises(FeedError, match="has patients of CE, the classes are LAA: correct the labels"):
        make_feed(table, classes=["LAA"], backend=backend)
    [bags] = make_feed(table, batch_size=3, classes=(), backend=backend).epoch(0)  # nobody asks for labels
    assert bags.label.tolist() == [-1, -1, -1]


def test_readers_wait_where_they_are_far_enough_ahead(
    table: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bags that wait, at most: those of the row group that is needed, since no two fit."""
    monkeypatch.setattr(reading, "AHEAD_BYTES", 100)
    monkeypatch.setattr("jobs.training.feed.epochs.MIX_BYTES", 0)
    bags = []
    real = reading.decoded

    def counted(*arguments: Any) -> Any:
        part = real(*arguments)
        bags.append(len(part))
        return part

    monkeypatch.setattr(reading, "decoded", counted)
    monkeypatch.setattr("jobs.training.feed.petastorm_rows.decoded", counted)
    feed = make_feed(str(table), backend=backend, threads=2)
    for step, _ in enumerate(feed.epoch(0)):
        assert sum(bags[:-3]) <= step + 2  # three: one is fed from, and each thread has one more in hand; a step ahead
    assert sum(bags) == 50


def test_an_epoch_that_is_left_leaves_nothing_running(table: Path, backend: Any) -> None:
    """The fixture looks for threads."""
    epoch = make_feed(str(table), backend=backend, threads=10).epoch(0)
    next(epoch)
    epoch.close()


@pytest.mark.parametrize(("delivers", "told"), [(0, "did not come"), (2, "came twice")])
def test_an_epoch_that_is_not_everybody_once_is_an_error(
    table: Path, monkeypatch: pytest.MonkeyPatch, delivers: int, told: str
) -> None:
    def wrong(wanted: Any, *rest: Any) -> Iterator[Any]:
        for i, part in enumerate(reading.read_by_pyarrow(wanted, *rest)):
            for _ in range(delivers if i == 3 else 1):
                yield part

    feed = make_feed(str(table), backend="pyarrow")
    monkeypatch.setattr(feed, "reader", wrong)
    with pytest.raises(FeedError, match=told):
        list(feed.epoch(0))


def test_a_petastorm_that_ends_too_early_is_an_error(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.13.1 does, silently."""

    def end(pool: Any) -> None:
        raise EmptyResultError

    monkeypatch.setattr("petastorm.workers_pool.thread_pool.ThreadPool.get_results", end)
    with pytest.raises(FeedError, match="petastorm ended before its last row group"):
        list(make_feed(str(table), backend="petastorm").epoch(0))


def test_the_choice_of_the_reader_is_told(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert make_feed(str(table)).backend == "petastorm"
    assert f"feed of 50 patients of version 2 of {table}, encoder made, read by petastorm" in caplog.text


def test_without_petastorm_it_is_pyarrow_and_who_asks_for_it_is_told(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "find_spec", lambda name: None)
    assert make_feed(str(table)).backend == "pyarrow"
    with pytest.raises(FeedError, match="install the extra train"):
        make_feed(str(table), backend="petastorm")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"split": "train", "patients": ["p0001"]}, "give one"),
        ({"shard": (2, 2)}, "the rank must be from 0 to 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"bag_size": 0}, "bag_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": 2**32}, "seed is 4294967296: it must be from 0 to"),
        ({"columns": ["color_histogram"]}, "at least one of the first two"),
        ({"columns": ["embedding"]}, "choose of embeddings"),
    ],
)
def test_arguments_that_can_not_be(table: Path, how: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_feed(str(table), **how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"split": "validation"}, "has no patient of split validation, its splits are test, train: run the splits job"),
        ({"patients": ["p0001", "nobody"]}, "has no patients nobody, 1 of 2 requested"),
        ({"patients": []}, "has no patients to feed"),
    ],
)
def test_patients_that_are_not_there(table: Path, how: dict[str, Any], told: str) -> None:
    with pytest.raises(FeedError, match=told):
        make_feed(str(table), **how)

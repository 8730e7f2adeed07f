"""The feed in workers of PyTorch's DataLoader: every patient once an epoch, whatever starts the workers and how many they are."""

import itertools
import multiprocessing
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.data import DataLoader, IterableDataset

from jobs.training.errors import FeedError
from jobs.training.feed import Bags, Feed, FeedDataset, make_feed
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.window_feed import WindowFeed
from jobs.training.patches.windows import WindowFolder
from tests.feed.datasets import Begun, ByIndex, Opened, Patches
from tests.feed.patch_slides import spec_of, write_slides
from tests.feed.tables import Made
from tests.feed.test_patch_windows import plan_in, produce

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # this machine has few cores

Told = list[tuple[list[str], list[list[float]], list[bool]]]


def _told(batches: Any) -> Told:
    return [(bags.patient_id, bags.embeddings.tolist(), bags.repeated.tolist()) for bags in batches]


def _patients(told: Told) -> list[str]:
    return sorted(name for names, _, repeated in told for name, again in zip(names, repeated, strict=True) if not again)


@pytest.mark.parametrize(
    ("context", "persistent", "backend"),
    [
        ("fork", False, "petastorm"),
        ("fork", True, "pyarrow"),
        ("spawn", True, "petastorm"),
        ("forkserver", True, "pyarrow"),
    ],
)
def test_workers_yield_the_batches_of_the_feed_in_its_order(
    table: Path, context: str, persistent: bool, backend: Any
) -> None:
    feed = make_feed(str(table), split="train", batch_size=3, bag_size=4, seed=3, backend=backend)
    expected = [_told(feed.epoch(number)) for number in (0, 1)]
    dataset = FeedDataset(feed)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=persistent
    )
    assert len(loader) == feed.n_steps
    for number in (0, 1, 1):
        dataset.set_epoch(number)
        assert _told(loader) == expected[number]


@pytest.mark.parametrize(("workers", "batch_size", "n_steps"), [(1, 1, 4), (2, 1, 4), (3, 2, 2)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_of_ranks_are_shared_out_by_their_workers(
    table: Path, workers: int, batch_size: int, n_steps: int, shuffle: bool
) -> None:
    """3 ranks of 3, 3 and 4 patients: two repeat one, and where 3 workers have 2 steps, one has nothing to do."""
    feeds = [
        make_feed(str(table), split="test", shard=(rank, 3), batch_size=batch_size, shuffle=shuffle)
        for rank in range(3)
    ]
    told = [_told(DataLoader(FeedDataset(feed), batch_size=None, num_workers=workers)) for feed in feeds]
    assert [len(of_rank) for of_rank in told] == [n_steps] * 3
    assert told == [_told(feed.epoch(0)) for feed in feeds]
    assert _patients(list(itertools.chain.from_iterable(told))) == [f"p{i:04d}" for i in range(4, 50, 5)]


def test_an_epoch_goes_on_at_a_step_in_workers(table: Path) -> None:
    feed = make_feed(str(table), batch_size=4)

    class Resumed(IterableDataset[Bags]):
        def __iter__(self) -> Iterator[Bags]:
            return feed.epoch(2, first_step=5)

    assert _told(DataLoader(Resumed(), batch_size=None, num_workers=2)) == _told(feed.epoch(2))[5:]


def _refusal(loader: DataLoader[Any]) -> str:
    """Without pytest.raises, which keeps the frames of a DataLoader alive: its workers then take 5 s each to end."""
    try:
        list(loader)
    except (FeedError, ValueError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_a_feed_made_in_spawned_workers_is_shared_out_too(table: Path, patients: list[Made]) -> None:
    loader = DataLoader(
        Opened(str(table), version=2, batch_size=3), batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    told = _told(loader)
    assert _patients(told) == [patient.patient_id for patient in patients]
    assert told == _told(make_feed(str(table), batch_size=3).epoch(0))


def test_a_table_opened_in_a_forked_worker_is_refused_with_the_remedy(table: Path) -> None:
    make_feed(str(table))  # from now on deltalake works in no fork of this process
    loader = DataLoader(Opened(str(table)), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert re.search(r'make the feed before the DataLoader, or .* multiprocessing_context="spawn"', _refusal(loader))


def test_a_shard_that_may_be_the_workers_own_is_refused(table: Path) -> None:
    loader = DataLoader(Opened(str(table), shard=(1, 2)), batch_size=None, num_workers=2)
    assert re.search(r"shard \(1, 2\) .*: make the feed before the DataLoader", _refusal(loader))


def test_map_style_datasets_have_steps_without_workers_only(table: Path, patients: list[Made]) -> None:
    dataset = ByIndex(make_feed(str(table), batch_size=7))
    assert _patients(_told(DataLoader(dataset, batch_size=None))) == [patient.patient_id for patient in patients]
    assert re.search(
        "ByIndex is a map-style Dataset, whose 2 workers", _refusal(DataLoader(dataset, batch_size=None, num_workers=2))
    )


def test_an_epoch_that_began_before_the_fork_is_refused(table: Path) -> None:
    epoch = make_feed(str(table)).epoch(0)
    next(epoch)
    assert re.search(
        r"can't go on in process .*: call Feed.epoch where",
        _refusal(DataLoader(Begun(epoch), batch_size=None, num_workers=1, multiprocessing_context="fork")),
    )
    assert len(list(epoch)) == 49  # here it goes on


def test_a_feed_can_be_sent_to_another_process(table: Path) -> None:
    feed = make_feed(str(table), split="test", columns=("embeddings_max", "tile_index"))
    copy = pickle.loads(pickle.dumps(feed))
    assert _told(copy.epoch(1)) == _told(feed.epoch(1))
    with multiprocessing.get_context("fork").Pool(1) as pool:  # no worker of a DataLoader: all of the epoch
        assert pool.apply(_count, (feed,)) == 10


def _count(feed: Feed) -> int:
    return len(list(feed.epoch(0)))


def test_loaders_of_patches_are_refused_in_workers_and_go_on_outside(tmp_path: Path) -> None:
    spec, folder = spec_of(write_slides(tmp_path)), WindowFolder(tmp_path / "windows")
    folder.root.mkdir()
    plan_in(folder, spec)
    produce(folder, spec, 0)
    loaders: list[PatchLoader | WindowFeed] = [
        PatchLoader(spec, n_parallel=1, say=_said),
        WindowFeed(folder.root, say=_said),
    ]
    for loader, name in zip(loaders, ("PatchLoader", "WindowFeed"), strict=True):
        epoch = loader.epoch(0)
        came = len(next(epoch))
        for workers in (1, 2):
            with pytest.raises(
                FeedError, match=rf"{name} runs in worker 0 of {workers} of a DataLoader, and each would"
            ):
                list(DataLoader(Patches(loader), batch_size=None, num_workers=workers, multiprocessing_context="fork"))
        assert came + sum(map(len, epoch)) == 100  # what it had begun is as it was


def test_a_fork_of_a_loader_of_patches_leaves_its_parents_processes_alone(tmp_path: Path) -> None:
    loader = PatchLoader(spec_of(write_slides(tmp_path)), n_parallel=1, say=_said)
    assert sum(map(len, loader.epoch(0))) == 100  # its process stays
    before = psutil.Process().children()
    with multiprocessing.get_context("fork").Pool(1, _keep, (loader,)) as pool:  # as it is, not by a pickle
        assert pool.apply(_patches_of_fork) == 100
    assert [process.status() for process in before] == ["sleeping"] * len(before)
    assert sum(map(len, loader.epoch(1))) == 100
    loader.close()


def _said(_: str) -> None:
    """Nobody listens."""


_kept: list[PatchLoader] = []


def _keep(loader: PatchLoader) -> None:
    _kept.append(loader)


def _patches_of_fork() -> int:
    n_patches = sum(map(len, _kept[0].epoch(1)))
    _kept[0].close()
    _kept.clear()
    return n_patches

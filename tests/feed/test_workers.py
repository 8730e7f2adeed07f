"""The feed in workers of PyTorch's DataLoader: every patient once an epoch, whatever starts the workers and how many they are."""

import copy
import itertools
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import psutil
import pytest
from torch.utils.data import DataLoader

from jobs.training.feed import Feed, FeedDataset, make_feed
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.window_feed import WindowFeed
from jobs.training.patches.windows import WindowFolder
from jobs.training.refusals import FeedError
from tests.feed.datasets import Begun, ByIndex, Opened, OwnShare, Patches
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
    dataset = FeedDataset(feed)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    dataset.set_epoch(2, first_step=5)
    assert _told(loader) == _told(feed.epoch(2))[5:]
    dataset.set_epoch(3)
    assert _told(loader) == _told(feed.epoch(3))


def _unpickled(dataset: FeedDataset) -> FeedDataset:
    copied: FeedDataset = pickle.loads(pickle.dumps(dataset))
    return copied


def _uncloudpickled(dataset: FeedDataset) -> FeedDataset:
    copied: FeedDataset = pickle.loads(cloudpickle.dumps(dataset))
    return copied


@pytest.mark.parametrize("copied", [_unpickled, _uncloudpickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_of_a_copy_see_its_epoch(
    table: Path, copied: Callable[[FeedDataset], FeedDataset], context: str
) -> None:
    feed = make_feed(str(table), split="test", batch_size=3)
    dataset = copied(FeedDataset(feed))
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for number in (0, 1, 2):
        dataset.set_epoch(number)
        assert _told(loader) == _told(feed.epoch(number))


def _refusal(loader: DataLoader[Any]) -> str:
    """Without pytest.raises, which keeps the frames of a DataLoader alive: its workers then take 5 s each to end."""
    try:
        list(loader)
    except (FeedError, ValueError, RuntimeError) as error:
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


@pytest.mark.parametrize("kind", [ByIndex, OwnShare])
def test_a_feed_in_one_of_several_workers_is_refused_whatever_the_dataset_does(
    table: Path, patients: list[Made], kind: type[ByIndex] | type[OwnShare]
) -> None:
    dataset = kind(make_feed(str(table), batch_size=7))
    expected = [patient.patient_id for patient in patients]
    for workers in (0, 1):
        assert _patients(_told(DataLoader(dataset, batch_size=None, num_workers=workers))) == expected
    for workers in (2, 3):
        assert re.search(
            rf"Feed\.epoch runs in worker 0 of {workers} of a DataLoader, .*: use FeedDataset",
            _refusal(DataLoader(dataset, batch_size=None, num_workers=workers)),
        )


def test_an_epoch_that_nobody_began_is_refused_in_several_workers_too(table: Path) -> None:
    epoch = make_feed(str(table)).epoch(0)
    loader = DataLoader(Begun(epoch), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert "use FeedDataset" in _refusal(loader)


def test_an_epoch_that_began_before_the_fork_is_refused(table: Path) -> None:
    epoch = make_feed(str(table)).epoch(0)
    next(epoch)
    assert re.search(
        r"cannot go on in process .*: begin it in the process that uses the items",
        _refusal(DataLoader(Begun(epoch), batch_size=None, num_workers=1, multiprocessing_context="fork")),
    )
    assert len(list(epoch)) == 49  # here it goes on


def test_a_feed_can_be_sent_to_another_process(table: Path) -> None:
    feed = make_feed(str(table), split="test", columns=("embeddings_max", "tile_index"))
    sent = pickle.loads(pickle.dumps(feed))
    assert _told(sent.epoch(1)) == _told(feed.epoch(1))
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
        several = DataLoader(Patches(loader), batch_size=None, num_workers=2, multiprocessing_context="fork")
        with pytest.raises(FeedError, match=rf"{name} runs in worker 0 of 2 of a DataLoader, and each would"):
            list(several)
        assert came + sum(map(len, epoch)) == 100  # what it had begun is as it was


def test_loaders_of_patches_yield_each_patch_once_in_a_worker_that_has_nobody_to_share_with(tmp_path: Path) -> None:
    spec, folder = spec_of(write_slides(tmp_path)), WindowFolder(tmp_path / "windows")
    folder.root.mkdir()
    plan_in(folder, spec)
    produce(folder, spec, 0)
    for loader in (PatchLoader(spec, n_parallel=1, say=_said), WindowFeed(folder.root, say=_said)):
        alone = DataLoader(Patches(loader), batch_size=None, num_workers=1, multiprocessing_context="fork")
        assert sum(map(len, alone)) == 100


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

"""Datasets that people write around a feed, in a module that spawned workers can import."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from jobs.training.feed import Bags, Feed, FeedDataset, make_feed
from jobs.training.patches.batch import PatchBatch
from jobs.training.patches.loader import PatchLoader
from jobs.training.patches.window_feed import WindowFeed


class Opened(IterableDataset[Bags]):
    """Makes the feed in the worker."""

    def __init__(self, uri: str, **arguments: Any) -> None:
        super().__init__()
        self.uri, self.arguments = uri, arguments

    def __iter__(self) -> Iterator[Bags]:
        return iter(FeedDataset(make_feed(self.uri, **self.arguments)))


class ByIndex(Dataset[Bags]):
    """Map-style."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return self.feed.n_steps

    def __getitem__(self, index: int) -> Bags:
        return next(self.feed.epoch(0, index))


class OwnShare(IterableDataset[Bags]):
    """Shares steps among workers by PyTorch's own pattern."""

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self.feed = feed

    def __iter__(self) -> Iterator[Bags]:
        info = get_worker_info()
        for n, bags in enumerate(self.feed.epoch(0)):
            if info is None or n % info.num_workers == info.id:
                yield bags


class Begun(IterableDataset[Bags]):
    """Hands out an epoch that somebody began."""

    def __init__(self, epoch: Iterator[Bags]) -> None:
        super().__init__()
        self.epoch = epoch

    def __iter__(self) -> Iterator[Bags]:
        return self.epoch


class Patches(IterableDataset[PatchBatch]):
    """Patches of a loader that has processes of its own, or takes windows that others read."""

    def __init__(self, loader: PatchLoader | WindowFeed) -> None:
        super().__init__()
        self.loader = loader

    def __iter__(self) -> Iterator[PatchBatch]:
        return self.loader.epoch(0)

"""The feed as a Dataset, for PyTorch's DataLoader and what builds on it."""

from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset

from jobs.training.feed.bags import Bags
from jobs.training.feed.feed import Feed


class FeedDataset(IterableDataset[Bags]):
    """The steps of a feed's epochs: `DataLoader(FeedDataset(feed), batch_size=None, num_workers=2)`.

    Batches and their order are the feed's own, whatever the number of workers and however these are started.
    """

    def __init__(self, feed: Feed) -> None:
        """Begin with epoch 0. `feed`: made in the trainer's process, so that all workers read one version of the table."""
        super().__init__()
        self._feed = feed
        # in memory that persistent workers share, so that they see it change
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, number: int) -> None:
        """Choose the epoch that the next loop over the DataLoader yields."""
        self._epoch.fill_(number)

    def __len__(self) -> int:
        """Steps an epoch."""
        return self._feed.n_steps

    def __iter__(self) -> Iterator[Bags]:
        """The steps of the epoch; in a worker of a DataLoader, its share of them."""
        return self._feed.epoch(int(self._epoch))

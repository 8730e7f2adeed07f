"""The feed as a Dataset, for PyTorch's DataLoader and what builds on it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from jobs.training.feed.bags import Bags
from jobs.training.feed.feed import Feed
from jobs.training.workers import worker_share


class FeedDataset(IterableDataset[Bags]):
    """The steps of a feed's epochs: `DataLoader(FeedDataset(feed), batch_size=None, num_workers=2)`.

    Batches and their order are the feed's own, whatever the number of workers and however these are started.
    """

    def __init__(self, feed: Feed) -> None:
        """Begin with epoch 0. `feed`: made in the trainer's process, so that all workers read one version of the table."""
        super().__init__()
        self._feed = feed
        self._begin = torch.zeros(2, dtype=torch.int64)  # epoch, first step
        self._share_memory()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose memory is not shared yet unless the copy is a DataLoader's own for a worker."""
        self.__dict__.update(state)
        self._share_memory()

    def _share_memory(self) -> None:
        """Let persistent workers see what `set_epoch` writes. Does nothing if the memory is shared."""
        self._begin.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, number: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step to begin with, that the next loop over the DataLoader yields."""
        self._begin.copy_(torch.tensor([number, first_step]))

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return self._feed.n_steps

    def __iter__(self) -> Iterator[Bags]:
        """Yield the steps of the epoch; in a worker of a DataLoader, this worker's share of them."""
        number, first_step = self._begin.tolist()
        return self._feed.epoch_share(number, first_step, *worker_share())

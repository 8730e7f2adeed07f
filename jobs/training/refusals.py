"""What training refuses: tables that cannot be fed, and epochs in one of several workers of PyTorch's DataLoader."""

from torch.utils.data import get_worker_info


class FeedError(Exception):
    """A table that cannot be fed, or an epoch that did not yield every patient once. One line with reason and remedy."""


class NoTableError(FeedError):
    """There is no such table."""


def worker_share() -> tuple[int, int]:
    """Returns this worker's number and the number of workers; (0, 1) outside of a DataLoader's workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def refuse_workers(what: str, remedy: str) -> None:
    """Raises FeedError in one of several workers of a DataLoader. `what`: yields a whole epoch in each of them."""
    worker, n_workers = worker_share()
    if n_workers > 1:
        raise FeedError(
            f"{what} runs in worker {worker} of {n_workers} of a DataLoader, and each would yield the whole epoch: {remedy}"
        )

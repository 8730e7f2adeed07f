"""Where batches are made: in the trainer's own process, or in a worker of PyTorch's DataLoader."""

from torch.utils.data import get_worker_info

from jobs.training.training_errors import FeedError


def worker_share() -> tuple[int, int]:
    """Return this worker's number and the number of workers; (0, 1) outside of a DataLoader's workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def refuse_workers(what: str, remedy: str) -> None:
    """Raise FeedError in one of several workers of a DataLoader. `what`: yields all of an epoch in each of them."""
    worker, n_workers = worker_share()
    if n_workers > 1:
        raise FeedError(
            f"{what} runs in worker {worker} of {n_workers} of a DataLoader, and each would yield the whole epoch: {remedy}"
        )

"""Where batches are made: in the trainer's own process, or in a worker of PyTorch's DataLoader."""

from torch.utils.data import IterableDataset, get_worker_info

from jobs.training.errors import FeedError


def worker_share() -> tuple[int, int]:
    """Return this worker's number and the number of workers; (0, 1) outside of a DataLoader's workers.

    Raises:
        FeedError: the workers serve a map-style Dataset: which of them is asked for what is known to the DataLoader alone.
    """
    info = get_worker_info()
    if info is None:
        return 0, 1
    if not isinstance(info.dataset, IterableDataset):
        raise FeedError(
            f"{type(info.dataset).__name__} is a map-style Dataset, whose {info.num_workers} workers can't share out an epoch: "
            "use FeedDataset or another IterableDataset, or num_workers=0"
        )
    return info.id, info.num_workers


def refuse_workers(what: str) -> None:
    """Raise FeedError in a worker of a DataLoader. `what`: a loader that has processes of its own, or none to share with."""
    info = get_worker_info()
    if info is not None:
        raise FeedError(
            f"{what} runs in worker {info.id} of {info.num_workers} of a DataLoader, and each would yield every patch: iterate "
            "over it in the trainer's own process, with num_workers=0"
        )

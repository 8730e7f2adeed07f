"""Batches of bags that no table holds."""

from collections.abc import Sequence

from jobs.training.feed.bags import Bag, Bags, pack
from jobs.training.feed.epochs import FedPatient, Turn


def batch_of(
    bags: Sequence[Bag],
    names: Sequence[str],
    centers: Sequence[str],
    labels: Sequence[int],
    repeated: Sequence[bool] | None = None,
) -> Bags:
    """Returns a batch as the feed packs it."""
    rows = zip(bags, names, centers, labels, repeated or [False] * len(bags), strict=True)
    step = [
        Turn(FedPatient(name, center, label, *bag.embeddings.shape, "float32", 0, 0, 0, bag.n_bytes), again)
        for bag, name, center, label, again in rows
    ]
    return pack(bags, step)

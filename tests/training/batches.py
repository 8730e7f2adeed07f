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
    step = []
    for bag, name, center, label, again in rows:
        n_tiles, dim = bag.embeddings.shape
        step.append(Turn(FedPatient(name, center, label, n_tiles, dim, "float32", 0, 0, 0, bag.n_bytes), again))
    return pack(bags, step)

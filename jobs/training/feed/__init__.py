"""The feed: bags of the patients of one version of a table, to PyTorch."""

from jobs.training.feed.bags import Bags
from jobs.training.feed.feed import Feed, FeedDataset, make_feed

__all__ = ["Bags", "Feed", "FeedDataset", "make_feed"]

"""What ends a training that can't be right."""


class FeedError(Exception):
    """A table that can't be fed, or an epoch that was not every patient once. Says what, why and the remedy in one line."""


class NoTableError(FeedError):
    """There is no such table."""

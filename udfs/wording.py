"""Wording that all messages share: texts of users, a few of many names, ids of runs, versions."""

import platform
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

_MOST_SHOWN = 80  # characters of a text of users


def quoted(text: str) -> str:
    """Returns a text of users as messages show it: in quotes, control characters escaped, cut."""
    return repr(text) if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]!r}... ({len(text):,} characters)"


def named(text: str) -> str:
    """Returns a name as messages show it: unchanged if it is short and printable, else `quoted`."""
    return text if text.isprintable() and len(text) <= _MOST_SHOWN else quoted(text)


def printable(text: str) -> str:
    """Returns a text as one line: line breaks, terminal escapes and other control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Returns the first few, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def new_run_id() -> str:
    """Returns the id of a run that begins now; ids sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def is_run_id(text: str) -> bool:
    """Whether a text is the id of a run."""
    return re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", text) is not None


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed; others are extras."""
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions

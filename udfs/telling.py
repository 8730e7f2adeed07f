"""What jobs tell in the same words wherever they tell it: a few of many names, the id of a run, versions of packages."""

import platform
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version


def some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def new_run_id() -> str:
    """Of a run that begins now; sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def is_run_id(text: str) -> bool:
    """Whether it is one of those."""
    return re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", text) is not None


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are there; others are extras."""
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions

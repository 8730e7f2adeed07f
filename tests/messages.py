"""Messages as slidelake logs them where there is no terminal."""

import re


def plain(err: str) -> str:
    """The lines of stderr without time, level and run id before them."""
    return re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?:INFO|WARNING|ERROR) \S+ ", "", err, flags=re.MULTILINE)

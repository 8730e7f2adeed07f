"""What of settings and arguments messages may show: a secret may stand in any of them, where its owner did not mean to put it.

One rule: a text is shown if it is made of plain words and numbers, and is no value of an environment variable whose name speaks
of a secret. Of any other, messages tell the type and the length. Imports little, so that arguments are refused at once.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from udfs.telling import quoted

_SHORTEST, _LONGEST = 6, 80  # characters: what is shorter is no secret, what is longer is no plain text
# Up to three words that run together, with a number and a unit behind: patch16, in21k, EfficientNetB0. Or a number: 384x384.
_WORD = re.compile(
    r"(?:[A-Z]{1,15}|[A-Z]?[a-z]{1,15}(?:[A-Z][a-z]{0,14}){0,2})[0-9]{0,9}[a-z]{0,2}|[0-9]{1,9}(?:x[0-9]{1,9})?[A-Za-z]{0,2}"
)
_SPEAKS_OF_SECRETS = re.compile(
    r"secret|passw|passphrase|pwd|token|credential|private|api_?key|access_?key|account_?key|(^|[^a-z])(key|sas|sig|signature|auth)([^a-z]|$)",
    re.IGNORECASE,
)
_RUN_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{6}")


def may_be_secret(text: str) -> bool:
    """Whether a value must not be shown."""
    if len(text) < _SHORTEST or _RUN_ID.fullmatch(text):
        return False
    return not _is_plain(text) or _SPEAKS_OF_SECRETS.search(text) is not None


def described(value: Any) -> str:
    """A value as refusals show it: itself, or its type and length where it may be a secret."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, list | tuple | set):
        return f"a list of {len(value)}"
    text = str(value)
    if may_be_secret(text):
        return f"a {'text' if isinstance(value, str) else 'number'} of {len(text):,} characters that may be a secret"
    return quoted(value) if isinstance(value, str) else text


def without_secrets(text: str) -> str:
    """A message that quotes arguments, with *** for words that may be secrets, and for what an option for secrets is given."""
    is_awaited = False

    def show(match: re.Match[str]) -> str:
        nonlocal is_awaited
        name, equals, value = match[0].partition("=")
        was_awaited, is_awaited = is_awaited, False
        if equals or name.startswith("-"):
            is_awaited = not equals and _SPEAKS_OF_SECRETS.search(name) is not None
            is_hidden = may_be_secret(value) or (value and _SPEAKS_OF_SECRETS.search(name))
            return f"{name if _is_plain(name) else '***'}{equals}{'***' if is_hidden else value}"
        return "***" if was_awaited or may_be_secret(name) else name

    return re.sub(r"""[^\s'"(),;:\[\]{}|]+""", show, text)


def key_shown(key: str) -> str:
    """A dotted key, with *** for parts that are no names."""
    return ".".join(part if len(part) < _SHORTEST or _is_plain(part) else "***" for part in key.split("."))


def _is_plain(text: str) -> bool:
    is_secret = any(
        len(value) >= _SHORTEST and value in text
        for name, value in os.environ.items()
        if _SPEAKS_OF_SECRETS.search(name)
    )
    words = re.split(r"[-+~_.:/ ]+", text.strip("-+~_.:/ ")) if len(text) <= _LONGEST else [text]
    return all(_WORD.fullmatch(word) for word in words) and not is_secret

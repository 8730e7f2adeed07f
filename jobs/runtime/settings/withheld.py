"""What of settings and arguments messages may show: any of them may have a secret that its owner put in the wrong place.

One rule: a text is shown if it consists of plain words and numbers, and is no value of an environment variable whose name
stands for a secret. Of any other text, messages give the type and the length. Few imports: arguments are refused at once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from udfs.wording import is_run_id, named, quoted

_SHORTEST, _LONGEST = 6, 80  # characters: a shorter text is no secret, a longer text is not plain
# Up to three words that run together, with a number and a unit behind: patch16, in21k, EfficientNetB0. Or a number: 384x384.
_WORD = re.compile(
    r"(?:[A-Z]{1,15}|[A-Z]?[a-z]{1,15}(?:[A-Z][a-z]{0,14}){0,2})[0-9]{0,9}[a-z]{0,2}|[0-9]{1,10}(?:x[0-9]{1,9})?[A-Za-z]{0,2}"
)
_WORD_OF_MESSAGE = re.compile(r"""[^\s'"(),;:\[\]{}|]+""")
_NAMES_A_SECRET = re.compile(
    r"secret|passw|passphrase|pwd|token|credential|private|api_?key|access_?key|account_?key|(^|[^a-z])(key|sas|sig|signature|auth)([^a-z]|$)",
    re.IGNORECASE,
)


def may_be_secret(text: str) -> bool:
    """Whether a value must not be shown."""
    return len(text) >= _SHORTEST and (not _is_plain(text) or _NAMES_A_SECRET.search(text) is not None)


def described(value: Any) -> str:
    """Returns a value as refusals show it: itself, or its type and length if it may be a secret."""
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
    """Returns a message that quotes arguments, with *** for words that may be secrets and for all after an option for secrets.

    A message does not say where an argument with blanks ends: in ``--password one two`` both words are the password.
    """
    for match in _WORD_OF_MESSAGE.finditer(text):
        if _is_for_secrets(match[0]):
            name, equals, _ = match[0].partition("=")
            value = f"{equals or ' '}***" if equals or text[match.end() :].strip() else ""
            return f"{without_secrets(text[: match.start()])}{_name_shown(name)}{value}"
    return _WORD_OF_MESSAGE.sub(lambda word: _argument_shown(word[0]), text)


def arguments_without_secrets(arguments: Sequence[str]) -> list[str]:
    """Returns the words of a command line, each shown or hidden as a whole."""
    before = ["", *arguments]
    return [
        "***" if "=" not in option and _is_for_secrets(option) else _argument_shown(argument)
        for option, argument in zip(before, arguments, strict=False)
    ]


def file_shown(path: str) -> str:
    """Returns the path of a settings file; its type and length if it has another ending and may be a secret."""
    return named(path) if path.endswith((".yaml", ".yml")) or not may_be_secret(path) else described(path)


def key_shown(key: str) -> str:
    """Returns a dotted key, with *** for parts that are no names."""
    return ".".join(part if len(part) < _SHORTEST else _name_shown(part) for part in key.split("."))


def _is_for_secrets(argument: str) -> bool:
    """Whether an argument is an option or a setting whose name stands for a secret."""
    name, equals, _ = argument.partition("=")
    return bool(equals or name.startswith("-")) and _NAMES_A_SECRET.search(name) is not None


def _argument_shown(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not equals and not name.startswith("-"):
        return "***" if may_be_secret(argument) else argument
    is_hidden = may_be_secret(value) or (value and _is_for_secrets(argument))
    return f"{_name_shown(name)}{equals}{'***' if is_hidden else value}"


def _name_shown(name: str) -> str:
    return name if _is_plain(name) else "***"


def _is_plain(text: str) -> bool:
    secrets = [value for name, value in os.environ.items() if _NAMES_A_SECRET.search(name) and len(value) >= _SHORTEST]
    if len(text) > _LONGEST or any(secret in text for secret in secrets):
        return False
    parts = [part for part in re.split(r"[/,\[\] ]+", text) if not is_run_id(part)]
    return all(_WORD.fullmatch(word) for part in parts for word in re.split(r"[-+~_.:]+", part) if word)

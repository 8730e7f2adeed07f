"""Labels of patients: which texts stand for no label, and which labels differ only in how they are written."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

# What R, pandas, Excel, SQL, SAS and people write if a value is missing, as `_folded`; #VALUE!, #NAME? in any language.
_NO_VALUE = re.compile(
    r"-*|\.|\?|\\n|n/?a|n\.[ad]\.?|[+-]?nan|nat|none|null|nil|<(na|none|null)>|\((none|null|blank)\)|\[null]|notavailable"
    r"|#(n/a|na|n/an/a|nv)|-?1\.#(ind|qnan)|#[\w/\xa1\xbf]+[!?]"
)
_MAY_BE_CLASSES = frozenset(("none", "nil"))  # as written: None is Python's
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d{1,3})?")


def is_no_value(text: str) -> bool:
    """Whether the text stands for a missing value: it is blank, NA, nan, None, null, N/A, a dash, ..."""
    return _NO_VALUE.fullmatch(_folded(text)) is not None


def is_dash(text: str) -> bool:
    """Whether the text is a dash of any kind, or several."""
    return bool(text) and not _folded(text).strip("-")


def may_be_class(text: str) -> bool:
    """Whether a text that stands for a missing value is also a word that names a class: none, beside mild and severe."""
    return text.strip() in _MAY_BE_CLASSES


def twins(labels: Iterable[str]) -> list[list[str]]:
    """Returns groups of labels that differ only in case, blanks, Unicode form or as numbers (1, 1.0, 01), each group sorted."""
    groups: dict[str | Fraction, set[str]] = {}
    for label in labels:
        groups.setdefault(_key(label), set()).add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _folded(text: str) -> str:
    """The text without case, blanks and invisible characters; its dashes are hyphens."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_DASHES)
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def _key(label: str) -> str | Fraction:
    """Equal for twins; numbers are compared exactly, however long they are."""
    folded = _folded(label)
    return Fraction(Decimal(folded.replace(",", "."))) if _NUMBER.fullmatch(folded) else folded

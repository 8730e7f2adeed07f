"""Labels of patients: which texts stand for no label, and which labels differ only in how they are written."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

# What R, pandas, Excel, SQL, SAS and people write where a value is missing; compared without case.
_NO_VALUE = frozenset(
    (
        *("", "na", "n/a", "n.a.", "n.a", "nan", "-nan", "nat", "none", "null", "nil", r"\n", "?", "."),
        *("<na>", "<none>", "<null>", "(none)", "(null)", "[null]", "-", "--", "---", "\N{EN DASH}", "\N{EM DASH}"),
        *("#n/a", "#na", "#null!", "#value!", "#ref!", "#name?", "#num!", "#div/0!"),
    )
)
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d{1,3})?")


def is_no_value(text: str) -> bool:
    """Whether the text stands for a missing value: it is blank, NA, nan, None, null, N/A, a dash, ..."""
    return text.strip().casefold() in _NO_VALUE


def twins(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, blanks, Unicode form or as numbers (1, 1.0, 01), each group sorted."""
    groups: dict[str, set[str]] = {}
    for label in labels:
        groups.setdefault(_key(label), set()).add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _key(label: str) -> str:
    text = "".join(unicodedata.normalize("NFKC", label).casefold().split())
    if _NUMBER.fullmatch(text):
        return str(Decimal(text.replace(",", ".")).normalize() + 0)  # + 0: -0 is 0
    return unicodedata.normalize("NFKC", text)

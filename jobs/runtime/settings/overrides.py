"""Values of settings as a command line gives them."""

import re
from typing import Any

from jobs.runtime.settings.yaml_text import YamlTextError, parse_yaml

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {  # those of YAML 1.1
    written: value
    for word, value in {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.items()
    for written in (word, word.capitalize(), word.upper())
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


def value_of(text: str, *, is_text: bool) -> Any:
    """The value of a setting.

    A list, a mapping and a text in quotes are YAML, null is none. Anything else is taken whole, whatever YAML means by its
    characters (#, :, @, *, !, %). If the setting is not a text, a number is a number, YAML's booleans (yes, off, True) are
    booleans, and blanks at either end do not count. Carriage returns at the end, as of files from Windows, never count.

    Args:
        text: what follows the = of ``dotted.key=value``.
        is_text: the setting is a text, so that 007 stays 007.

    Raises:
        YamlTextError: a list or mapping is not YAML, or too large.
    """
    text = text.rstrip("\r")
    bare = text.strip()
    if bare in _NULL:
        return None
    is_nested = bare[0] in "[{"
    if is_nested or (bare[0] in "'\"" and bare[0] == bare[-1] and len(bare) > 1):
        try:
            return parse_yaml(bare)
        except YamlTextError:
            if is_nested and not is_text:
                raise
            return text  # a path that begins with a bracket, or with one quote and ends with another
    if is_text:
        return text
    if _WHOLE.fullmatch(bare):
        return int(bare)
    if _DECIMAL.fullmatch(bare):
        return float(bare.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return _BOOLEANS.get(bare, bare)

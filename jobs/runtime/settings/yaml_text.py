"""Settings as they are written: YAML that is small, aliases included, and values on a command line."""

import re
from typing import Any

import yaml

_MOST_BYTES = 100_000  # of a text; the parser takes about a second for them
_MOST_VALUES = 10_000
_MOST_LEVELS = 50  # of nesting
_LONGEST_INTEGER = 100  # characters; Python refuses to print integers of more than 4,300 digits
_NULL = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


class YamlTextError(Exception):
    """A text is no YAML of settings. The message quotes nothing of the text, which may have secrets."""


def parse_yaml(text: str | bytes) -> Any:
    """Returns the value of a YAML document, None for an empty one.

    Raises:
        YamlTextError: the text is no YAML, or is too large, by itself or with its aliases written out.
    """
    if len(text) > _MOST_BYTES:
        raise YamlTextError(f"more than {_MOST_BYTES:,} bytes: settings are shorter")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _measure(root, {})
        return loader.construct_document(root)
    except YamlTextError:
        raise
    except RecursionError:
        raise YamlTextError(f"nested deeper than {_MOST_LEVELS} levels: write it flatter") from None
    except Exception as error:  # constructors raise what they like on a date of month 13
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise YamlTextError(f"not YAML{where}: check quotes, colons and brackets") from None


def value_of(text: str, *, is_text: bool) -> Any:
    """Returns the value of a setting.

    Lists, mappings and texts in quotes are YAML, and null is None. Any other text is taken whole, with all characters that mean
    something in YAML (#, :, @, *, !, %). If the setting is not a text, numbers and YAML's booleans (yes, off, True) are read as
    such, and blanks at either end are dropped. Carriage returns at the end, as in files from Windows, are always dropped.

    Args:
        text: what follows the = of ``dotted.key=value``.
        is_text: whether the setting is a text, so that 007 stays 007.

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
    word = bare.lower()
    is_yaml = bare in (word, word.capitalize(), word.upper())
    return yaml.SafeLoader.bool_values.get(word, bare) if is_yaml else bare


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node has and how deep they are nested, each alias counted as what it stands for.

    `measured` has the results by identity of the node; None while a node is being measured.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > _LONGEST_INTEGER:
            raise YamlTextError(f"an integer of {len(node.value):,} characters at {_place(node)}: write a shorter one")
        return 1, 0
    if id(node) in measured:
        known = measured[id(node)]
        if known is None:
            raise YamlTextError(f"the value at {_place(node)} has an alias of itself: write the value out")
        return known
    measured[id(node)] = None
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    sizes = [_measure(child, measured) for child in children]
    values, levels = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if values > _MOST_VALUES:
        raise YamlTextError(f"more than {_MOST_VALUES:,} values at {_place(node)}, aliases written out: write fewer")
    if levels > _MOST_LEVELS:
        raise YamlTextError(f"nested deeper than {_MOST_LEVELS} levels at {_place(node)}: write it flatter")
    measured[id(node)] = values, levels
    return values, levels


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"

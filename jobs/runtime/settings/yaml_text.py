"""YAML of settings: small texts, which stay small when aliases are followed."""

from typing import Any

import yaml

_MOST_BYTES = 100_000  # of a text; the parser takes about a second for them
_MOST_VALUES = 10_000
_MOST_LEVELS = 50  # of nesting
_LONGEST_INTEGER = 100  # characters; Python refuses to print integers of more than 4,300 digits


class YamlTextError(Exception):
    """A text that is no YAML of settings. The message quotes nothing of the text, which may hold secrets."""


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document, None for an empty one.

    Raises:
        YamlTextError: the text is no YAML, is too large, or becomes too large when its aliases are followed.
    """
    if len(text) > _MOST_BYTES:
        raise YamlTextError(f"more than {_MOST_BYTES:,} bytes: settings are shorter")
    loader = None
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
    finally:
        if loader:
            loader.dispose()


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node holds and how deep they are nested, each alias counted as what it stands for.

    Args:
        node: of the document.
        measured: by identity, the nodes measured before; None while a node is being measured.

    Raises:
        YamlTextError: there are too many or they lie too deep.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > _LONGEST_INTEGER:
            raise YamlTextError(f"an integer of {len(node.value):,} characters at {_place(node)}: write a shorter one")
        return 1, 0
    if id(node) in measured:
        known = measured[id(node)]
        if known is None:
            raise YamlTextError(f"the value at {_place(node)} holds an alias of itself: write the value out")
        return known
    measured[id(node)] = None
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    sizes = [_measure(child, measured) for child in children]
    values, levels = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if values > _MOST_VALUES:
        raise YamlTextError(f"more than {_MOST_VALUES:,} values at {_place(node)}, aliases followed: write fewer")
    if levels > _MOST_LEVELS:
        raise YamlTextError(f"nested deeper than {_MOST_LEVELS} levels at {_place(node)}: write it flatter")
    measured[id(node)] = values, levels
    return values, levels


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"

"""The text of a parameters cell, with other values in the place of its own.

May use: nothing of the kit.
"""

import ast
import io
import math
import tokenize
from collections.abc import Mapping
from typing import Any


def literal_text(value: Any) -> str:
    """A value as Python writes it on one line, with double quotes where they need no escape.

    value: text, numbers, booleans, None, and lists, tuples and dicts of them. Raises TypeError for anything else, such
    as a Path or an array: a parameters cell holds literals only.
    """
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(literal_text, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal_text(key)}: {literal_text(item)}" for key, item in value.items()) + "}"
    if type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{value!r} is no literal that a parameters cell can hold: give text, numbers, lists or dicts")
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    text = repr(value)
    plain = isinstance(value, str) and '"' not in value and text.startswith("'")
    return f'"{text[1:-1]}"' if plain else text


def with_values(source: str, values: Mapping[str, Any]) -> str:
    """A parameters cell with these values in the place of its literals: comments stay, one literal a line.

    source: the cell's text, of assignments `NAME = literal`; values: dict name -> value. Names that the cell does not
    assign raise ValueError, values that are no literals TypeError. A literal over several lines becomes one line; the
    comments between its lines then stand above it.
    """
    lines = source.split("\n")
    assigned = _assignments(source)
    if unknown := [name for name in values if name not in assigned]:
        raise ValueError(f"the parameters cell does not assign {', '.join(unknown)}")
    # From the last to the first, so that the places of what is still to come stay right.
    for name, node in sorted(assigned.items(), key=lambda item: (-item[1].lineno, -item[1].col_offset)):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if name not in values and first == last:
            continue
        text = literal_text(values[name] if name in values else ast.literal_eval(node.value))
        before = lines[first].encode()[: node.col_offset].decode()
        behind = lines[last].encode()[node.end_col_offset :].decode()
        between = [] if first == last else _comments(lines, first, last)
        lines[first : last + 1] = [*between, f"{before}{name} = {text}{behind}"]
    return "\n".join(lines)


def _assignments(source: str) -> dict[str, ast.Assign]:
    return {
        node.targets[0].id: node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }


def _comments(lines, first, last):
    """The comments of a literal over several lines, but the one behind its end."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines[first : last + 1])).readline)
    count = last - first + 1
    return [token.string for token in tokens if token.type == tokenize.COMMENT and token.start[0] < count]

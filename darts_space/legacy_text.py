"""A safe reader of the text, and the JSON, in which people keep DARTS-style cells.

In:  `Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=..., reduce_concat=...)`,
     also as `NAME = Genotype(...)`, with positional arguments, or with lists in place of `range`.
Out: the four arguments as nested tuples of strings and integers. `Genotype` checks whether they make sense.

The text is parsed and never executed: a file from elsewhere must not be able to run code.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

TEXT_FORM = (
    "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))"
)

FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_MAX_CHARACTERS = 8192  # a genotype takes about 700


def parse_call(text: str) -> dict[str, Any]:
    """The arguments of a single `Genotype(...)` by name; a ValueError says what else was found."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(
            f"The genotype text has {len(text)} characters, more than {_MAX_CHARACTERS}; give a single {TEXT_FORM}."
        )
    try:
        statements = ast.parse(text.strip()).body
    # Python's parser reports nesting beyond its limits as MemoryError or RecursionError.
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"The genotype text is not a single {TEXT_FORM}.") from error
    call = statements[0] if len(statements) == 1 else None
    if isinstance(call, ast.Expr | ast.Assign):  # bare, or NAME = ...
        call = call.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Genotype"):
        raise ValueError(f"The genotype text is not a single {TEXT_FORM}.")

    named = list(zip(FIELDS, call.args, strict=False))
    named += [(str(keyword.arg), keyword.value) for keyword in call.keywords]
    if len(call.args) > len(FIELDS) or sorted(name for name, _ in named) != sorted(FIELDS):
        raise ValueError(f"Genotype(...) takes {', '.join(FIELDS)}, each once; give it as {TEXT_FORM}.")
    return {name: _literal(value) for name, value in named}


def calls_in(text: str) -> Iterator[tuple[str, str]]:
    """Every `Genotype(...)` in a longer text, such as a log: where it is, and its text up to the closing bracket.

    One that is not closed comes with what follows it.
    """
    for match in re.finditer(r"(?:\b(\w+)\s*=\s*)?(?<!\w)Genotype\(", text):
        start = match.end() - len("Genotype(")
        line = f"line {text.count(chr(10), 0, start) + 1}"
        place = f"{match[1]} ({line})" if match[1] else line
        depth, quote = 0, ""
        for position, character in enumerate(text[start : start + _MAX_CHARACTERS], start):
            if quote:
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            elif character in "([":
                depth += 1
            elif character in ")]" and (depth := depth - 1) == 0:
                yield place, text[start : position + 1]
                break
        else:
            yield place, text[start : start + _MAX_CHARACTERS]


def lines_of_json(text: str) -> list[Any]:
    """The documents of a text with one in every line, empty where that is not so."""
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return []


def fields_in(document: Any) -> list[dict[str, Any]]:
    """The objects with the four fields of a genotype, anywhere in JSON, in their order."""
    if isinstance(document, dict) and set(FIELDS) <= set(document):
        return [{name: document[name] for name in FIELDS}]
    parts = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return [found for part in parts for found in fields_in(part)]


def _is_numpy_integer(function: ast.expr) -> bool:
    """Whether it is np.int64 or the like, as numpy 2 writes its integers."""
    named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return named and function.value.id in ("np", "numpy") and re.fullmatch(r"u?int\d*_?", function.attr) is not None


def _literal(node: ast.expr) -> Any:
    """Lists, tuples, strings, integers and small ranges; the parser allows at most 200 nested brackets."""
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_literal(element) for element in node.elts)
    if isinstance(node, ast.Constant) and type(node.value) in (str, int):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [_literal(argument) for argument in node.args]
        # The bound keeps range(10 ** 9) from being written out.
        small = all(type(b) is int and 0 <= b <= 100 for b in bounds)
        if not node.keywords and len(bounds) in (1, 2, 3) and small and bounds[2:] != [0]:
            return tuple(range(*bounds))
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        value = _literal(node.args[0])
        if _is_numpy_integer(node.func) and type(value) is int:
            return value
        if isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple") and type(value) is tuple:
            return value
    raise ValueError(
        f"The genotype text has a {type(node).__name__} at line {node.lineno}, column {node.col_offset + 1}, but only "
        f"operation names, integers, lists, tuples and range(2, 6) may occur in {TEXT_FORM}."
    )

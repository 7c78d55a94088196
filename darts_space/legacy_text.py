"""A safe reader of the text in which DARTS-style projects publish their cells.

In:  `Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=..., reduce_concat=...)`,
     also as `NAME = Genotype(...)`, with positional arguments, or with lists in place of `range`.
Out: the four arguments as nested tuples of strings and integers. `Genotype` checks whether they make sense.

The text is parsed and never executed: a file from elsewhere must not be able to run code.
"""

from __future__ import annotations

import ast
from typing import Any

TEXT_FORM = (
    "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))"
)

_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
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

    named = list(zip(_FIELDS, call.args, strict=False))
    named += [(str(keyword.arg), keyword.value) for keyword in call.keywords]
    if len(call.args) > len(_FIELDS) or sorted(name for name, _ in named) != sorted(_FIELDS):
        raise ValueError(f"Genotype(...) takes {', '.join(_FIELDS)}, each once; give it as {TEXT_FORM}.")
    return {name: _literal(value) for name, value in named}


def _literal(node: ast.expr) -> Any:
    """Lists, tuples, strings, integers and small ranges; the parser allows at most 200 nested brackets."""
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_literal(element) for element in node.elts)
    if isinstance(node, ast.Constant) and type(node.value) in (str, int):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [_literal(argument) for argument in node.args]
        # The bound keeps range(10 ** 9) from being written out.
        if not node.keywords and len(bounds) in (1, 2) and all(type(b) is int and b <= 100 for b in bounds):
            return tuple(range(*bounds))
    raise ValueError(
        f"The genotype text has a {type(node).__name__} at line {node.lineno}, column {node.col_offset + 1}, but only "
        f"operation names, integers, lists, tuples and range(2, 6) may occur in {TEXT_FORM}."
    )

"""Cells of the DARTS search space: what they are made of, and a check of those that come from outside.

In:  a cell as written in a genotype, eight (operation, input) pairs and the states to concatenate.
Out: the same as tuples, or a ValueError that names the edge.

A cell (DARTS section 2.1; PC-DARTS section 3.1) has two input states, 0 and 1 (the outputs of the cells two and
one before it), and four nodes, states 2..5. Node i adds two edges, each an operation on one of the 2 + i states
before it; its output is the concatenation of the four nodes. While searching, all 14 edges exist, each with all
eight operations: the rows and columns of the alpha tables.
"""

from __future__ import annotations

import reprlib
from numbers import Integral
from typing import Any

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The eight candidate operations; the position is the column of the alpha table."""

NODES = 4
EDGES = 14
GENOTYPE_EDGES = 2 * 2 * NODES
"""Edges that a genotype keeps: two for each node, in both cells."""
CONCAT = (2, 3, 4, 5)

Edge = tuple[str, int]


def node_rows(node: int) -> range:
    """Rows of node 0..3 in the (14, 8) alpha and (14,) beta tables: 0:2, 2:5, 5:9, 9:14, by input state."""
    start = node * (node + 3) // 2
    return range(start, start + 2 + node)


STATES = ((0, 1), (2,), (3,), (4,))
"""The states that send edges, in the order in which they are computed; the two inputs come together."""


def edge_rows(states: tuple[int, ...]) -> list[int]:
    """Rows in the alpha and beta tables of the edges that leave `states`: by state, then by the node they enter."""
    return [node_rows(node)[state] for state in states for node in range(max(0, state - 1), NODES)]


def checked_edges(cell: str, edges: Any) -> tuple[Edge, ...]:
    """The eight edges of the "normal" or "reduce" cell as tuples; any flaw is a ValueError.

    Pairs may be nested by node, and inputs be integers of any library.
    """
    edges = _without_nodes(edges)
    if not isinstance(edges, list | tuple) or len(edges) != 2 * NODES:
        found = len(edges) if isinstance(edges, list | tuple) else reprlib.repr(edges)
        raise ValueError(
            f"The {cell} cell of a genotype needs {2 * NODES} (operation, input) pairs, two for each of its "
            f"{NODES} nodes, but has {found}."
        )
    for position, edge in enumerate(edges):
        where = f"Edge {position} of the {cell} cell (node {position // 2})"
        if not isinstance(edge, list | tuple) or len(edge) != 2:
            raise ValueError(f"{where} is {reprlib.repr(edge)}; write it as ('sep_conv_3x3', 0).")
        operation, source = edge
        if operation not in PRIMITIVES[1:]:
            reason = "is never part of a genotype" if operation == "none" else "is unknown"
            raise ValueError(
                f"{where} has the operation {reprlib.repr(operation)}, which {reason}; use one of "
                f"{', '.join(PRIMITIVES[1:])}."
            )
        if not isinstance(source, Integral) or isinstance(source, bool) or not 0 <= source < 2 + position // 2:
            raise ValueError(
                f"{where} has the input {reprlib.repr(source)}; use an integer from 0 to {1 + position // 2}, a "
                "state before the node."
            )
        if position % 2 == 1 and source == edges[position - 1][1]:
            raise ValueError(f"{where} has the input {source} like the edge before it; use two distinct inputs.")
    return tuple((str(operation), int(source)) for operation, source in edges)


def _without_nodes(edges: Any) -> Any:
    """Eight pairs where four nodes of two pairs were given, anything else as it is."""
    nested = isinstance(edges, list | tuple) and len(edges) == NODES
    if nested and all(isinstance(node, list | tuple) and len(node) == 2 for node in edges):
        pairs = [pair for node in edges for pair in node]
        return pairs if all(isinstance(pair, list | tuple) for pair in pairs) else edges
    return edges


def checked_concat(cell: str, concat: Any) -> tuple[int, ...]:
    """(2, 3, 4, 5), the only concatenation of this search space; any other is a ValueError."""
    if not isinstance(concat, list | tuple | range) or tuple(concat[:5]) != CONCAT:
        raise ValueError(
            f"{cell}_concat is {reprlib.repr(concat)}; it must be (2, 3, 4, 5), since a cell's output is the "
            "concatenation of its four nodes."
        )
    return CONCAT

"""State dicts of the plain and of the fast supernet, converted into each other.

In:  the state dict of one form's supernet, or of one of its cells; or any dict with these names and shapes.
Out: the other form's, with the same values. Tensors of edges are copied, all others are passed on.

The plain form has a tensor for each operation of each edge; the fast form stacks those of all edges that leave a state.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from darts_space.cell import PRIMITIVES, STATES, edge_rows

_POOLS = [PRIMITIVES.index(name) for name in ("max_pool_3x3", "avg_pool_3x3")]
_SEPARABLE = [PRIMITIVES.index(name) for name in ("sep_conv_3x3", "sep_conv_5x5")]
_DILATED = [PRIMITIVES.index(name) for name in ("dil_conv_3x3", "dil_conv_5x5")]
_SKIP = PRIMITIVES.index("skip_connect")
_BLOCKS = ((_SEPARABLE, 1), (_SEPARABLE, 5), (_DILATED, 1))
"""The operations of each depthwise-separable block, and the place of its depthwise convolution in them."""


def from_plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the `SuperNet` (or its cell) that computes what the plain form with this state computes."""
    result = {name: value for name, value in state.items() if "edges." not in name}
    for cell in _cells(state):
        for group, states in enumerate(STATES):
            parts: dict[str, dict[tuple[int, ...], Tensor]] = {}
            for edge, row in enumerate(edge_rows(states)):
                for name, index, plain_name in _correspondence(edge, states):
                    if (value := state.get(f"{cell}edges.{row}.operations.{plain_name}")) is not None:
                        parts.setdefault(name, {})[index] = value
            for name, values in parts.items():
                result[f"{cell}edges.{group}.{name}"] = _stacked(values)
    return result


def to_plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the `PlainSuperNet` (or its cell) that computes what the fast form with this state computes.

    For whoever takes a trained supernet apart: in the plain form single operations can be read, changed or left out.
    """
    result = {name: value for name, value in state.items() if "edges." not in name}
    for cell in _cells(state):
        for group, states in enumerate(STATES):
            for edge, row in enumerate(edge_rows(states)):
                for name, index, plain_name in _correspondence(edge, states):
                    stacked = state.get(f"{cell}edges.{group}.{name}")
                    if stacked is None or index[0] >= len(stacked):  # only strided edges have weights in their skip
                        continue
                    plain = f"{cell}edges.{row}.operations.{plain_name}"
                    result[plain] = stacked[index].clone()
                    if name.endswith("_var"):
                        batches = state[f"{cell}preprocess1.2.num_batches_tracked"]  # every norm has seen the same
                        result[plain.replace("running_var", "num_batches_tracked")] = batches.clone()
    return result


def _cells(state: dict[str, Tensor]) -> list[str]:
    """What the names of each cell begin with: "cells.0." and so on, or "" if the state is a single cell's."""
    return sorted({name.partition("edges.")[0] for name in state if "edges." in name})


def _correspondence(edge: int, states: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Where the tensors of one edge are: the name in the fast form, the index in it, the name in the plain form."""
    source = edge * len(states) // len(edge_rows(states))
    for pool, operation in enumerate(_POOLS):
        yield from _norm("running_pools", (pool, source), f"{operation}.1")
    for block, (operations, position) in enumerate(_BLOCKS):
        for size, operation in enumerate(operations):
            depthwise = ("depthwise_3x3", "depthwise_5x5")[size]
            yield depthwise, (block, edge), f"{operation}.{position}.weight"
            yield "pointwise", (block, size, edge), f"{operation}.{position + 1}.weight"
            yield from _norm("running", (2 * block + size, edge), f"{operation}.{position + 2}")
    for half, name in enumerate(("conv_even", "conv_odd")):
        yield "skip", (half, edge), f"{_SKIP}.{name}.weight"
    yield from _norm("running", (6, edge), f"{_SKIP}.bn")


def _norm(kind: str, index: tuple[int, ...], plain_name: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for statistic in ("mean", "var"):
        yield f"{kind}_{statistic}", index, f"{plain_name}.running_{statistic}"


def _stacked(parts: dict[tuple[int, ...], Tensor]) -> Tensor:
    """One tensor with each part at its index; all `parts` have one shape."""
    some = next(iter(parts.values()))
    sizes = [1 + max(places) for places in zip(*parts, strict=True)]
    result = some.new_empty(*sizes, *some.shape)
    for index, value in parts.items():
        result[index] = value
    return result

"""Derive the genotype from a supernet's architecture tables, and measure how sure that choice is.

In:  alpha (14, 8) and beta (14,) of the normal and of the reduction cell, raw values before any softmax; optionally
     how much the supernet needs each edge, (14,) for either cell.
Out: a `Genotype`; `Diagnostics` for the log.

The score of operation o on edge e is softmax(alpha)[e, o] * softmax_in_node(beta)[e] (PC-DARTS section 3.3).
Every node keeps the two edges with the largest scores, or the two that it needs most, and on each its best operation.
`none` counts in the softmax and is never chosen. Ties go to the lower edge and to the lower operation, as published;
everything is computed in float64 on the CPU, so that a genotype does not depend on the device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from darts_space.cell import CONCAT, EDGES, NODES, PRIMITIVES, Edge, node_rows
from darts_space.genotype import Genotype

EdgesBy = Literal["alpha", "alpha-beta", "removal", "inputs"]
"""What chooses the edges of a node: their best operation's alpha; its product with beta (PC-DARTS section 3.3); by how
much the loss rises if the edge is removed (`removal`; Wang et al., ICLR 2021); or nothing: they come from the two
inputs of the cell (`inputs`), so that alpha chooses the operations alone."""

Removal = tuple[Tensor, Tensor]
"""Rise of the loss in nats if an edge is removed: (14,) of the normal and of the reduction cell."""


Scores = list[list[float]]


class Diagnostics(NamedTuple):
    """What to watch while a search runs."""

    margin_normal: float
    """How far the closest decision is from flipping: the smallest difference between the weaker chosen edge of a
    node and its best rejected edge, or between a chosen operation and the second best. Scores are probabilities, 0..1;
    edges that are not chosen by a score do not count."""
    margin_reduce: float
    entropy_normal: float
    """Mean entropy of the rows of softmax(alpha) in nats: log(8) = 2.079 before the search, 0 when decided."""
    entropy_reduce: float
    skips_normal: int
    """Skip connections among the eight chosen operations."""
    skips_reduce: int
    pools_normal: int
    """Pools among the eight chosen operations: a search whose weights are untrained chooses them."""
    pools_reduce: int


def normalised_betas(betas: Tensor) -> Tensor:
    """Edge weights (14,): the softmax over the incoming edges of each node, so that every node's sum to one."""
    return torch.cat([betas[rows.start : rows.stop].softmax(0) for rows in map(node_rows, range(NODES))])


def derive(
    alphas_normal: Tensor,
    betas_normal: Tensor,
    alphas_reduce: Tensor,
    betas_reduce: Tensor,
    *,
    edges_by: EdgesBy = "alpha-beta",
    removal: Removal | None = None,
) -> Genotype:
    """The genotype of the tables. By "alpha" alone, beta plays no part in the choice of edges: DARTS's rule.

    "removal" needs `removal`, and no other rule uses it. Raises ValueError for tables that are not finite.
    """
    normal = _scores("normal", alphas_normal, betas_normal, edges_by)
    reduce = _scores("reduce", alphas_reduce, betas_reduce, edges_by)
    strengths = _strengths((normal, reduce), edges_by, removal)
    return _genotype((normal, reduce), strengths)


def diagnose(
    alphas_normal: Tensor,
    betas_normal: Tensor,
    alphas_reduce: Tensor,
    betas_reduce: Tensor,
    *,
    edges_by: EdgesBy = "alpha-beta",
    removal: Removal | None = None,
) -> Diagnostics:
    """Margins, entropies, skip connections and pools of the tables; arguments as for `derive`."""
    normal = _scores("normal", alphas_normal, betas_normal, edges_by)
    reduce = _scores("reduce", alphas_reduce, betas_reduce, edges_by)
    strengths = _strengths((normal, reduce), edges_by, removal)
    genotype = _genotype((normal, reduce), strengths)
    by_score = edges_by in ("alpha", "alpha-beta")
    return Diagnostics(
        _margin(normal, strengths[0], by_score),
        _margin(reduce, strengths[1], by_score),
        _mean_entropy(alphas_normal),
        _mean_entropy(alphas_reduce),
        *genotype.skip_connections(),
        *genotype.pools(),
    )


def _scores(cell: str, alphas: Tensor, betas: Tensor, edges_by: EdgesBy) -> Scores:
    """The (14, 7) scores without the column of `none`, so that column c is PRIMITIVES[c + 1]."""
    alphas, betas = torch.as_tensor(alphas), torch.as_tensor(betas)
    for name, table, shape in (
        (f"alphas_{cell}", alphas, (EDGES, len(PRIMITIVES))),
        (f"betas_{cell}", betas, (EDGES,)),
    ):
        if tuple(table.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(table.shape)}, but a cell's table has {shape}.")
        if not table.isfinite().all():
            raise ValueError(f"{name} has values that are not finite: the search has diverged; lower its rates.")
    scores = alphas.detach().to("cpu", torch.float64).softmax(1)
    if edges_by == "alpha-beta":
        scores = scores * normalised_betas(betas.detach().to("cpu", torch.float64))[:, None]
    return scores[:, 1:].tolist()


def _strengths(scores: tuple[Scores, Scores], edges_by: EdgesBy, removal: Removal | None) -> list[list[float]]:
    """What ranks the edges of the normal and of the reduction cell."""
    if edges_by in ("alpha", "alpha-beta"):
        return [[max(row) for row in cell] for cell in scores]
    if edges_by == "inputs":  # the states before a node, the cell's inputs first
        return [[-float(state) for node in range(NODES) for state in range(len(node_rows(node)))]] * 2
    if removal is None:
        raise ValueError('edges_by "removal" needs `removal`, how much the loss rises without each edge.')
    for cell, rises in zip(("normal", "reduce"), removal, strict=True):
        if tuple(rises.shape) != (EDGES,) or not rises.isfinite().all():
            raise ValueError(f"removal of the {cell} cell must be {EDGES} finite numbers.")
    return [rises.detach().to("cpu", torch.float64).tolist() for rises in removal]


def _ranked_rows(strengths: list[float], node: int) -> list[int]:
    """The node's rows, strongest first; `sorted` keeps the lower row first in a tie."""
    return sorted(node_rows(node), key=lambda row: -strengths[row])


def _genotype(scores: tuple[Scores, Scores], strengths: list[list[float]]) -> Genotype:
    normal, reduce = map(_chosen_edges, scores, strengths)
    return Genotype(normal, CONCAT, reduce, CONCAT)


def _chosen_edges(scores: Scores, strengths: list[float]) -> list[Edge]:
    edges = []
    for node in range(NODES):
        for row in _ranked_rows(strengths, node)[:2]:
            operation = PRIMITIVES[1 + scores[row].index(max(scores[row]))]
            edges.append((operation, row - node_rows(node).start))
    return edges


def _margin(scores: Scores, strengths: list[float], by_score: bool) -> float:
    margins = []
    for node in range(NODES):
        ranked = _ranked_rows(strengths, node)
        if by_score and len(ranked) > 2:  # the first node keeps both of its edges
            margins.append(strengths[ranked[1]] - strengths[ranked[2]])
        for row in ranked[:2]:
            best, second = sorted(scores[row], reverse=True)[:2]
            margins.append(best - second)
    return min(margins)


def _mean_entropy(alphas: Tensor) -> float:
    log_weights = torch.as_tensor(alphas).detach().to("cpu", torch.float64).log_softmax(1)
    return float(-(log_weights.exp() * log_weights).sum(1).mean())

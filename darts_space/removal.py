"""How much a supernet needs each of its edges: by how much the loss rises if the edge is removed.

In:  a supernet, a function from a batch to its mean loss, and batches from the architecture half.
Out: the rise in nats, (14,) of the normal and of the reduction cell.

In a short search neither alpha nor beta chooses a node's two inputs better than chance (studies/search_quality); the
supernet itself knows them. Wang et al. ("Rethinking Architecture Selection in Differentiable NAS", ICLR 2021) read
operations and edges off it like this. Here only the edges are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from darts_space.cell import EDGES, node_rows
from darts_space.derivation import Removal
from darts_space.search_network import SearchNetwork

Batch = tuple[Tensor, Tensor]

REMOVAL_PASSES = 1 + 2 * (EDGES - len(node_rows(0)))
"""Passes over the batches: one of the whole supernet, one without each edge of both cells that can be removed."""


@torch.no_grad()
def removal_losses(model: SearchNetwork, loss: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> Removal:
    """The rise of the mean of `loss` over equally large `batches`, on the CPU; the edges of the first node get 0.

    Each edge alone is removed from all cells of its kind: its beta becomes minus infinity, so that the softmax shares
    its weight out among the other edges of the node. The first node has two edges and keeps both. BatchNorm uses the
    statistics of each batch. Afterwards the model is as it was. Raises ValueError without edge normalisation.
    """
    if not model.edge_normalisation:
        raise ValueError("Without edge normalisation no edge can be removed; choose the edges by alpha.")
    before = [buffer.clone() for buffer in model.buffers()]
    was_training = model.training
    model.train()

    def mean_loss() -> Tensor:
        return torch.stack([loss(batch) for batch in batches]).cpu().double().mean()  # MPS lacks float64

    def rise_without(betas: Tensor, row: int) -> Tensor:
        kept = betas[row].clone()
        betas[row] = -torch.inf
        try:
            return mean_loss() - whole
        finally:
            betas[row] = kept

    try:
        whole, rises = mean_loss(), []
        for betas in (model.betas_normal, model.betas_reduce):
            rise = torch.zeros(EDGES, dtype=torch.float64)
            for row in range(len(node_rows(0)), EDGES):
                rise[row] = rise_without(betas, row)
            rises.append(rise)
    finally:
        model.train(was_training)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return rises[0], rises[1]

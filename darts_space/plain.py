"""The partial-channel supernet in its plain form, one operation at a time: written to be read, and to check by.

In:  images (N, 3, H, W), float, normalised; H and W divisible by 4 (CIFAR stem) or by 32 (ImageNet stem).
Out: logits (N, num_classes). `darts_space.fast.supernet` computes the same several times as fast.

The reading order is the paper's (PC-DARTS):
- `PartialChannelEdge`, section 3.2: an edge sends the first 1/K of its channels through all operations, mixed by
  softmax(alpha) (equation 1), and lets the others bypass them (equation 2). A channel shuffle afterwards, as in
  the published code, brings the bypassed channels to the front too, where the next edge mixes them.
- `PlainCell`, section 3.3: a node is the sum of its incoming edges, weighted by softmax(beta) over them.
- `SearchNetwork`: stem, cells, global average pool, linear. All cells of one type share alpha and beta.

With `partial=1, edge_normalisation=False` the whole is DARTS. Deviations from the published code, none of which
changes a value: the softmaxes are taken once per forward pass instead of once per cell, and the ImageNet network
runs each edge once (the published script runs it twice).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_space.cell import NODES, PRIMITIVES, node_rows
from darts_space.primitives import FactorizedReduce, ReLUConvBN, build_operation
from darts_space.search_network import SearchNetwork


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the `groups` equal blocks of channels of x (N, C, H, W): 0 1 2 3 becomes 0 2 1 3 for two."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class PartialChannelEdge(nn.Module):
    """One edge: (N, C, H, W) and its eight mixing weights -> (N, C, H / stride, W / stride)."""

    def __init__(self, channels: int, stride: int, partial: int):
        super().__init__()
        self.partial = partial
        self.mixed_channels = channels // partial
        self.operations = nn.ModuleList()
        for name in PRIMITIVES:
            operation = build_operation(name, self.mixed_channels, stride, affine=False)
            if "pool" in name:  # as published: the convolutions end in a BatchNorm, so the pools need one to compare
                operation = nn.Sequential(operation, nn.BatchNorm2d(self.mixed_channels, affine=False))
            self.operations.append(operation)
        self.bypass = nn.MaxPool2d(2, 2) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        mixed = x[:, : self.mixed_channels]
        mixed = sum(weight * operation(mixed) for weight, operation in zip(weights, self.operations, strict=True))
        if self.partial == 1:
            return mixed
        bypass = self.bypass(x[:, self.mixed_channels :])
        return channel_shuffle(torch.cat([mixed, bypass], dim=1), self.partial)


class PlainCell(nn.Module):
    """Two states in, four nodes, their concatenation (N, 4 * channels, H, W) out; H and W halved if `reduces`."""

    def __init__(
        self, in_channels: tuple[int, int], channels: int, partial: int, reduces: bool, previous_reduces: bool
    ):
        super().__init__()
        # Where the cell before reduced, the state from two cells before is still twice as large.
        preprocess0 = FactorizedReduce if previous_reduces else ReLUConvBN
        self.preprocess0 = preprocess0(in_channels[0], channels, affine=False)
        self.preprocess1 = ReLUConvBN(in_channels[1], channels, affine=False)
        self.edges = nn.ModuleList()  # in the order of the alpha and beta tables
        for node in range(NODES):
            for state in range(2 + node):
                stride = 2 if reduces and state < 2 else 1
                self.edges.append(PartialChannelEdge(channels, stride, partial))

    def forward(self, state0: Tensor, state1: Tensor, alphas: Tensor, betas: Tensor) -> Tensor:
        """`alphas` (14, 8) and `betas` (14,) are weights, the softmaxes already taken."""
        states = [self.preprocess0(state0), self.preprocess1(state1)]
        for node in range(NODES):
            rows = node_rows(node)
            edges = [betas[row] * self.edges[row](state, alphas[row]) for row, state in zip(rows, states, strict=True)]
            states.append(sum(edges))
        return torch.cat(states[2:], dim=1)


class PlainSuperNet(SearchNetwork):
    """The search network of plain cells."""

    cell = PlainCell

"""The partial-channel supernet: every operation of every edge at once, mixed by architecture parameters.

In:  images (N, 3, H, W), float, normalised; H and W divisible by 4 (CIFAR stem) or by 32 (ImageNet stem).
Out: logits (N, num_classes); a `Genotype` once the architecture parameters have been learnt.

The reading order is the paper's (PC-DARTS):
- `PartialChannelEdge`, section 3.2: an edge sends the first 1/K of its channels through all operations, mixed by
  softmax(alpha) (equation 1), and lets the others bypass them (equation 2). A channel shuffle afterwards, as in
  the published code, brings the bypassed channels to the front too, where the next edge mixes them.
- `Cell`, section 3.3: a node is the sum of its incoming edges, weighted by softmax(beta) over them.
- `SuperNet`: stem, cells, global average pool, linear. All cells of one type share alpha and beta.

With `partial=1, edge_normalisation=False` the whole is DARTS. Deviations from the published code, none of which
changes a value: the softmaxes are taken once per forward pass instead of once per cell, and the ImageNet network
runs each edge once (the published script runs it twice).

This is the plain form, one operation at a time: written to be read, and the reference for faster ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_space.cell import EDGES, NODES, PRIMITIVES, node_rows
from darts_space.derivation import Diagnostics, derive, diagnose, normalised_betas
from darts_space.genotype import Genotype
from darts_space.primitives import (
    FactorizedReduce,
    ReLUConvBN,
    build_operation,
    build_stems,
    initialised_from,
)

STEM_MULTIPLIER = 3  # the stem is this many times wider than the first cell's nodes
ARCHITECTURE_NAMES = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")


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


class Cell(nn.Module):
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


class SuperNet(nn.Module):
    """The search network. `arch_parameters()` are alpha and beta, `weight_parameters()` all others."""

    def __init__(
        self,
        channels: int = 16,
        num_classes: int = 10,
        layers: int = 8,
        partial: int = 4,
        stem: str = "cifar",
        edge_normalisation: bool = True,
        *,
        generator: torch.Generator | None = None,
    ):
        """Build and initialise.

        `channels` is the width of the first cell's nodes, divisible by `partial`, the paper's K: 4 on CIFAR, 2 on
        ImageNet. `layers` counts the cells; those at layers // 3 and 2 * layers // 3 halve H and W and double
        the width. `edge_normalisation=False` sums a node's edges unweighted and leaves beta unused.

        `generator` (a CPU one) fixes weights, alpha and beta; without it PyTorch's own is used, as in any module.
        """
        super().__init__()
        if layers < 3:
            raise ValueError(f"The supernet needs at least 3 layers to hold both kinds of cell, not {layers}.")
        if partial < 1 or channels < 1 or channels % partial:
            raise ValueError(
                f"The {channels} channels cannot be divided into {partial} equal parts; choose channels that are a "
                "multiple of partial."
            )
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"There is no stem {stem!r}; use 'cifar' or 'imagenet'.")
        if stem == "imagenet" and channels % 2:
            raise ValueError(f"The imagenet stem halves its width, so {channels} channels must be even.")
        self.stem = stem
        self.edge_normalisation = edge_normalisation
        self.input_multiple = 4 if stem == "cifar" else 32

        with initialised_from(generator):
            self._build_layers(channels, num_classes, layers, partial)
            for name in ARCHITECTURE_NAMES:
                shape = (EDGES, len(PRIMITIVES)) if name.startswith("alphas") else (EDGES,)
                self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(shape)))

    def _build_layers(self, channels: int, num_classes: int, layers: int, partial: int) -> None:
        width = STEM_MULTIPLIER * channels
        self.stem0, self.stem1 = build_stems(self.stem, width)
        self.reductions = (layers // 3, 2 * layers // 3)
        self.cells = nn.ModuleList()
        in_channels = (width, width)
        previous_reduces = self.stem == "imagenet"  # stem1 halves the resolution of stem0
        for index in range(layers):
            reduces = index in self.reductions
            channels *= 2 if reduces else 1
            self.cells.append(Cell(in_channels, channels, partial, reduces, previous_reduces))
            in_channels = (in_channels[1], NODES * channels)
            previous_reduces = reduces
        self.classifier = nn.Linear(in_channels[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, num_classes)."""
        if images.dim() != 4 or images.shape[2] % self.input_multiple or images.shape[3] % self.input_multiple:
            raise ValueError(
                f"The {self.stem} supernet takes images (N, 3, H, W) with H and W divisible by "
                f"{self.input_multiple}, not {tuple(images.shape)}; resize or pad them."
            )
        weights = {True: self._mixing_weights("reduce"), False: self._mixing_weights("normal")}
        state0 = self.stem0(images)
        state1 = self.stem1(state0)
        for index, cell in enumerate(self.cells):
            state0, state1 = state1, cell(state0, state1, *weights[index in self.reductions])
        return self.classifier(state1.mean(dim=(2, 3)))

    def _mixing_weights(self, cell: str) -> tuple[Tensor, Tensor]:
        """Operation weights (14, 8) and edge weights (14,) of one type of cell."""
        alphas, betas = getattr(self, f"alphas_{cell}"), getattr(self, f"betas_{cell}")
        return alphas.softmax(1), normalised_betas(betas) if self.edge_normalisation else torch.ones_like(betas)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The architecture parameters in use: both alphas, and both betas under edge normalisation."""
        names = ARCHITECTURE_NAMES if self.edge_normalisation else ARCHITECTURE_NAMES[:2]
        return [getattr(self, name) for name in names]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but alpha and beta."""
        return [parameter for name, parameter in self.named_parameters() if name not in ARCHITECTURE_NAMES]

    def genotype(self) -> Genotype:
        """The genotype of the present alpha and beta."""
        return derive(**self._tables(), edge_normalisation=self.edge_normalisation)

    def diagnostics(self) -> Diagnostics:
        """Margins, entropies and skip connections of the present alpha and beta."""
        return diagnose(**self._tables(), edge_normalisation=self.edge_normalisation)

    def _tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ARCHITECTURE_NAMES}

"""What the plain and the fast supernet share: alpha and beta, stems, the row of cells, the classifier.

In:  images (N, 3, H, W), float, normalised; H and W divisible by 4 (CIFAR stem) or by 32 (ImageNet stem).
Out: logits (N, num_classes); a `Genotype` once the architecture parameters have been learnt.

Only the cell differs, and each subclass names its own (PC-DARTS section 3; the published code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from darts_space.cell import EDGES, NODES, PRIMITIVES
from darts_space.derivation import Diagnostics, EdgesBy, Removal, derive, diagnose, normalised_betas
from darts_space.genotype import Genotype
from darts_space.primitives import STEM_MULTIPLIER, build_stems, initialised_from

INPUT_MULTIPLES = {"cifar": 4, "imagenet": 32}
"""What H and W of the images must be divisible by, by stem: stem and reduction cells halve them two or five times."""
ARCHITECTURE_NAMES = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")


def check_shape(channels: int, layers: int, partial: int, stem: str) -> None:
    """Raise a ValueError for a network that cannot be built; the arguments are those of `SearchNetwork`."""
    if layers < 3:
        raise ValueError(f"The supernet needs at least 3 layers to hold both kinds of cell, not {layers}.")
    if partial < 1 or channels < 1 or channels % partial:
        raise ValueError(
            f"The {channels} channels cannot be divided into {partial} equal parts; choose channels that are a "
            "multiple of partial."
        )
    if stem not in INPUT_MULTIPLES:
        raise ValueError(f"There is no stem {stem!r}; use {' or '.join(map(repr, INPUT_MULTIPLES))}.")
    if stem == "imagenet" and channels % 2:
        raise ValueError(f"The imagenet stem halves its width, so {channels} channels must be even.")


class SearchNetwork(nn.Module):
    """The search network. `arch_parameters()` are alpha and beta, `weight_parameters()` all others.

    Subclasses name their `cell`, built as cell(in_channels, channels, partial, reduces, previous_reduces) and called
    as cell(state0, state1, *mixing weights).
    """

    cell: ClassVar[Callable[..., nn.Module]]

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
        check_shape(channels, layers, partial, stem)
        self.stem = stem
        self.partial = partial
        self.edge_normalisation = edge_normalisation

        with initialised_from(generator):
            self._build_layers(channels, num_classes, layers)
            for name in ARCHITECTURE_NAMES:
                shape = (EDGES, len(PRIMITIVES)) if name.startswith("alphas") else (EDGES,)
                self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(shape)))

    def _build_layers(self, channels: int, num_classes: int, layers: int) -> None:
        width = STEM_MULTIPLIER * channels
        self.stem0, self.stem1 = build_stems(self.stem, width)
        self.reductions = (layers // 3, 2 * layers // 3)
        self.cells = nn.ModuleList()
        in_channels = (width, width)
        previous_reduces = self.stem == "imagenet"  # stem1 halves the resolution of stem0
        for index in range(layers):
            reduces = index in self.reductions
            channels *= 2 if reduces else 1
            self.cells.append(self.cell(in_channels, channels, self.partial, reduces, previous_reduces))
            in_channels = (in_channels[1], NODES * channels)
            previous_reduces = reduces
        self.classifier = nn.Linear(in_channels[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, num_classes)."""
        multiple = INPUT_MULTIPLES[self.stem]
        if images.dim() != 4 or images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"The {self.stem} supernet takes images (N, 3, H, W) with H and W divisible by {multiple}, not "
                f"{tuple(images.shape)}; resize or pad them."
            )
        weights = {True: self._mixing_weights("reduce"), False: self._mixing_weights("normal")}
        state0 = self.stem0(images)
        state1 = self.stem1(state0)
        for index, cell in enumerate(self.cells):
            state0, state1 = state1, cell(state0, state1, *weights[index in self.reductions])
        return self.classifier(state1.mean(dim=(2, 3)))

    def _mixing_weights(self, cell: str) -> tuple[Tensor, Tensor]:
        """Operation weights (14, 8) and edge weights (14,) of one type of cell: softmaxes of alpha and beta."""
        alphas, betas = getattr(self, f"alphas_{cell}"), getattr(self, f"betas_{cell}")
        return alphas.softmax(1), normalised_betas(betas) if self.edge_normalisation else torch.ones_like(betas)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The architecture parameters in use: both alphas, and both betas under edge normalisation."""
        names = ARCHITECTURE_NAMES if self.edge_normalisation else ARCHITECTURE_NAMES[:2]
        return [getattr(self, name) for name in names]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters except alpha and beta."""
        return [parameter for name, parameter in self.named_parameters() if name not in ARCHITECTURE_NAMES]

    def genotype(self, edges_by: EdgesBy = "alpha-beta", removal: Removal | None = None) -> Genotype:
        """The genotype of the present alpha and beta; see `derive`. Without edge normalisation beta has no part."""
        return derive(**self._tables(), edges_by=self._rule(edges_by), removal=removal)

    def diagnostics(self, edges_by: EdgesBy = "alpha-beta", removal: Removal | None = None) -> Diagnostics:
        """Margins, entropies, skip connections and pools of the present alpha and beta."""
        return diagnose(**self._tables(), edges_by=self._rule(edges_by), removal=removal)

    def _rule(self, edges_by: EdgesBy) -> EdgesBy:
        return "alpha" if edges_by == "alpha-beta" and not self.edge_normalisation else edges_by

    def _tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ARCHITECTURE_NAMES}

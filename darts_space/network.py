"""The networks of a genotype: its cells stacked, and trained with all their channels.

In:  a `Genotype`; images (N, 3, H, W), float, normalised, of any size that the auxiliary head allows.
Out: logits (N, num_classes). In training mode a network with an auxiliary head returns the pair
     (logits, auxiliary logits); in evaluation mode, and without the head, logits alone.

`CifarNetwork` and `ImageNetNetwork` are those of PC-DARTS sections 4.2 and 4.3, which are DARTS's (section 3.2): a
stem, `layers` cells of which those at layers // 3 and 2 * layers // 3 reduce, global average pool, linear. The
regularisers are here and their schedules are the caller's: the papers weigh the auxiliary loss by 0.4 and let the
drop-path probability grow linearly, p * epoch / epochs.

Deviations from the published code, none of which changes a value at 32 or 224 px: strided paths round odd sizes up,
the auxiliary head shrinks its pool on small maps and averages over large ones, and the final pool covers any map.

This is the plain form, one operation after the other. Of the optimisations measured on a CPU (benchmarks/network.py)
three are worth having: the memory format channels_last, 1.2 to 1.8 times as fast, which is the caller's choice; and
with it, in training, contiguous gradients for the BatchNorms (`fast.kernels.concatenate`), 1.2 times as fast, and the
gradients of `primitives.DepthwiseConv2d`, up to 1.7 times where many filters are dilated or 5x5. Sharing a state's
ReLUs (1.02 to 1.04) and ReLUs in place (1.00 to 1.03) are not; folding BatchNorms (1.06 to 1.16 on top of
channels_last) changes the last digits and only helps evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_space.cell import NODES, Edge
from darts_space.fast.kernels import concatenate
from darts_space.fast.norm import BatchNormOfOne
from darts_space.genotype import Genotype
from darts_space.preparation import Preparation
from darts_space.primitives import (
    STEM_MULTIPLIER,
    FactorizedReduce,
    ReLUConvBN,
    build_operation,
    build_stems,
    initialised_from,
)


class Cell(nn.Module):
    """Two states in, four nodes, their concatenation (N, 4 * channels, H, W) out; H and W halved if `reduces`."""

    def __init__(
        self,
        edges: tuple[Edge, ...],
        in_channels: tuple[int, int],
        channels: int,
        reduces: bool,
        previous_reduces: bool,
    ):
        super().__init__()
        # Where the cell before reduced, the state from two cells before is still twice as large.
        preprocess0 = FactorizedReduce if previous_reduces else ReLUConvBN
        self.preprocess0 = preprocess0(in_channels[0], channels, affine=True)
        self.preprocess1 = ReLUConvBN(in_channels[1], channels, affine=True)
        self.sources = tuple(source for _, source in edges)
        self.operations = nn.ModuleList(  # in the order of the genotype, two for each node
            build_operation(name, channels, stride=2 if reduces and source < 2 else 1, affine=True)
            for name, source in edges
        )

    def forward(self, state0: Tensor, state1: Tensor, drop_path: Tensor | None) -> Tensor:
        """`drop_path` (8, N) holds the factors of the eight operations' outputs."""
        states = [self.preprocess0(state0), self.preprocess1(state1)]
        for node in range(NODES):
            first, second = (self._edge(edge, states, drop_path) for edge in (2 * node, 2 * node + 1))
            states.append(first + second)
        return concatenate(states[2:])

    def _edge(self, edge: int, states: list[Tensor], drop_path: Tensor | None) -> Tensor:
        operation = self.operations[edge]
        out = operation(states[self.sources[edge]])
        if drop_path is None or isinstance(operation, nn.Identity):  # an identity always leaves a path
            return out
        return out * drop_path[edge, :, None, None, None].to(out.dtype)


class AuxiliaryHead(nn.Module):
    """A second classifier on the output of the second reduction cell: (N, C, h, w) -> logits (N, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, pool_stride: int, last_norm: bool):
        super().__init__()
        self.pool_stride = pool_stride
        self.relu = nn.ReLU()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 128, kernel_size=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, kernel_size=2, bias=False),
            BatchNormOfOne(768) if last_norm else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # The published window is 5x5; on a smaller map than the published one it shrinks until two of them fit,
        # which the 2x2 convolution needs.
        window = [min(5, size - self.pool_stride) for size in x.shape[2:]]
        x = self.features(F.avg_pool2d(self.relu(x), window, self.pool_stride))
        return self.classifier(x.mean(dim=(2, 3)))


class Network(nn.Module):
    """What both networks have in common. Use `CifarNetwork` or `ImageNetNetwork`."""

    kind: str
    smallest_with_head: int  # H and W, so that the auxiliary head's pool fits twice; without a head any size will do
    preparation: Preparation | None = None
    """The classes, and how images become the input; a checkpoint holds them, and so does a network from one."""

    def __init__(
        self,
        genotype: Genotype,
        channels: int,
        layers: int,
        num_classes: int,
        auxiliary: bool,
        generator: torch.Generator | None,
    ):
        super().__init__()
        if layers < 3:
            raise ValueError(f"The network needs at least 3 layers to hold both kinds of cell, not {layers}.")
        if channels < 1 or num_classes < 1:
            raise ValueError(f"The network cannot have {channels} channels and {num_classes} classes; use 1 or more.")
        self.genotype, self.channels, self.layers, self.num_classes = genotype, channels, layers, num_classes
        with initialised_from(generator):
            self._build_layers(auxiliary)

    def _build_layers(self, auxiliary: bool) -> None:
        imagenet = self.kind == "imagenet"
        channels = self.channels
        width = channels if imagenet else STEM_MULTIPLIER * channels
        self.stem0, self.stem1 = build_stems(self.kind, width)
        self.reductions = (self.layers // 3, 2 * self.layers // 3)
        self.cells = nn.ModuleList()
        self.auxiliary: AuxiliaryHead | None = None
        in_channels = (width, width)
        previous_reduces = imagenet  # stem1 halves the resolution of stem0
        for index in range(self.layers):
            reduces = index in self.reductions
            channels *= 2 if reduces else 1
            edges = self.genotype.reduce if reduces else self.genotype.normal
            self.cells.append(Cell(edges, in_channels, channels, reduces, previous_reduces))
            in_channels = (in_channels[1], NODES * channels)
            previous_reduces = reduces
            if auxiliary and index == self.reductions[1]:
                pool_stride, last_norm = (2, False) if imagenet else (3, True)
                self.auxiliary = AuxiliaryHead(in_channels[1], self.num_classes, pool_stride, last_norm)
        self.classifier = nn.Linear(in_channels[1], self.num_classes)

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> logits (N, num_classes), in training with the auxiliary head's beside them.

        `drop_path` (layers, 8, N) is a result of `draw_drop_path`, or the part of one that belongs to these images.
        """
        smallest = self.smallest_with_head if self.auxiliary else 1
        if images.dim() != 4 or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"The {self.kind} network takes images (N, 3, H, W) with H and W of {smallest} or more, not "
                f"{tuple(images.shape)}; resize them{', or leave out the auxiliary head' if smallest > 1 else ''}."
            )
        if drop_path is not None:
            expected = (self.layers, 2 * NODES, images.shape[0])
            if drop_path.shape != expected:
                raise ValueError(f"drop_path has the shape {tuple(drop_path.shape)}, but these images need {expected}.")
            drop_path = drop_path.to(images.device)
        state0 = self.stem0(images)
        state1 = self.stem1(state0)
        auxiliary_logits = None
        for index, cell in enumerate(self.cells):
            state0, state1 = state1, cell(state0, state1, None if drop_path is None else drop_path[index])
            if self.training and self.auxiliary is not None and index == self.reductions[1]:
                auxiliary_logits = self.auxiliary(state1)
        logits = self.classifier(state1.mean(dim=(2, 3)))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)

    def draw_drop_path(
        self, batch_size: int, probability: float, *, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Factors (layers, 8, N) of the operations' outputs: 0 with `probability`, else 1 / (1 - probability).

        Each image loses operations of its own, and the expected output is unchanged. Draw with a `generator` (a CPU
        one) seeded by the step, for the whole batch: then a resumed run, and one that is split over devices or
        micro-batches (`drop_path[:, :, part]`), drops the same. None where the probability is 0.
        """
        if not 0 <= probability < 1:
            raise ValueError(f"The drop-path probability must be at least 0 and below 1, not {probability}.")
        if probability == 0:
            return None
        keep = 1 - probability
        return (torch.rand(self.layers, 2 * NODES, batch_size, generator=generator, device="cpu") < keep) / keep

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes in the order of the logits; None where its `preparation` is not known."""
        return None if self.preparation is None else self.preparation.class_names

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images that it was trained on; None where its `preparation` is not known."""
        return None if self.preparation is None else self.preparation.image_size

    def transforms(self) -> Callable[[Any], Tensor]:
        """PIL image, or uint8 pixels (3, H, W), to the input (3, S, S), as in evaluation; needs torchvision.

        Raises ValueError where the `preparation` is not known.
        """
        if self.preparation is None:
            raise ValueError(
                "This network does not know how its images were prepared: set its `preparation`, or load a checkpoint "
                "that holds it."
            )
        return self.preparation.transforms()

    def description(self) -> dict[str, Any]:
        """The network without its weights as plain data, from which `build_network` builds it again."""
        return {
            "kind": self.kind,
            "genotype": self.genotype.to_json(),
            "channels": self.channels,
            "layers": self.layers,
            "num_classes": self.num_classes,
            "auxiliary": self.auxiliary is not None,
        }


class CifarNetwork(Network):
    """The network for small images: the stem keeps H and W, the cells reduce them to a fourth."""

    kind = "cifar"
    smallest_with_head = 13

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        layers: int = 20,
        num_classes: int = 10,
        auxiliary: bool = True,
        *,
        generator: torch.Generator | None = None,
    ):
        """Build and initialise.

        `channels` is the width of the first cell's nodes, `layers` counts the cells. `generator` (a CPU one) fixes
        the weights; without it PyTorch's own is used, as in any module.
        """
        super().__init__(genotype, channels, layers, num_classes, auxiliary, generator)


class ImageNetNetwork(Network):
    """The network for large images: the stem leaves an eighth of H and W, the cells a thirty-second."""

    kind = "imagenet"
    smallest_with_head = 65

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 48,
        layers: int = 14,
        num_classes: int = 1000,
        auxiliary: bool = True,
        *,
        generator: torch.Generator | None = None,
    ):
        """Build and initialise as `CifarNetwork` does; `channels` must be even, since the stem starts with half."""
        if channels % 2:
            raise ValueError(f"The imagenet stem halves its width, so {channels} channels must be even.")
        super().__init__(genotype, channels, layers, num_classes, auxiliary, generator)


NETWORKS = {"cifar": CifarNetwork, "imagenet": ImageNetNetwork}

"""A residual network for machines without a GPU, and its block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones.layers import NOTHING, Drop, add_drops, initialise_convolutions


class SmallResNet(nn.Module):
    """A residual network sized for two CPU cores; ours. (N, 3, H, W) -> (N, num_classes).

    The stem halves the image at once (32x32 -> 16x16): a first stage at full resolution would cost four times
    as much, more than all the rest together. Each further stage halves the map again.

    Args:
        widths: channels of each stage; multiples of 16 fill the vector registers of AVX-512.
        blocks: residual blocks of each stage.
        num_classes: outputs.
        stem: "cifar", 3x3 of stride 2, or "imagenet", 7x7 of stride 4 and max pooling: 224 px -> 28x28.
        drop: what is dropped in training.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        num_classes: int,
        stem: str = "cifar",
        drop: Drop = NOTHING,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 2) if stem == "cifar" else (7, 4)
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        if stem == "imagenet":
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        in_channels = widths[0]
        stages: list[list[BasicBlock]] = []
        for width, count in zip(widths, blocks, strict=True):
            stages.append([])
            for index in range(count):
                stages[-1].append(BasicBlock(in_channels, width, stride=2 if len(stages) > 1 and index == 0 else 1))
                in_channels = width
            layers += stages[-1]
        ends = (len(layers) - sum(blocks[stage:]) - 1 for stage in range(1, len(blocks)))
        self.stage_ends = tuple(f"features.{end}" for end in ends)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        initialise_convolutions(self)
        add_drops([[block.residual for block in stage] for stage in stages], drop)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, plus the shortcut, ReLU (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        if stride == 1 and in_channels == channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)

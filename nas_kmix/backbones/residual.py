"""The three backbones of the paper's Table 2 as in its reference, Co-Mixup (Kim et al., ICLR 2021).

All are for small images: (N, 3, H, W) -> (N, num_classes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones.layers import NOTHING, Drop, add_drops, initialise_convolutions


class ResidualNet(nn.Module):
    """A stem, stages of residual blocks, a final activation, global average pooling and a linear layer.

    Args:
        stem: images to the first block's input.
        stages: the blocks of every stage; each block has a `residual` path.
        final: what stands between the last block and the pooling.
        features: channels there.
        num_classes: outputs.
        drop: what is dropped in training.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        final: nn.Module,
        features: int,
        num_classes: int,
        drop: Drop,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList([nn.Sequential(*blocks) for blocks in stages])
        self.final = final
        self.stage_ends = tuple(f"stages.{index}" for index in range(len(stages) - 1))
        self.classifier = nn.Linear(features, num_classes)
        initialise_convolutions(self)
        add_drops([[block.residual for block in stage] for stage in self.stages], drop)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.final(x).mean(dim=(2, 3)))


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3 (He et al., ECCV 2016); where the shape changes, a 1x1 shortcut.

    Args:
        in_channels, channels: of input and output.
        stride: of the block.
        bias: whether convolutions have one.
        shared_activation: the shortcut sees the input after the first BN and ReLU, and the first convolution strides;
            otherwise it sees the input itself, and the second one strides.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, bias: bool, shared_activation: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if shared_activation else (1, stride)
        self.activation = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=first, padding=1, bias=bias),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, stride=second, padding=1, bias=bias),
        )
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=bias)
        self.shared_activation = shared_activation

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        if self.shortcut is not None:
            x = self.shortcut(activated if self.shared_activation else x)
        return self.residual(activated) + x


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3, 1x1, each with BN, plus the shortcut, ReLU (Xie et al., CVPR 2017)."""

    def __init__(self, in_channels: int, width: int, channels: int, *, groups: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


def make_stages(
    block: Callable[..., nn.Module], in_channels: int, widths: Sequence[int], blocks: int
) -> list[list[nn.Module]]:
    """Stages of `blocks` blocks `block(in_channels, width, stride=...)`; all but the first begin with stride 2."""
    stages: list[list[nn.Module]] = []
    for width in widths:
        inputs = [in_channels, *[width] * (blocks - 1)]
        strides = [2 if stages else 1, *[1] * (blocks - 1)]
        stages.append([block(i, width, stride=stride) for i, stride in zip(inputs, strides, strict=True)])
        in_channels = width
    return stages


def preactresnet18(*, num_classes: int, drop: Drop = NOTHING) -> ResidualNet:
    """Four stages of two pre-activation blocks, 64 to 512 wide; no BN or ReLU after the last one.

    So its logits grow with the activations: with cross-entropy it diverges at learning rates of .03 and above. The
    published training's loss, `softmax_bce`, is a mean over the classes, whose gradient is that much smaller.
    11,217,316 parameters for 100 classes.
    """

    def block(in_channels: int, width: int, *, stride: int) -> PreActBlock:
        return PreActBlock(in_channels, width, stride=stride, bias=False, shared_activation=True)

    return ResidualNet(
        stem=nn.Conv2d(3, 64, 3, padding=1, bias=False),
        stages=make_stages(block, 64, (64, 128, 256, 512), 2),
        final=nn.Identity(),
        features=512,
        num_classes=num_classes,
        drop=drop,
    )


def wrn16_8(*, num_classes: int, drop: Drop = NOTHING) -> ResidualNet:
    """Wide ResNet of depth 16 and widening factor 8 (Zagoruyko & Komodakis, BMVC 2016), convolutions with bias.

    11,012,036 parameters for 100 classes.
    """

    def block(in_channels: int, width: int, *, stride: int) -> PreActBlock:
        return PreActBlock(in_channels, width, stride=stride, bias=True, shared_activation=False)

    return ResidualNet(
        stem=nn.Conv2d(3, 16, 3, padding=1),
        stages=make_stages(block, 16, (128, 256, 512), 2),
        final=nn.Sequential(nn.BatchNorm2d(512), nn.ReLU(inplace=True)),
        features=512,
        num_classes=num_classes,
        drop=drop,
    )


def resnext29_4_24(*, num_classes: int, drop: Drop = NOTHING) -> ResidualNet:
    """ResNeXt of depth 29 with 4 groups of 24 channels (Xie et al., CVPR 2017).

    4,937,252 parameters for 100 classes.
    """
    groups, group_width = 4, 24

    def block(in_channels: int, channels: int, *, stride: int) -> ResNeXtBlock:
        width = groups * group_width * channels // 256
        return ResNeXtBlock(in_channels, width, channels, groups=groups, stride=stride)

    return ResidualNet(
        stem=nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        stages=make_stages(block, 64, (256, 512, 1024), 3),
        final=nn.Identity(),
        features=1024,
        num_classes=num_classes,
        drop=drop,
    )

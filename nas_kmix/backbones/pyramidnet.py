"""PyramidNet with bottleneck blocks, additive (Han, Kim & Kim, CVPR 2017): the backbone of the paper's Table 1."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones.layers import NOTHING, Drop, add_drops, initialise_convolutions


class PyramidNet(nn.Module):
    """The additive PyramidNet with bottleneck blocks for small images (Han, Kim & Kim, CVPR 2017).

    Three stages of `(depth - 2) / 9` blocks; the width grows by `alpha / blocks` with every block instead
    of doubling at every stage. (N, 3, H, W) -> (N, num_classes).

    Args:
        depth: layers counted as in the paper, 9 n + 2: 110 and 200 are those of the DCutMix tables.
        alpha: by how many (unexpanded) channels the width grows over the whole network.
        num_classes: outputs.
        drop: what is dropped in training.
    """

    def __init__(self, *, depth: int, alpha: float, num_classes: int, drop: Drop = NOTHING) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"a bottleneck PyramidNet has depth 9 n + 2 (110, 200, ...), got {depth}.")
        blocks_per_stage = (depth - 2) // 9
        widths = pyramid_widths(depth=depth, alpha=alpha)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        blocks: list[nn.Module] = []
        in_channels = 16
        for index, width in enumerate(widths):
            stride = 2 if index in (blocks_per_stage, 2 * blocks_per_stage) else 1
            blocks.append(PyramidBottleneck(in_channels, width, stride=stride))
            in_channels = PyramidBottleneck.expansion * width
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.BatchNorm2d(in_channels)
        self.classifier = nn.Linear(in_channels, num_classes)
        self.stage_ends = (f"blocks.{blocks_per_stage - 1}", f"blocks.{2 * blocks_per_stage - 1}")
        initialise_convolutions(self)
        paths = [block.residual for block in blocks]
        add_drops([paths[i : i + blocks_per_stage] for i in range(0, len(paths), blocks_per_stage)], drop)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images))
        return self.classifier(F.relu(self.final_norm(x)).mean(dim=(2, 3)))


def pyramid_widths(*, depth: int, alpha: float) -> list[int]:
    """The unexpanded width of every block: `round` (half to even) of a running sum that starts at 16."""
    blocks = 3 * ((depth - 2) // 9)
    widths, width = [], 16.0
    for _ in range(blocks):
        width += alpha / blocks
        widths.append(round(width))
    return widths


class PyramidBottleneck(nn.Module):
    """BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1, BN on the residual path; no ReLU before the first convolution.

    The shortcut has no weights: it is average-pooled where the block strides, and padded with zero channels.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        # ceil_mode: a padded 3x3 convolution of stride 2 rounds odd sizes up, so must the shortcut.
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.missing_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(self.downsample(x), (0, 0, 0, 0, 0, self.missing_channels))
        return self.residual(x) + shortcut

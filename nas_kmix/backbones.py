"""Networks that score images and are trained beside the searched ones: images in, logits out.

Every network takes float images (N, 3, H, W) and returns logits (N, num_classes). All end with global
average pooling and one linear layer, so that H and W are free, and normalise with BatchNorm only, so that in
eval mode an image's logits do not depend on its batch: scores must not depend on batch size or order.

`BACKBONES[name](num_classes=..., stem=...)` draws its weights from torch's global generator;
`build_backbone` is the same with a seed, and leaves that generator as it found it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEMS = ("cifar", "imagenet")  # up to 64 px, and above


class PyramidNet(nn.Module):
    """The additive PyramidNet with bottleneck blocks for small images (Han, Kim & Kim, CVPR 2017).

    Three stages of `(depth - 2) / 9` blocks; the width grows by `alpha / blocks` with every block instead
    of doubling at every stage. (N, 3, H, W) -> (N, num_classes).

    Args:
        depth: layers counted as in the paper, 9 n + 2: 110 and 200 are those of the DCutMix tables.
        alpha: by how many (unexpanded) channels the width grows over the whole network.
        num_classes: outputs.
        stem: "cifar" only; the paper's ImageNet networks are others.
    """

    def __init__(self, *, depth: int, alpha: float, num_classes: int, stem: str = "cifar") -> None:
        super().__init__()
        if stem != "cifar":
            raise ValueError(
                f"PyramidNet-{depth} is defined for images up to 64 px (stem 'cifar'), not for stem "
                f"{stem!r}: choose 'small' or 'resnet50' for larger images."
            )
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
        _initialise_convolutions(self)

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

    The shortcut has no weights: average-pooled where the block strides, its missing channels zeros.
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


class SmallResNet(nn.Module):
    """A residual network sized for two CPU cores; ours. (N, 3, H, W) -> (N, num_classes).

    The stem halves the image at once (32x32 -> 16x16): a first stage at full resolution would cost four times
    as much, more than all the rest together. Each further stage halves the map again.

    Args:
        widths: channels of each stage; multiples of 16 fill the vector registers of AVX-512.
        blocks: residual blocks of each stage.
        num_classes: outputs.
        stem: "cifar", 3x3 of stride 2, or "imagenet", 7x7 of stride 4 and max pooling: 224 px -> 28x28.
    """

    def __init__(self, *, widths: Sequence[int], blocks: Sequence[int], num_classes: int, stem: str = "cifar") -> None:
        super().__init__()
        _check_stem(stem)
        kernel, stride = (3, 2) if stem == "cifar" else (7, 4)
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        if stem == "imagenet":
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        in_channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                layers.append(BasicBlock(in_channels, width, stride=2 if stage > 0 and index == 0 else 1))
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        _initialise_convolutions(self)

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


def _pyramidnet110(*, num_classes: int, stem: str = "cifar") -> nn.Module:
    """The paper's light backbone: alpha 64; 1,725,300 parameters for 100 classes."""
    return PyramidNet(depth=110, alpha=64, num_classes=num_classes, stem=stem)


def _small(*, num_classes: int, stem: str = "cifar") -> nn.Module:
    """The scorer of the preset `cpu`: 12.3 M multiply-adds and 320,260 parameters on 100 classes of 32 px.

    Expect 46 % on CIFAR-100 (one seed) after 20 epochs of DCutMix (K 5, alpha .2), batch 128, lr .1, cosine.
    """
    return SmallResNet(widths=(32, 64, 128), blocks=(1, 1, 1), num_classes=num_classes, stem=stem)


def _tiny(*, num_classes: int, stem: str = "cifar") -> nn.Module:
    """The scorer of the preset `quick`: a quarter of the cost of `small`."""
    return SmallResNet(widths=(16, 32, 64), blocks=(1, 1, 1), num_classes=num_classes, stem=stem)


def _resnet50(*, num_classes: int, stem: str = "imagenet") -> nn.Module:
    """torchvision's ResNet-50 without weights."""
    if stem != "imagenet":
        raise ValueError(
            "resnet50 starts with a stride of 4, for images above 64 px (stem 'imagenet'), and does not fit "
            f"stem {stem!r}: choose 'pyramidnet110' or 'small' for small images."
        )
    from torchvision.models import resnet50  # here: seconds to import, and no other backbone needs it

    return resnet50(weights=None, num_classes=num_classes)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "pyramidnet110": _pyramidnet110,
    "small": _small,
    "tiny": _tiny,
    "resnet50": _resnet50,
}


def build_backbone(name: str, *, num_classes: int, stem: str = "cifar", seed: int = 0) -> nn.Module:
    """`BACKBONES[name]` with weights that depend on `seed` alone; on the CPU, in training mode.

    Args:
        name: a key of `BACKBONES`.
        num_classes: outputs, at least 1.
        stem: "cifar" (images up to 64 px) or "imagenet" (above).
        seed: any integer that `torch.Generator.manual_seed` takes.

    Raises:
        ValueError: an unknown name or stem, or a network that is not defined for this stem.
    """
    if name not in BACKBONES:
        raise ValueError(f"there is no backbone {name!r}: choose one of {', '.join(BACKBONES)}.")
    if num_classes < 1:
        raise ValueError(f"a backbone needs at least one class, got num_classes={num_classes}.")
    _check_stem(stem)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed every GPU, and fork_rng restores only the CPU here.
        torch.default_generator.manual_seed(seed)
        return BACKBONES[name](num_classes=num_classes, stem=stem)


def _check_stem(stem: str) -> None:
    if stem not in STEMS:
        raise ValueError(f"there is no stem {stem!r}: choose 'cifar' (up to 64 px) or 'imagenet' (above).")


def _initialise_convolutions(network: nn.Module) -> None:
    """He initialisation by fan-out, as in both papers; BN and linear layers keep torch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

"""Networks that score images, and that searched ones are compared with: images in, logits out.

Every network takes float images (N, 3, H, W) and returns logits (N, num_classes). All end in global average pooling and
one linear layer, so H and W are free. They normalise with BatchNorm only, so in eval mode an image's logits do not
depend on its batch: scores must not depend on batch size or order.

`BACKBONES[name](num_classes=..., stem=..., drop=...)` draws its weights from torch's global generator;
`build_backbone` takes a seed instead, and leaves that generator untouched. `network.stage_ends` names the last
layer of every stage but the final one: the hidden layers whose outputs Manifold Mixup may mix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from nas_kmix.backbones.layers import NOTHING, Drop
from nas_kmix.backbones.pyramidnet import PyramidBottleneck, PyramidNet, pyramid_widths
from nas_kmix.backbones.residual import preactresnet18, resnext29_4_24, wrn16_8
from nas_kmix.backbones.small import BasicBlock, SmallResNet

__all__ = [
    "BACKBONES",
    "STEMS",
    "BasicBlock",
    "Drop",
    "PyramidBottleneck",
    "PyramidNet",
    "SmallResNet",
    "build_backbone",
    "last_linear",
    "pyramid_widths",
]

STEMS = ("cifar", "imagenet")  # up to 64 px, and above


def _small_images_only(title: str, network: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(*, num_classes: int, stem: str = "cifar", drop: Drop = NOTHING) -> nn.Module:
        if stem != "cifar":
            raise ValueError(
                f"{title} is defined for images up to 64 px (stem 'cifar'), not for stem {stem!r}: "
                "choose 'small' or 'resnet50' for larger images."
            )
        return network(num_classes=num_classes, drop=drop)

    return build


def _torchvision_resnet(name: str) -> Callable[..., nn.Module]:
    def build(*, num_classes: int, stem: str = "imagenet", drop: Drop = NOTHING) -> nn.Module:
        if stem != "imagenet":
            raise ValueError(
                f"{name} starts with a stride of 4, for images above 64 px (stem 'imagenet'), and does not fit "
                f"stem {stem!r}: choose 'pyramidnet110' or 'small' for small images."
            )
        if drop != NOTHING:
            raise ValueError(f"{name} is torchvision's and drops nothing: leave stochastic depth and DropBlock at 0.")
        from torchvision.models import get_model  # here: seconds to import, and no other backbone needs it

        network = get_model(name, weights=None, num_classes=num_classes)
        network.stage_ends = ("layer1", "layer2", "layer3")
        return network

    return build


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    # The paper's Table 1: 1,725,300 and 26,844,952 parameters for 100 classes.
    "pyramidnet110": _small_images_only("PyramidNet-110", partial(PyramidNet, depth=110, alpha=64)),
    "pyramidnet200": _small_images_only("PyramidNet-200", partial(PyramidNet, depth=200, alpha=240)),
    # Table 2, models (a), (b) and (c): 11,217,316, 11,012,036 and 4,937,252.
    "preactresnet18": _small_images_only("PreActResNet18", preactresnet18),
    "wrn16_8": _small_images_only("WRN16-8", wrn16_8),
    "resnext29_4_24": _small_images_only("ResNeXt29-4-24", resnext29_4_24),
    # For CPUs: 12.3 M multiply-adds and 320,260 parameters for 100 classes at 32 px; `tiny`, a quarter of that.
    # Expect 46 % accuracy of `small` on CIFAR-100 (one seed) after 20 epochs of DCutMix (K 5, alpha .2), batch size
    # 128, learning rate .1, cosine.
    "small": partial(SmallResNet, widths=(32, 64, 128), blocks=(1, 1, 1)),
    "tiny": partial(SmallResNet, widths=(16, 32, 64), blocks=(1, 1, 1)),
    # Table 3, and the substitute of Table 4's black-box attack: 25,557,032 and 60,192,808 for 1000 classes.
    "resnet50": _torchvision_resnet("resnet50"),
    "resnet152": _torchvision_resnet("resnet152"),
}


def build_backbone(
    name: str, *, num_classes: int, stem: str = "cifar", drop: Drop = NOTHING, seed: int = 0
) -> nn.Module:
    """`BACKBONES[name]` with weights that depend on `seed` alone; on the CPU, in training mode.

    Args:
        name: a key of `BACKBONES`.
        num_classes: outputs, at least 1.
        stem: "cifar" (images up to 64 px) or "imagenet" (above).
        drop: stochastic depth and DropBlock, in training only.
        seed: any integer that `torch.Generator.manual_seed` takes.

    Raises:
        ValueError: an unknown name or stem, or a network that is not defined for this stem or `drop`.
    """
    if name not in BACKBONES:
        raise ValueError(f"there is no backbone {name!r}: choose one of {', '.join(BACKBONES)}.")
    if num_classes < 1:
        raise ValueError(f"a backbone needs at least one class, got num_classes={num_classes}.")
    if stem not in STEMS:
        raise ValueError(f"there is no stem {stem!r}: choose 'cifar' (up to 64 px) or 'imagenet' (above).")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed every GPU, and fork_rng restores only the CPU here.
        torch.default_generator.manual_seed(seed)
        return BACKBONES[name](num_classes=num_classes, stem=stem, drop=drop)


def last_linear(network: nn.Module) -> nn.Linear:
    """The layer that turns features into logits."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]

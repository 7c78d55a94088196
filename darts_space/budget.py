"""What a network costs, and the widest one that a budget of multiply-adds allows.

In:  a genotype, the shape of its network, a budget such as "600M" (the mobile setting on ImageNet).
Out: a number of channels for `CifarNetwork` or `ImageNetNetwork`.

PC-DARTS fixes the channels (36 and 48), so that the cost depends on the genotype; a fair comparison of two genotypes
fixes the cost.
"""

from __future__ import annotations

import bisect
import copy
import re
import reprlib
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from darts_space.fast.supernet import SuperNet
from darts_space.genotype import Genotype
from darts_space.network import NETWORKS

Convention = Literal["strict", "published"]
COST_KEYS = {"strict": "macs", "published": "macs_published"}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
WIDTHS = range(2, 1 << 20, 2)


def parse_macs(text: str) -> int:
    """Parse multiply-adds as people write them, "600M", "0.6G" or "600000000", rounded down to a whole number."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]?)\s*", text, re.ASCII | re.IGNORECASE)
    macs = int(Fraction(match[1]) * UNITS[match[2].upper()]) if match else 0
    if macs < 1:
        raise ValueError(f"{reprlib.repr(text)} is no number of multiply-adds; write it as 600M, 0.6G or 600000000.")
    return macs


def widest(
    genotype: Genotype,
    max_macs: int,
    *,
    kind: Literal["cifar", "imagenet"],
    layers: int,
    num_classes: int,
    input_size: int,
    convention: Convention = "strict",
) -> int:
    """The largest even number of channels with which the network costs at most `max_macs` per image.

    `convention` says how multiply-adds are counted (see `cost`). ValueError if even 2 channels are too many.
    """

    def macs(channels: int) -> int:
        model = NETWORKS[kind](genotype, channels, layers, num_classes, auxiliary=False, generator=generator)
        return cost(model, input_size)[COST_KEYS[convention]]

    generator = torch.Generator()  # so that PyTorch's own is left alone
    # In the channels, a layer's cost is quadratic (dense convolutions), linear (all others) or, for pools, nothing.
    # Their sum is a parabola, which three networks determine.
    first, second, third = (macs(channels) for channels in WIDTHS[:3])
    slope, curvature = second - first, third - 2 * second + first

    def predicted(channels: int) -> int:
        n = channels // 2 - 1
        return first + n * slope + n * (n - 1) // 2 * curvature

    fitting = bisect.bisect_right(WIDTHS, max_macs, key=predicted)
    if fitting == 0:
        raise ValueError(
            f"The {kind} network of {layers} layers costs {first:,} multiply-adds ({convention}) with only 2 channels, "
            f"more than the {max_macs:,} allowed; raise the budget, or use fewer layers or smaller images."
        )
    return WIDTHS[fitting - 1]


@torch.no_grad()
def cost(model: nn.Module, input_size: int) -> dict[str, int]:
    """What one square image of `input_size` px costs in evaluation mode, and how many parameters the model has.

    - params, params_without_aux: elements of all parameters, and of those outside the auxiliary head.
    - macs: multiply-adds of the convolutions and linear layers.
    - macs_published: macs + 2 * BatchNorm outputs + ReLU outputs, which gives the 586 M and 597 M of the paper.

    The model itself is neither run nor changed: a copy on the same device evaluates a blank image. Raises ValueError
    for a `SuperNet`, whose edges share convolutions.
    """
    if isinstance(model, SuperNet):
        raise ValueError("A SuperNet computes several edges at once; count the PlainSuperNet of its settings.")
    twin = copy.deepcopy(model).eval()
    macs = extra = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal macs, extra
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.BatchNorm2d):
            extra += 2 * out.numel()
        elif isinstance(module, nn.ReLU):
            extra += out.numel()

    for module in twin.modules():
        module.register_forward_hook(count)
    weight = next(model.parameters())
    twin(torch.zeros(1, 3, input_size, input_size, dtype=weight.dtype, device=weight.device))
    params = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "params": sum(params.values()),
        "params_without_aux": sum(n for name, n in params.items() if not name.startswith("auxiliary.")),
        "macs": macs,
        "macs_published": macs + extra,
    }

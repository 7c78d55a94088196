"""The widest network that a budget of multiply-adds allows.

In:  a genotype, the shape of its network, a budget such as "600M" (the mobile setting on ImageNet).
Out: a number of channels for `CifarNetwork` or `ImageNetNetwork`.

PC-DARTS fixes the channels (36 and 48), so that the cost depends on the genotype; a fair comparison of two genotypes
fixes the cost.
"""

from __future__ import annotations

import bisect
import re
import reprlib
from fractions import Fraction
from typing import Literal

import torch

from darts_space.genotype import Genotype
from darts_space.network import NETWORKS, cost

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

"""The eight candidate operations of a cell, for supernets and for final networks.

In:  an operation's name, its number of channels C, its stride (1 or 2).
Out: a module (N, C, H, W) -> (N, C, H / stride, W / stride), H and W even where the stride is 2.

They are DARTS's operations (DARTS section 3.1.1; PC-DARTS keeps them). Every convolution has no bias; the order
is ReLU, convolution, BatchNorm. `affine` tells whether the BatchNorms have learnt scales: no in supernet cells,
where a scale would undo the mixing weights, yes in final networks. Pools come without BatchNorm: the supernet
adds one of its own, final networks have none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_space.cell import PRIMITIVES


class Zero(nn.Module):
    """The operation `none`: zeros, subsampled where the stride is 2."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, BatchNorm: brings a cell's input to the cell's number of channels."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )


class FactorizedReduce(nn.Module):
    """Halves H and W by two 1x1 stride-2 convolutions, one on the even pixels, one on the odd ones.

    (N, in_channels, H, W) -> (N, out_channels, H / 2, W / 2) with H, W and out_channels even.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"FactorizedReduce makes two equal halves, so {out_channels} channels must be even.")
        self.relu = nn.ReLU()
        self.conv_even = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, stride=2, bias=False)
        self.conv_odd = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_even(x), self.conv_odd(x[:, :, 1:, 1:])], dim=1))


def depthwise_separable(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise convolution, pointwise convolution, BatchNorm, as the list of these modules."""
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation=dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def sep_conv(channels: int, kernel: int, stride: int, affine: bool) -> nn.Sequential:
    """Separable convolution: the depthwise-separable block twice, the stride in the first."""
    return nn.Sequential(
        *depthwise_separable(channels, kernel, stride, dilation=1, affine=affine),
        *depthwise_separable(channels, kernel, stride=1, dilation=1, affine=affine),
    )


def dil_conv(channels: int, kernel: int, stride: int, affine: bool) -> nn.Sequential:
    """Dilated separable convolution: the block once, with dilation 2."""
    return nn.Sequential(*depthwise_separable(channels, kernel, stride, dilation=2, affine=affine))


def build_operation(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """The operation of that name, (N, channels, H, W) -> (N, channels, H / stride, W / stride)."""
    if stride not in (1, 2):
        raise ValueError(f"An operation has stride 1 or 2, not {stride}.")
    match name:
        case "none":
            return Zero(stride)
        case "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
        case "sep_conv_3x3":
            return sep_conv(channels, 3, stride, affine)
        case "sep_conv_5x5":
            return sep_conv(channels, 5, stride, affine)
        case "dil_conv_3x3":
            return dil_conv(channels, 3, stride, affine)
        case "dil_conv_5x5":
            return dil_conv(channels, 5, stride, affine)
    raise ValueError(f"There is no operation {name!r}; use one of {', '.join(PRIMITIVES)}.")

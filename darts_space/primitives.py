"""The eight candidate operations of a cell, for supernets and for final networks.

In:  an operation's name, its number of channels C, its stride (1 or 2).
Out: a module (N, C, H, W) -> (N, C, H / stride, W / stride), rounded up.

They are DARTS's operations (DARTS section 3.1.1; PC-DARTS keeps them). Every convolution has no bias; the order
is ReLU, convolution, BatchNorm. `affine` says whether the BatchNorms learn scales: no in supernet cells,
where a scale would undo the mixing weights, yes in final networks. Pools come without BatchNorm: the supernet
adds one of its own, final networks have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_space.cell import PRIMITIVES
from darts_space.fast.kernels import in_channels_last
from darts_space.fast.separable import depthwise_convolution


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
    """Halves H and W by two 1x1 convolutions, one over the even pixels and one over the odd ones.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / 2), ceil(W / 2)), out_channels even. An odd H or W has no
    last odd pixel; a zero takes its place, so that the size is that of all other strided operations.

    The pixels are taken by slicing: 1x1 convolutions with a stride, in channels_last and with few channels, write past
    a buffer of oneDNN's on CPUs (uxlfoundation/oneDNN issue 6035), which ends in wrong gradients or a crash.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool):
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"FactorizedReduce makes two equal halves, so {out_channels} channels must be even.")
        self.relu = nn.ReLU()
        self.conv_even = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, bias=False)
        self.conv_odd = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        even, odd = (_every_second_pixel(x, first) for first in (0, 1))
        if x.shape[2] % 2 or x.shape[3] % 2:
            odd = F.pad(odd, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.bn(torch.cat([self.conv_even(even), self.conv_odd(odd)], dim=1))


def _every_second_pixel(x: Tensor, first: int) -> Tensor:
    """x[:, :, first::2, first::2] with a gradient in channels_last where x is; the plain slice's is contiguous."""
    if in_channels_last(x):
        return x.permute(0, 2, 3, 1)[:, first::2, first::2].permute(0, 3, 1, 2)
    return x[:, :, first::2, first::2]


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with padding that keeps H and W apart from the stride; it trains fast on a CPU.

    Three things differ from nn.Conv2d, none of which changes more than the last digits. With stride and dilation 2 it
    is a plain convolution of every second pixel. In float32 and channels_last, filters of five pixels and dilated ones
    have the faster gradients of `fast.separable` while training. And dilated filters compute in float32 where a CPU
    would compute in bfloat16: with rows of more than 28 pixels oneDNN returns uninitialised memory as the gradient of
    the weights (seen in torch 2.14.1 with AVX-512).
    """

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int):
        padding = dilation * (kernel // 2)
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride, dilation = self.stride[0], self.dilation[0]
        if stride == dilation == 2:
            x, stride, dilation = _every_second_pixel(x, 0), 1, 1
        padding = dilation * (self.kernel_size[0] // 2)
        if x.device.type != "cpu":
            return F.conv2d(x, self.weight, None, stride, padding, dilation, self.groups)
        casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64  # which autocast leaves alone
        dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
        if dtype == torch.bfloat16 and dilation > 1:
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), self.weight.float(), None, stride, padding, dilation, self.groups).to(dtype)
        slow = self.training and (self.kernel_size[0] == 5 or dilation > 1)
        if slow and x.dtype == dtype == torch.float32 and in_channels_last(x):
            return depthwise_convolution(x, self.weight, stride, dilation)
        return F.conv2d(x, self.weight, None, stride, padding, dilation, self.groups)


def depthwise_separable(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """A list of modules: ReLU, depthwise convolution, pointwise convolution, BatchNorm."""
    return [
        nn.ReLU(),
        DepthwiseConv2d(channels, kernel, stride, dilation),
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
    """The operation of that name, (N, channels, H, W) -> (N, channels, H / stride, W / stride), rounded up."""
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


STEM_MULTIPLIER = 3
"""How many times wider than the first cell's nodes the stem is, except in final networks on ImageNet."""


def build_stems(kind: str, width: int) -> tuple[nn.Module, nn.Module]:
    """The layers before the first cell: images (N, 3, H, W) to state 0, and state 0 to state 1, both `width` wide.

    "cifar" keeps H and W and makes both states the same; "imagenet" leaves a fourth of H and W in state 0 and an
    eighth in state 1, rounded up.
    """
    if kind == "cifar":
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)), nn.Identity()
    stem0 = nn.Sequential(
        nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )
    stem1 = nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )
    return stem0, stem1


@contextmanager
def initialised_from(generator: torch.Generator | None) -> Iterator[None]:
    """Modules built inside draw their weights from `generator`, a CPU one.

    PyTorch's modules draw from the global CPU generator, so it is seeded on entry and restored on exit. Without a
    `generator` the seed comes from the global one, as any module's weights do.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

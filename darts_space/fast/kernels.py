"""Operations that PyTorch has too, but not fast, lean or accurate enough on a CPU.

Products with narrow matrices, copies and sums of channels, and the average pool; `separable` has the separable
convolutions, `norm` has BatchNorm. Other devices compute all of them with PyTorch's kernels. Separable convolutions and
BatchNorm are differentiable only once: create_graph=True is refused.

Products, copies and sums take tensors (N, H, W, C), which are channels_last tensors seen from the other side: a 1x1
convolution is a matrix product over the last axis. The pool and `concatenate` take (N, C, H, W), as PyTorch's do.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

OURS = {"cpu"}
"""Devices on which the implementations here are used; on others each is a few calls to PyTorch."""


def pointwise_convolution(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """1x1 convolution: x (N, H, W, A), weight (B, A / groups, 1, 1) -> (N, H, W, B), in the dtype of x."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), groups=groups).permute(0, 2, 3, 1)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in the dtype of x: x (N, H, W, A), matrix (A, B), a constant -> (N, H, W, B)."""
    if x.device.type in OURS:
        return _Product.apply(x, matrix)
    # A single matrix product, which `matmul` alone does not always make of it.
    return (x.flatten(0, 2) @ matrix.to(x.dtype)).unflatten(0, x.shape[:3])


class _Product(torch.autograd.Function):
    """The product as a convolution: oneDNN's is up to three times as fast as MKL's product with a narrow matrix.

    PyTorch's convolution keeps its input for the backward pass even if the weight is a constant; this one does not.
    """

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return pointwise_convolution(x, matrix.t()[..., None, None])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return product(grad, matrix.t()), None


def copied(x: Tensor, axes: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Copies of channels: x (N, H, W, the product of the old axes) -> (N, H, W, the product of all `axes`).

    `axes` are sizes, `new` the indices of those along which everything is equal.
    """
    # Neighbouring axes that are new, or of size one, are one axis.
    runs = itertools.groupby(range(len(axes)), lambda axis: axis in new or axes[axis] == 1)
    sizes = [(is_new, math.prod(axes[axis] for axis in run)) for is_new, run in runs]
    x = x.contiguous().unflatten(3, [1 if is_new else size for is_new, size in sizes])
    if x.device.type not in OURS:
        return x.expand(*x.shape[:3], *(size for _, size in sizes)).flatten(3)
    for axis, (is_new, size) in reversed(list(enumerate(sizes, 3))):
        if is_new:  # `cat` copies whole rows, where `expand` copies number by number
            x = torch.cat([x] * size, dim=axis)
    return x.flatten(3)


def summed(x: Tensor, axes: tuple[int, ...], gone: tuple[int, ...]) -> Tensor:
    """Sums of channels: x (N, H, W, the product of `axes`) -> (N, H, W, the product of those that are not `gone`)."""
    x = x.unflatten(3, axes)
    if x.device.type not in OURS:
        return x.sum([3 + axis for axis in gone]).flatten(3)
    for axis in (3 + axis for axis in gone):
        # Half of the axis is added to the other half, again and again: few long sums instead of many short ones.
        while (size := x.shape[axis]) > 1:
            first, second, *odd = x.split([size // 2] * 2 + [1] * (size % 2), dim=axis)
            x = first + second
            for rest in odd:
                x.narrow(axis, 0, 1).add_(rest)
    return x.flatten(3)


def in_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) is laid out so; False inside torch.vmap, which does not tell."""
    try:
        return x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return False


def concatenate(tensors: list[Tensor]) -> Tensor:
    """torch.cat of tensors (N, C, H, W) along their channels, with contiguous gradients in the output's layout.

    PyTorch's gradients are slices of the whole, on which BatchNorm's backward pass in channels_last is six times as
    slow on a CPU. Without gradients it is torch.cat itself, which torch.export knows.
    """
    if tensors[0].device.type in OURS and torch.is_grad_enabled():
        return _Concatenation.apply(*tensors)
    return torch.cat(tensors, dim=1)


class _Concatenation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=1)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [tensor.shape[1] for tensor in inputs]
        ctx.layout = torch.channels_last if in_channels_last(output) else torch.contiguous_format

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous(memory_format=ctx.layout) for part in grad.split(ctx.sizes, dim=1))

    @staticmethod
    def jvp(ctx, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents, dim=1)


def average_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average pooling, padded but without counting the padding: x (N, C, H, W) -> (N, C, H / stride, W / stride).

    PyTorch's is slow in channels_last with few channels; a depthwise convolution is not.
    """
    if x.device.type not in OURS:
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    window = x.new_ones(x.shape[1], 1, 3, 3)
    pixels = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), window[:1], None, stride, 1)
    return F.conv2d(x, window, None, stride, 1, groups=len(window)) / pixels


def refuse_to_be_differentiated_twice() -> None:
    if torch.is_grad_enabled():  # in a backward pass only by create_graph=True
        raise RuntimeError(
            "The fast supernet cannot be differentiated twice (create_graph=True); use darts_space.PlainSuperNet."
        )

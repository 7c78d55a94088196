"""Separable convolutions whose backward pass is fast and keeps little memory on a CPU; elsewhere it is PyTorch's.

In:  tensors (N, H, W, C), which are channels_last tensors seen from the other side, and the two convolutions' weights.
Out: tensors of the same form, differentiable only once: create_graph=True is refused. `depthwise_convolution`, the
     first of the two alone, takes (N, C, H, W) and can be differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from darts_space.fast import kernels
from darts_space.fast.kernels import copied, pointwise_convolution, refuse_to_be_differentiated_twice, summed


def separable_convolution(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    stride: int = 1,
    dilation: int = 1,
    *,
    axes: tuple[int, ...] | None = None,
) -> Tensor:
    """A depthwise convolution, then a 1x1 convolution in groups: (N, H, W, A) -> (N, H / stride, W / stride, B).

    The weights are (A, 1, 5, 5), with padding that keeps H and W apart from the stride, and (B, A / groups, 1, 1). With
    `axes`, the sizes of (kernel size, state, node, channel) whose product is A, x has the channels of the states only:
    the copies for all kernel sizes and nodes are made here, and x is all that is kept for the backward pass.
    """
    return _Separable.apply(x, depthwise.to(x.dtype), pointwise.to(x.dtype), axes, stride, dilation)


def depthwise_convolution(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """The depthwise convolution alone: (N, C, H, W) -> (N, C, H / stride, W / stride), in channels_last.

    The weight is (C, 1, 3, 3) or (C, 1, 5, 5), with padding that keeps H and W apart from the stride.
    """
    return _DepthwiseConvolution.apply(x, weight, stride, dilation)


class _DepthwiseConvolution(torch.autograd.Function):
    """The backward pass is a function of PyTorch's own, so that it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2 * dilation, dilation, len(weight))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        x, weight, ctx.stride, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad, x = grad.permute(0, 2, 3, 1).contiguous(), x.permute(0, 2, 3, 1)
        by_x = by_weight = None
        if needs_x:
            by_x = _by_depthwise_input(grad, x.shape, weight, ctx.stride, ctx.dilation).permute(0, 3, 1, 2)
        if needs_weight:
            by_weight = _by_depthwise_weight(grad, x, weight, ctx.stride, ctx.dilation)
        return by_x, by_weight, None, None


_COPIES = (0, 2)
"""The axes along which channels are copied: kernel size and node."""


class _Separable(torch.autograd.Function):
    """The backward pass is PyTorch's, except for the depthwise convolution on a CPU.

    Where channels are copied, the pointwise weights' gradient computes the depthwise convolution once more, instead of
    keeping its result: that costs about 3 % of a training step and saves two of the seven tensors per edge of a cell.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, depthwise: Tensor, pointwise: Tensor, axes: tuple[int, ...] | None, stride: int, dilation: int
    ) -> Tensor:
        kept = x if any(ctx.needs_input_grad[1:3]) else None
        if axes is not None:
            x = copied(x, axes, _COPIES)
        between = _depthwise(x, depthwise, stride, dilation)
        kept_between = between if ctx.needs_input_grad[2] and axes is None else None
        ctx.save_for_backward(kept, kept_between, depthwise, pointwise)
        ctx.axes, ctx.stride, ctx.dilation = axes, stride, dilation
        ctx.shape, ctx.shape_between = x.shape, between.shape
        return pointwise_convolution(between, pointwise, len(depthwise) // pointwise.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_to_be_differentiated_twice()
        x, between, depthwise, pointwise = ctx.saved_tensors
        needs_x, needs_depthwise, needs_pointwise = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        by_x = by_depthwise = by_pointwise = None
        if ctx.axes is not None and x is not None:
            x = copied(x, ctx.axes, _COPIES)
        if needs_pointwise:
            if between is None:
                between = _depthwise(x, depthwise, ctx.stride, ctx.dilation)
            by_pointwise = _by_weight(grad, between, pointwise)
        if needs_x or needs_depthwise:
            grad = _by_input(grad, ctx.shape_between, pointwise).contiguous()
        if needs_x:
            by_x = _by_depthwise_input(grad, ctx.shape, depthwise, ctx.stride, ctx.dilation)
            by_x = by_x if ctx.axes is None else summed(by_x, ctx.axes, _COPIES)
        if needs_depthwise:
            by_depthwise = _by_depthwise_weight(grad, x, depthwise, ctx.stride, ctx.dilation)
        return by_x, by_depthwise, by_pointwise, None, None, None


def _depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = weight.shape[2] // 2 * dilation
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding, dilation, len(weight)).permute(0, 2, 3, 1)


def _by_depthwise_input(grad: Tensor, shape: torch.Size, weight: Tensor, stride: int, dilation: int) -> Tensor:
    if stride == 1 and grad.device.type in kernels.OURS:
        # A forward convolution with the filters rotated: oneDNN's is faster forward than backward.
        return _depthwise(grad, weight.flip(2, 3), stride, dilation)
    return _by_input(grad, shape, weight, (stride, stride), dilation)


def _by_depthwise_weight(grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    if weight.shape[3] == 5 and grad.device.type in kernels.OURS:
        if dilation == 1:
            return _by_weight_in_columns(grad, x, weight, stride)
        if dilation == 2 and stride == 1 and x.shape[1] % 2 == x.shape[2] % 2 == 0:
            return _by_weight_in_columns(space_to_batch(grad), space_to_batch(x), weight, stride)
    if dilation > 1 and grad.device.type == "cpu" and grad.dtype == torch.bfloat16:  # see primitives.DepthwiseConv2d
        grad, x, weight = grad.float(), x.float(), weight.float()
        return _by_weight(grad, x, weight, (stride, stride), dilation).bfloat16()
    return _by_weight(grad, x, weight, (stride, stride), dilation)


def _by_input(
    grad: Tensor, shape: torch.Size, weight: Tensor, strides: tuple[int, int] = (1, 1), dilation: int = 1
) -> Tensor:
    like = grad.new_empty(shape)  # its shape and layout are all that is used
    return _convolution_backward(grad, like, weight, strides, dilation, [True, False, False])[0].permute(0, 2, 3, 1)


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor, strides: tuple[int, int] = (1, 1), dilation: int = 1) -> Tensor:
    return _convolution_backward(grad, x, weight, strides, dilation, [False, True, False])[1]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, strides: tuple[int, int], dilation: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's backward pass. Height and width of the filters may differ, and the strides along them."""
    padding = [size // 2 * dilation for size in weight.shape[2:]]
    return torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, strides, padding, [dilation] * 2,
        False, [0, 0], x.shape[3] // weight.shape[1], wanted,
    )  # fmt: skip


def _by_weight_in_columns(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Weight gradient of 5x5 filters, three times as fast as PyTorch's.

    oneDNN's fast kernel takes filters at most three wide. So two neighbouring pixels are seen as one pixel with twice
    the channels, those of the even and of the odd column: a filter three wide then reaches every second column of the
    image, which are columns 0, 2 and 4 of the 5x5 filter. The kernel is fast for images at least as high as the filter.
    """
    if x.shape[2] % 2:  # a column of zeros changes nothing
        x = F.pad(x, (0, 0, 0, 1))
        grad = F.pad(grad, (0, 0, 0, x.shape[2] // stride - grad.shape[2]))
    if (lower := weight.shape[2] - x.shape[1]) > 0:
        x = F.pad(x, (0, 0, 0, 0, 0, lower))
        grad = F.pad(grad, (0, 0, 0, 0, 0, (x.shape[1] - 1) // stride + 1 - grad.shape[1]))
    like = weight.new_empty(2 * len(weight), *weight.shape[1:3], 3)
    if stride == 1:
        odd = _by_weight(grad, x, like[: len(weight)])[..., ::2]  # columns 1 and 3 of 1, 2, 3
        even = _by_weight(_pairs(grad), _pairs(x), like).unflatten(0, (2, -1)).sum(0)
    else:  # the even columns of x against all of the gradient, and the odd ones
        by_column = _by_weight(torch.cat([grad, grad], dim=3), _pairs(x), like, (stride, 1))
        even, odd = by_column.unflatten(0, (2, -1)).unbind(0)
    return torch.stack([even[..., 0], odd[..., 0], even[..., 1], odd[..., 1], even[..., 2]], dim=3)


def _pairs(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H, W / 2, 2 * C)."""
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])


def space_to_batch(x: Tensor) -> Tensor:
    """The four (N, H / 2, W / 2, C) images of every second pixel as one batch of 4 N; H and W are even.

    A convolution of dilation 2 over an image is one of dilation 1 over each of them.
    """
    n, h, w, c = x.shape
    return x.view(n, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5).reshape(4 * n, h // 2, w // 2, c)


def batch_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_batch`."""
    n, h, w, c = x.shape
    return x.reshape(2, 2, n // 4, h, w, c).permute(2, 3, 0, 4, 1, 5).reshape(n // 4, 2 * h, 2 * w, c)

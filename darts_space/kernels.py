"""Operations that PyTorch has, but on a CPU not fast, small or accurate enough.

Separable convolutions, products with narrow matrices, copies and sums of channels, the average pool and BatchNorm;
other devices compute them with PyTorch's kernels. Separable convolutions and BatchNorm are differentiable only once:
create_graph=True is refused.

Convolutions and products take tensors (N, H, W, C), which are channels_last tensors seen from the other side: a 1x1
convolution is a matrix product over the last axis. The pool, BatchNorm and `concatenate` take (N, C, H, W), as
PyTorch's do.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OURS = {"cpu"}
"""Devices where PyTorch's own are not good enough; elsewhere everything here is a few calls of PyTorch's."""

EPSILON = 1e-5  # this and the next are nn.BatchNorm2d's
MOMENTUM = 0.1


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

    PyTorch's convolution keeps its input for the backward pass, even where the weight is a constant; this does not.
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


def concatenate(tensors: list[Tensor]) -> Tensor:
    """torch.cat of tensors (N, C, H, W) along their channels, whose gradients have no gaps and the output's layout.

    PyTorch's are slices of the whole gradient, upon which BatchNorm's backward pass in channels_last is six times as
    slow, on a CPU. Without gradients it is torch.cat, which torch.export knows.
    """
    if tensors[0].device.type in OURS and torch.is_grad_enabled():
        return _Concatenation.apply(*tensors)
    return torch.cat(tensors, dim=1)


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=1)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [tensor.shape[1] for tensor in inputs]
        last = output.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous(memory_format=ctx.layout) for part in grad.split(ctx.sizes, dim=1))

    @staticmethod
    def jvp(ctx, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents, dim=1)


def average_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average pooling, padded but without counting the padding: x (N, C, H, W) -> (N, C, H / stride, W / stride).

    PyTorch's is slow in channels_last with few channels, a depthwise convolution is not.
    """
    if x.device.type not in OURS:
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    window = x.new_ones(x.shape[1], 1, 3, 3)
    pixels = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), window[:1], None, stride, 1)
    return F.conv2d(x, window, None, stride, 1, groups=len(window)) / pixels


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
) -> Tensor:
    """nn.BatchNorm2d on x (N, C, H, W) in channels_last; while training the running statistics move in place.

    Raises ValueError while training on a single pixel, whose variance is nought.
    """
    count = x.numel() // x.shape[1]
    if training and count == 1:
        raise ValueError("BatchNorm cannot normalise a single pixel while training; use a larger batch or images.")
    weight = None if weight is None else weight.contiguous()  # PyTorch's gradient by x is wrong otherwise, on a CPU
    if not training or x.device.type not in OURS:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPSILON)
    y, mean, var = _BatchNorm.apply(x, weight, bias)
    with torch.no_grad():
        running_mean.lerp_(mean, MOMENTUM)
        running_var.lerp_(var * (count / (count - 1)), MOMENTUM)
    return y


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, computed by `batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training)


class _BatchNorm(torch.autograd.Function):
    """BatchNorm while training, on a CPU, at PyTorch's cost, with sums ten to thirty times as accurate in float32.

    PyTorch sums a channels_last tensor up pixel by pixel, each channel in a single float32: after 65,536 pixels the
    fifth digit is wrong. Here the pixels of a row count as channels of their own, so that each sum is shorter by the
    width of the image; the few sums that come out are added up afterwards.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        by_column = torch.ops.aten.batch_norm_update_stats(_columns(x), None, None, 0.0)
        means, variances = (values.view(x.shape[3], -1) for values in by_column)
        between, mean = torch.var_mean(means, 0, correction=0)
        var = variances.mean(0) + between
        ctx.save_for_backward(x, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, var, weight, bias, eps=EPSILON), mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        _refuse_to_be_differentiated_twice()
        x, weight, mean, var = ctx.saved_tensors
        grad, width = grad.contiguous(memory_format=torch.channels_last), x.shape[3]
        statistics = (value.expand(width, -1).contiguous().flatten() for value in (mean, var))  # `repeat`, but faster
        _, *sums = torch.ops.aten.native_batch_norm_backward(
            _columns(grad), _columns(x), None, *statistics, None, None, False, EPSILON, [False, True, True],
        )  # fmt: skip
        sums = torch.stack(sums).view(2, width, -1).sum(1)  # of grad * normalised x, and of grad
        scale = (var + EPSILON).rsqrt()
        if weight is not None:
            scale = scale * weight
        # What goes through the mean and the variance: grad loses its mean and its correlation with the normalised x.
        by_x = F.batch_norm(x, mean, var, *(sums * (scale * (-x.shape[1] / x.numel()))), eps=EPSILON)
        by_x.addcmul_(grad, scale.to(grad.dtype)[:, None, None])
        return by_x, *(part if needed else None for part, needed in zip(sums, ctx.needs_input_grad[1:], strict=True))


def _columns(x: Tensor) -> Tensor:
    """x (N, C, H, W), in channels_last, as (1, W * C, N * H, 1), in channels_last too; float32 at least."""
    x = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(1, -1, 1, x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)


def _refuse_to_be_differentiated_twice() -> None:
    if torch.is_grad_enabled():  # in a backward pass only by create_graph=True
        raise RuntimeError(
            "The fast supernet cannot be differentiated twice (create_graph=True); use darts_space.PlainSuperNet."
        )


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

    The weights are (A, 1, 5, 5), padded to keep H and W but for the stride, and (B, A / groups, 1, 1). With `axes`, the
    sizes of (kernel size, state, node, channel) that make up A, x has the channels of the states only, and the copies
    for all kernel sizes and nodes are made here; then x is all that is kept for the backward pass.
    """
    return _Separable.apply(x, depthwise.to(x.dtype), pointwise.to(x.dtype), axes, stride, dilation)


_COPIES = (0, 2)
"""The kernel size and the node."""


class _Separable(torch.autograd.Function):
    """The backward pass is PyTorch's, except for the depthwise convolution on a CPU.

    Where channels are copied the depthwise convolution, a few products per channel, is computed once more for the
    pointwise weights' gradient: about 3 % of a training step, for two of the seven tensors per edge that a cell keeps.
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
        _refuse_to_be_differentiated_twice()
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
            if grad.device.type in OURS and ctx.dilation == 1:
                by_depthwise = _by_weight_in_columns(grad, x, depthwise, ctx.stride)
            else:
                by_depthwise = _by_weight(grad, x, depthwise, (ctx.stride, ctx.stride), ctx.dilation)
        return by_x, by_depthwise, by_pointwise, None, None, None


def _depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    return F.conv2d(x, weight, None, stride, 2 * dilation, dilation, len(weight)).permute(0, 2, 3, 1)


def _by_depthwise_input(grad: Tensor, shape: torch.Size, weight: Tensor, stride: int, dilation: int) -> Tensor:
    if stride == 1 and grad.device.type in OURS:
        # The same with the filters turned round; oneDNN's convolution is faster forward than backward.
        return _depthwise(grad, weight.flip(2, 3), stride, dilation)
    return _by_input(grad, shape, weight, (stride, stride), dilation)


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
    """PyTorch's. The height and the width of the weight, and the strides along them, may differ."""
    padding = [size // 2 * dilation for size in weight.shape[2:]]
    return torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, strides, padding, [dilation] * 2,
        False, [0, 0], x.shape[3] // weight.shape[1], wanted,
    )  # fmt: skip


def _by_weight_in_columns(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The same for dilation 1, three times as fast: oneDNN has a fast kernel for filters that are at most three wide.

    Two pixels side by side are seen as one with twice the channels, those of the even and those of the odd columns.
    There a filter three wide reaches every second column of the image: 0, 2 and 4 of the filters that are five wide.
    The kernel is fast for images at least as high as the filters.
    """
    if x.shape[2] % 2:  # zeros change nothing
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

"""Two operations of the supernet that PyTorch has, but not in a form that is fast enough.

`depthwise` is a 5x5 depthwise convolution. `normalised_mix` is what follows every convolution and every pool in a
supernet, up to the sum over a node's edges, as one matrix:

    y = sum_o mix_o * BatchNorm(x @ pointwise)_o = (x - mean(x)) @ (pointwise / sqrt(var + eps)) @ mix

A pointwise convolution, a BatchNorm without learnt scale and a weighted sum are all linear once the variance is known,
and the variance of x @ pointwise follows from the covariance of x: var = diag(pointwise^T cov(x) pointwise). So
neither the pointwise convolution's result nor the normalised one ever exists; x is read twice and only x is kept.

Both are differentiable, but only once: a backward pass with create_graph=True is refused.

Tensors are (N, H, W, C), which are channels_last tensors seen from the other side: a 1x1 convolution is a matrix
product over the last axis.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5  # nn.BatchNorm2d's


def pointwise_convolution(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, H, W, A) @ matrix (A, B) + bias (B,), in the dtype of x.

    As a convolution, since on a CPU that adds the bias on the way, where `addmm` takes three times as long.
    """
    weight = matrix.t()[:, :, None, None].to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


def normalised_mix(
    x: Tensor,
    pointwise: Tensor,
    mix: Tensor | None = None,
    *,
    rectify: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """BatchNorm(x @ pointwise) @ mix, and the mean and (biased) variance (Z,) that normalised it.

    x is (N, H, W, A), pointwise (A, Z), mix (Z, B) or None for the identity; `rectify` appends a ReLU. `statistics`
    are the running mean and variance to normalise by in evaluation; None, while training, takes those of
    x @ pointwise itself.
    """
    if statistics is None:
        if x.shape[:3].numel() == 1:
            raise ValueError(
                "BatchNorm cannot normalise a single pixel while training; use a larger batch or larger images."
            )
        y, mean, var = _NormalisedMix.apply(x, pointwise, mix, rectify)
        return y, (mean, var)
    mean, var = statistics
    scaled = pointwise * (var + EPSILON).rsqrt()
    shift = -mean * (var + EPSILON).rsqrt()
    if mix is not None:
        scaled, shift = scaled @ mix, shift @ mix
    y = pointwise_convolution(x, scaled, shift)
    return F.relu(y) if rectify else y, statistics


class _NormalisedMix(torch.autograd.Function):
    """The training form. Its backward pass is that of BatchNorm, again without leaving the space of matrices."""

    @staticmethod
    def forward(ctx, x: Tensor, pointwise: Tensor, mix: Tensor | None, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
        count = x.shape[:3].numel()
        pixels = x.flatten(1, 2).to(pointwise.dtype)  # (N, H * W, A)
        mean = pixels.mean((0, 1))
        # Per image first: in float32 a sum of many short sums is more accurate than one long one.
        gram = torch.bmm(pixels.transpose(1, 2), pixels).sum(0)
        covariance = torch.addr(gram, mean, mean, beta=1 / count, alpha=-1)
        projected = covariance @ pointwise
        var = (pointwise * projected).sum(0)
        inverse = (var + EPSILON).rsqrt()
        scaled = pointwise * inverse
        matrix = scaled if mix is None else scaled @ mix
        y = pointwise_convolution(x, matrix, -(mean @ matrix))
        if rectify:
            y.relu_()
        ctx.save_for_backward(x, mean, projected, inverse, scaled, matrix, mix, y if rectify else None)
        mean_z = mean @ pointwise
        ctx.mark_non_differentiable(mean_z, var)
        ctx.set_materialize_grads(False)
        return y, mean_z, var

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        _refuse_to_be_differentiated_twice()
        x, mean, projected, inverse, scaled, matrix, mix, rectified = ctx.saved_tensors
        grad = grad.contiguous()
        if rectified is not None:
            grad = torch.ops.aten.threshold_backward(grad, rectified, 0)
        count = x.shape[:3].numel()
        pixels, grad_pixels = x.flatten(0, 2), grad.flatten(0, 2)
        grad_sum = grad_pixels.sum(0, dtype=mean.dtype)
        # By `matrix`, with x centred: (x - mean)^T grad.
        grad_matrix = torch.addr((pixels.t() @ grad_pixels).to(mean.dtype), mean, grad_sum, alpha=-1)
        grad_mix = scaled.t() @ grad_matrix if ctx.needs_input_grad[2] else None
        grad_scaled = grad_matrix if mix is None else grad_matrix @ mix.t()
        # BatchNorm: from each normalised channel's gradient its mean and its correlation with the channel are taken.
        correlation = (scaled * grad_scaled).sum(0) / count
        grad_pointwise = None
        if ctx.needs_input_grad[1]:
            grad_pointwise = (grad_scaled - projected * (count * inverse * correlation)) * inverse
        back = (scaled * correlation) @ scaled.t()
        bias = torch.addmv(mean @ back, matrix, grad_sum, alpha=-1 / count)
        grad_x = pointwise_convolution(grad, matrix.t(), bias)
        grad_x.flatten(0, 2).addmm_(pixels, back.to(x.dtype), alpha=-1)
        return grad_x, grad_pointwise, grad_mix, None


def _refuse_to_be_differentiated_twice() -> None:
    if torch.is_grad_enabled():  # in a backward pass only by create_graph=True
        raise RuntimeError(
            "The fast supernet cannot be differentiated twice (create_graph=True); use darts_space.PlainSuperNet."
        )


def depthwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Depthwise convolution that keeps H and W but for the stride: x (N, H, W, C), weight (C, 1, 5, 5).

    The first half of the filters is 3x3 in a frame of zeros, which has no gradient.
    """
    return _Depthwise.apply(x, weight.to(x.dtype), stride, dilation)


class _Depthwise(torch.autograd.Function):
    """The backward pass is PyTorch's, except for the weights' gradient on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.stride, ctx.dilation = x.shape, stride, dilation
        x = x.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, None, stride, 2 * dilation, dilation, len(weight)).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        _refuse_to_be_differentiated_twice()
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        by_input = by_weight = None
        if ctx.needs_input_grad[0]:
            like = grad.new_empty(()).expand(ctx.shape) if x is None else x
            by_input, _ = _convolution_backward(grad, like, weight, ctx.stride, ctx.dilation, by_input=True)
        if ctx.needs_input_grad[1]:
            narrow = grad.device.type == "cpu" and ctx.dilation == 1
            by_weight = (_by_weight_in_columns if narrow else _by_weight)(grad, x, weight, ctx.stride, ctx.dilation)
        return by_input, by_weight, None, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, *, by_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient by x or by the weight, whose height and width may differ."""
    padding = [size // 2 * dilation for size in weight.shape[2:]]
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, padding, [dilation] * 2,
        False, [0, 0], len(weight), [by_input, not by_input, False],
    )  # fmt: skip
    return by_x.permute(0, 2, 3, 1) if by_input else None, by_weight


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return _convolution_backward(grad, x, weight, stride, dilation, by_input=False)[1]


def _by_weight_in_columns(grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The same, fifteen times as fast: oneDNN has a fast kernel for filters of any height, but at most three wide.

    It gives columns 1..3; and, over x moved by a pixel, column 0 or 4 of the filters that are not framed by zeros.
    """
    framed = len(weight) // 2
    middle = _by_weight(grad, x, weight[..., 1:4], stride, dilation)
    grad, x, narrow = grad[..., framed:].contiguous(), x[..., framed:], weight[framed:, ..., 1:4]
    column = x.new_zeros(()).expand(*x.shape[:2], 1, x.shape[3])
    right, left = torch.cat([column, x[:, :, :-1]], dim=2), torch.cat([x[:, :, 1:], column], dim=2)
    result = F.pad(middle, (1, 1))
    result[framed:, ..., :1] = _by_weight(grad, right, narrow, stride, dilation)[..., :1]
    result[framed:, ..., 4:] = _by_weight(grad, left, narrow, stride, dilation)[..., 2:]
    return result


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

"""Separable convolutions against PyTorch's two convolutions in float64: values, every gradient, what they keep."""

import pytest
import torch
from tensors import draw, gradients_of
from torch.nn import functional as F

from darts_space.fast import kernels
from darts_space.fast.separable import batch_to_space, depthwise_convolution, separable_convolution, space_to_batch
from darts_space.primitives import DepthwiseConv2d

SIZES = [(8, 8), (4, 4), (3, 7), (7, 2), (1, 1), (6, 5), (9, 10)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("device_is_ours", [True, False])
def test_a_separable_convolution_is_two_grouped_ones(
    stride, dilation, size, copied, groups, device_is_ours, monkeypatch
):
    if not device_is_ours:
        monkeypatch.setattr(kernels, "OURS", set())
    axes = (2, 2, 3, 1) if copied else None
    channels = 12
    filters, pointwise = draw(channels, 1, 5, 5, seed=1), draw(12, channels // groups, 1, 1, seed=2)
    x = draw(3, *size, 2 if copied else channels)

    def expected_from(x, filters, pointwise):
        x = x[..., [0, 0, 0, 1, 1, 1] * 2] if copied else x
        y = F.conv2d(x.permute(0, 3, 1, 2), filters, None, stride, 2 * dilation, dilation, channels)
        return F.conv2d(y, pointwise, groups=groups).permute(0, 2, 3, 1)

    def found_from(x, filters, pointwise):
        return separable_convolution(x, filters, pointwise, stride, dilation, axes=axes)

    expected = gradients_of(expected_from, x, filters, pointwise)
    for left, right in zip(gradients_of(found_from, x, filters, pointwise), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [20, 32, 33])
def test_gradients_in_bf16_stay_near_float32(size, dilation, stride):
    """oneDNN's own gradients of dilated filters are garbage on maps beyond 28 pixels."""
    inputs = draw(4, size, size, 8), draw(8, 1, 5, 5, seed=1), draw(8, 8, 1, 1, seed=2)

    def gradients(dtype):
        return gradients_of(lambda *x: separable_convolution(*x, stride, dilation), *(x.to(dtype) for x in inputs))

    for left, right in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert float((left - right).norm() / right.norm()) < 0.02


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_of_a_separable_convolution_can_be_had_alone(wanted):
    inputs = draw(2, 6, 5, 2), draw(4, 1, 5, 5, seed=1), draw(4, 2, 1, 1, seed=2)
    axes = (2, 1, 1, 2)
    together = gradients_of(lambda *inputs: separable_convolution(*inputs, axes=axes), *inputs)

    def one(x):
        return separable_convolution(*inputs[:wanted], x, *inputs[wanted + 1 :], axes=axes)

    for left, right in zip(gradients_of(one, inputs[wanted]), (together[0], together[1 + wanted]), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(("copied", "weights_learn", "kept"), [(True, True, 1), (False, True, 12), (True, False, 0)])
def test_a_separable_convolution_keeps_little(copied, weights_learn, kept):
    """In channels of the input's size; six copies are made of one."""
    x, filters, pointwise = draw(2, 8, 8, 1 if copied else 6), draw(6, 1, 5, 5, seed=1), draw(6, 6, 1, 1, seed=2)
    for parameter in (filters, pointwise):
        parameter.requires_grad_(weights_learn)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        separable_convolution(x.requires_grad_(), filters, pointwise, axes=(2, 1, 3, 1) if copied else None)
    assert sum(sizes) == kept * 2 * 8 * 8 + filters.numel() + pointwise.numel()


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_a_depthwise_convolution_is_a_grouped_one(kernel, stride, dilation, size, training):
    """The function in float64, and the module in the layout and the type in which it uses the function."""
    x, filters = draw(3, 4, *size), draw(4, 1, kernel, kernel, seed=1)
    module = DepthwiseConv2d(4, kernel, stride, dilation).train(training)

    def expected_from(x, filters):
        return F.conv2d(x, filters, None, stride, kernel // 2 * dilation, dilation, 4)

    def found_from(x, filters):
        return depthwise_convolution(x, filters, stride, dilation)

    def module_from(x, filters):
        x = x.float().contiguous(memory_format=torch.channels_last)
        return torch.func.functional_call(module, {"weight": filters.float()}, (x,)).double()

    expected = gradients_of(expected_from, x, filters)
    for found, digits in ((found_from, 1e-11), (module_from, 1e-5)):
        for left, right in zip(gradients_of(found, x, filters), expected, strict=True):
            torch.testing.assert_close(left, right, rtol=digits, atol=digits)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_a_depthwise_convolution_can_be_differentiated_twice(stride, dilation):
    inputs = draw(2, 2, 4, 4).requires_grad_(), draw(2, 1, 5, 5, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *inputs: depthwise_convolution(*inputs, stride, dilation), inputs)


def test_dilated_filters_leave_float64_alone_under_autocast():
    module = DepthwiseConv2d(2, 3, 1, dilation=2).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(draw(2, 2, 5, 5)).dtype == torch.float64


def test_a_second_derivative_is_refused():
    x = draw(2, 4, 4, 6).requires_grad_()
    y = separable_convolution(x, draw(6, 1, 5, 5), draw(6, 6, 1, 1)).square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(y, x, create_graph=True)


def test_dilation_is_a_convolution_of_every_second_pixel():
    x, filters, pointwise = draw(3, 6, 8, 4), draw(4, 1, 5, 5, seed=1), draw(4, 4, 1, 1, seed=2)
    assert torch.equal(batch_to_space(space_to_batch(x)), x)
    found = batch_to_space(separable_convolution(space_to_batch(x), filters, pointwise))
    torch.testing.assert_close(found, separable_convolution(x, filters, pointwise, dilation=2))

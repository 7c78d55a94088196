"""Each kernel against PyTorch's or a loop in float64: values, every gradient, running statistics."""

import math

import joint_norm
import numpy as np
import pytest
import torch
from ranks import run_ranks
from tensors import draw, gradients_of
from torch.nn import functional as F

from darts_space.fast import kernels
from darts_space.fast.kernels import average_pool, concatenate, copied, product, summed
from darts_space.fast.norm import BatchNorm2d, batch_norm


@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (1, 3, 1, 9), (2, 5, 1, 1), (8, 1, 3, 3)])
@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("devices", [{"cpu"}, set()])
def test_batch_norm_is_pytorch_s(shape, parameters, training, devices, monkeypatch):
    monkeypatch.setattr(kernels, "OURS", devices)
    x, weight, bias = 3 + draw(*shape), *(draw(shape[1], seed=seed) for seed in (1, 2))
    statistics = [[draw(shape[1], seed=3), draw(shape[1], seed=4).square()] for _ in range(2)]
    inputs = x.contiguous(memory_format=torch.channels_last), *(weight, bias)[:parameters]
    found = gradients_of(lambda x, *p: batch_norm(x, *statistics[0], *p, training=training), *inputs)

    def expected_from(x, weight=None, bias=None):
        return F.batch_norm(x, *statistics[1], weight, bias, training)

    for left, right in zip(found, gradients_of(expected_from, x, *inputs[1:]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    for left, right in zip(*statistics, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_scale_that_is_a_column_has_the_right_gradients():
    """PyTorch 2.14's backward pass in channels_last is wrong for such a scale."""
    x, table = draw(4, 6, 5, 5).contiguous(memory_format=torch.channels_last), draw(6, 3, seed=1)
    statistics = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = gradients_of(lambda x, t: batch_norm(x, *statistics, t[:, 1], training=True), x, table)
    expected = gradients_of(lambda x, t: F.batch_norm(x, None, None, training=True) * t[:, 1, None, None], x, table)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_batch_norm_in_float32_is_more_accurate_than_pytorch_s():
    """In channels_last; for values, and for the gradients with respect to x and the scale."""
    x, weight = draw(32, 8, 32, 32) + 1, draw(8, seed=1)

    def errors(function):
        exact = gradients_of(lambda x, w: F.batch_norm(x, None, None, w, training=True), x, weight)
        found = gradients_of(function, x.float().contiguous(memory_format=torch.channels_last), weight.float())
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])

    ours = errors(lambda x, w: batch_norm(x, torch.zeros(8), torch.ones(8), w, training=True))
    theirs = errors(lambda x, w: F.batch_norm(x, None, None, w, training=True))
    assert (ours < 5e-7).all() and (ours <= theirs).all(), (ours, theirs)


def test_the_module_counts_its_batches_and_moves_its_statistics():
    ours, theirs = BatchNorm2d(6).double(), torch.nn.BatchNorm2d(6).double()
    for seed in range(3):
        x = draw(4, 6, 5, 5, seed=seed).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("parts", [[(0, 2), (2, 5)], [(0, 0), (0, 5)], [(0, 1), (1, 1), (1, 5)]])
def test_a_joint_norm_is_that_of_the_whole_batch(parts, server, tmp_path):
    """Some processes may have no images."""
    run_ranks(server, len(parts), joint_norm.main, tmp_path, parts)
    x, weight, bias, grad = joint_norm.inputs()
    statistics = [torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)]
    y = F.batch_norm(x, *statistics, weight, bias, True)
    expected = [y.detach(), *torch.autograd.grad((y * grad).sum(), (x, weight, bias)), *statistics]
    found = list(zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(len(parts))), strict=True))
    together = [torch.cat(found[0]), torch.cat(found[1]), sum(found[2]), sum(found[3]), found[4][0], found[5][-1]]
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)


def test_an_empty_batch_moves_no_statistics():
    mean, var = torch.full((3,), 2.0), torch.full((3,), 3.0)
    assert batch_norm(torch.ones(0, 3, 4, 4), mean, var, training=True).shape == (0, 3, 4, 4)
    assert mean.tolist() == [2.0] * 3 and var.tolist() == [3.0] * 3


def test_a_single_pixel_is_refused_while_training():
    with pytest.raises(ValueError, match="single pixel"):
        batch_norm(torch.zeros(1, 3, 1, 1), torch.zeros(3), torch.ones(3), training=True)


@pytest.mark.parametrize("device_is_ours", [True, False])
def test_a_product_is_one_of_matrices(device_is_ours, monkeypatch):
    if not device_is_ours:
        monkeypatch.setattr(kernels, "OURS", set())
    x, matrix = draw(3, 4, 5, 6), draw(6, 2, seed=1)
    expected = gradients_of(lambda x: x @ matrix, x)
    for left, right in zip(gradients_of(lambda x: product(x, matrix), x), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert product(x.bfloat16(), matrix).dtype == torch.bfloat16


@pytest.mark.parametrize("device_is_ours", [True, False])
@pytest.mark.parametrize("axes", [(2, 2, 4, 3), (2, 1, 3, 4), (1, 2, 5, 1), (3, 7, 1, 2)])
@pytest.mark.parametrize("some", [(0, 1), (0, 2), (2,)])
def test_channels_are_copied_and_summed(device_is_ours, axes, some, monkeypatch):
    """Against indices and a loop; one is the other's gradient."""
    if not device_is_ours:
        monkeypatch.setattr(kernels, "OURS", set())
    left = [size for axis, size in enumerate(axes) if axis not in some]
    x, y = draw(2, 3, 5, math.prod(left)), draw(2, 3, 5, math.prod(axes), seed=1)
    copies, sums = copied(x, axes, some), torch.zeros_like(x)
    for place, index in enumerate(np.ndindex(*axes)):
        source = np.ravel_multi_index([i for axis, i in enumerate(index) if axis not in some], left)
        assert torch.equal(copies[..., place], x[..., source])
        sums[..., source] += y[..., place]
    found, by_y = gradients_of(lambda y: summed(y, axes, some), y)
    torch.testing.assert_close(found, sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(by_y, copied(draw(*x.shape, seed=9), axes, some))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("layout_of_gradient", [torch.channels_last, torch.contiguous_format])
def test_the_gradients_of_a_concatenation_have_no_gaps(layout, layout_of_gradient):
    parts = [draw(3, channels, 4, 5, seed=channels).contiguous(memory_format=layout) for channels in (2, 3, 4)]
    for part in parts:
        part.requires_grad_()
    found, expected = concatenate(parts), torch.cat(parts, dim=1)
    assert torch.equal(found, expected)
    grad = draw(*found.shape).contiguous(memory_format=layout_of_gradient)
    by_parts = torch.autograd.grad(found, parts, grad)
    assert all(map(torch.equal, by_parts, torch.autograd.grad(expected, parts, grad)))
    assert all(part.is_contiguous(memory_format=layout) for part in by_parts)


def test_a_concatenation_is_differentiated_twice_forward_and_functionally():
    parts = tuple(draw(2, channels, 2, 3, seed=channels).requires_grad_() for channels in (2, 1))

    def squares(*parts):
        return concatenate(list(parts)).square()

    assert torch.autograd.gradcheck(squares, parts, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squares, parts)
    gradient = torch.func.grad(lambda x: squares(x, parts[1]).sum())(parts[0].detach())
    torch.testing.assert_close(gradient, 2 * parts[0].detach())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 6), (1, 3), (1, 1)])
def test_the_average_pool_is_pytorch_s(stride, size):
    x = draw(3, 4, *size).contiguous(memory_format=torch.channels_last)
    expected = gradients_of(lambda x: F.avg_pool2d(x, 3, stride, 1, count_include_pad=False), x)
    for left, right in zip(gradients_of(lambda x: average_pool(x, stride), x), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)

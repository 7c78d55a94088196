"""Random tensors, and all gradients of a function, for tests that compare two functions."""

import torch


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients_of(function, *inputs):
    """The value, and the gradients of its product with a fixed tensor with respect to all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    found = torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), inputs)
    return y.detach(), *found

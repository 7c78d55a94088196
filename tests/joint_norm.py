"""What each process runs in test_kernels.py: a joint norm on its part of a batch, forward and backward."""

from pathlib import Path

import torch
from tensors import draw

from darts_space.fast.norm import batch_norm
from nas_kmix.engine.distributed import joined


def inputs():
    x, weight, bias = draw(5, 6, 4, 4), draw(6, seed=1), draw(6, seed=2)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), draw(5, 6, 4, 4, seed=3)


def main(out: Path, parts: list[tuple[int, int]]) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as world:
        part = slice(*parts[world.rank])
        x, weight, bias, grad = inputs()
        x = x.detach()[part].requires_grad_()
        statistics = [torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)]
        y = batch_norm(x, *statistics, weight, bias, training=True, joint=True)
        gradients = torch.autograd.grad((y * grad[part]).sum(), (x, weight, bias))
        torch.save([y.detach(), *gradients, *statistics], out / f"{world.rank}.pt")

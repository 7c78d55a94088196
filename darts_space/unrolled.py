"""The second-order architecture gradient: the validation loss after one SGD step of the weights (DARTS 2.3).

In:  the training and the validation loss as functions of the present weights w and architecture a; SGD's state.
Out: the validation loss at w' and its gradient by a; weights and statistics are restored bit for bit.

With w' = w - lr * (momentum * buffer + dL_train/dw + weight_decay * w), equations 7 and 8 are

    dL_val/da (w', a) - lr * [dL_train/da (w + R v, a) - dL_train/da (w - R v, a)] / 2R

where v = dL_val/dw' and R = 0.01 / ||v||: a central difference instead of a product with second derivatives. In a
network of ReLUs and max pools the difference crosses kinks; for small batches the result can then be far from the
derivative through the step, with which it agrees where no kink lies between (tests/test_bilevel.py shows both). R is
the published one. Deviation from the published code: none of the four passes moves BatchNorm's running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DIFFERENCE_STEP = 1e-2
"""R * ||v||, the length of the weights' displacement. DARTS section 2.3."""


def unrolled_gradient(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    weights: list[nn.Parameter],
    arch: list[nn.Parameter],
    statistics: list[Tensor],
    summed: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    *,
    momentum_buffers: list[Tensor] | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, list[Tensor]]:
    """Validation loss (0-dimensional, detached) at w' and its gradient by `arch`, one tensor for each.

    `statistics` are the model's buffers, restored like the weights; `momentum_buffers` SGD's, None before its
    first step; `summed` makes the gradients of a whole batch from those of its parts. Nothing here waits for a GPU.
    """

    def gradients(loss_of: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            loss = loss_of()
        return loss.detach(), list(summed(torch.autograd.grad(loss, parameters)))

    with torch.no_grad(), _restored_after([*weights, *statistics]):
        start = [weight.clone() for weight in weights]

        _, step = gradients(train_loss, weights)
        torch._foreach_add_(step, start, alpha=weight_decay)
        if momentum_buffers is not None:
            torch._foreach_add_(step, momentum_buffers, alpha=momentum)
        torch._foreach_add_(weights, step, alpha=-lr)

        loss, direct_and_v = gradients(val_loss, arch + weights)
        direct, v = direct_and_v[: len(arch)], direct_and_v[len(arch) :]
        radius = DIFFERENCE_STEP / nn.utils.get_total_norm(v).clamp_min(1e-12)  # v = 0 then adds 0, not NaN
        shift = torch._foreach_mul(v, radius)

        torch._foreach_copy_(weights, torch._foreach_add(start, shift))
        _, plus = gradients(train_loss, arch)
        torch._foreach_copy_(weights, torch._foreach_sub(start, shift))
        _, minus = gradients(train_loss, arch)

        mixed = torch._foreach_sub(plus, minus)
        torch._foreach_mul_(mixed, lr / (2 * radius))
        return loss, torch._foreach_sub(direct, mixed)


@contextmanager
def _restored_after(tensors: list[Tensor]) -> Iterator[None]:
    """Restore exact copies afterwards: subtracting what was added would leave rounding errors."""
    saved = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)

"""BatchNorm while training: accurate and fast on a CPU, and on any device over the batches of several processes.

In:  tensors (N, C, H, W); running statistics, which move in place.
Out: nn.BatchNorm2d's result, differentiable only once: create_graph=True is refused where PyTorch's is not used.

A joint norm takes the parts of one batch in all processes of torch.distributed's default group for a single batch. Its
forward pass sums the processes' statistics, and so its backward pass sums two gradients: nn.SyncBatchNorm does the
same, but on GPUs alone. All processes must run the same network; the part of some of them may be empty.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from darts_space.fast import kernels

EPSILON = 1e-5  # this and the next are nn.BatchNorm2d's
MOMENTUM = 0.1


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    joint: bool = False,
) -> Tensor:
    """nn.BatchNorm2d on x (N, C, H, W) in channels_last; while training the running statistics move in place.

    Raises ValueError while training on a single pixel, which has no variance; in a joint norm it becomes zero.
    """
    if training and not joint and x.numel() == x.shape[1]:
        raise ValueError("BatchNorm cannot normalise a single pixel while training; use a larger batch or images.")
    weight = None if weight is None else weight.contiguous()  # PyTorch's gradient by x is wrong otherwise, on a CPU
    ours = joint or (x.device.type in kernels.OURS and len(x) > 0)  # an empty batch moves no statistics
    if not training or not ours:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPSILON)
    y, mean, var, count = _BatchNorm.apply(x, weight, bias, joint)
    with torch.no_grad():
        running_mean.lerp_(mean, MOMENTUM)
        running_var.lerp_(var * (count / ((count - 1).clamp(min=1) if joint else count - 1)), MOMENTUM)
    return y


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, computed by `batch_norm`."""

    joint = False
    """Whether to take the batches of all processes for a single one; `join_norms` says so."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training, joint=self.joint
        )


class BatchNormOfOne(nn.BatchNorm2d):
    """BatchNorm that accepts a single value per channel, as the last batch of an epoch may be a single image.

    A single value has no variance, so PyTorch refuses it; here the running statistics normalise it.
    """

    joint = False
    """As in `BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        count = _pixels_of_all_processes(x) if self.training and self.joint else x.shape[0] * x.shape[2] * x.shape[3]
        if self.training and count == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return BatchNorm2d.forward(self, x) if self.joint else super().forward(x)


def join_norms(model: nn.Module) -> None:
    """Let every BatchNorm of `model` take the batches of all processes for a single one, in place.

    Modules with an attribute `joint` compute their norms themselves; any other nn.BatchNorm2d is replaced, under the
    same name and with the same parameters and statistics.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and not hasattr(module, "joint"):
            model.set_submodule(name, module := _ours(module))
        if hasattr(module, "joint"):
            module.joint = True


def _pixels_of_all_processes(x: Tensor) -> int:
    """How many values a joint norm sees of each channel of x (N, C, H, W)."""
    count = torch.full((), x.numel() // x.shape[1], device=x.device)
    distributed.all_reduce(count)
    return int(count)


def _ours(norm: nn.BatchNorm2d) -> BatchNorm2d:
    assert norm.eps == EPSILON and norm.momentum == MOMENTUM and norm.track_running_stats
    ours = BatchNorm2d(norm.num_features, affine=norm.affine)
    for tensors in ("_parameters", "_buffers"):
        getattr(ours, tensors).update(getattr(norm, tensors))
    return ours


class _BatchNorm(torch.autograd.Function):
    """BatchNorm's training pass: as fast as PyTorch's on a CPU, its float32 sums ten to thirty times as accurate.

    PyTorch sums a channels_last tensor pixel by pixel, each channel in a single float32: after 65,536 pixels the fifth
    digit is wrong. Here each column of the image counts as a channel of its own, so that each sum is shorter by the
    width of the image; the sums of the columns are added up afterwards.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, joint: bool
    ) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        mean, var, count = *_statistics(x), x.numel() // x.shape[1]  # pixels
        if joint:
            mean, var, count = _of_all_processes(mean, var, count)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.joint = count, joint
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, var, weight, bias, eps=EPSILON), mean, var, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        kernels.refuse_to_be_differentiated_twice()
        x, weight, mean, var = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        own = sums = _gradient_sums(grad, x, mean, var)
        if ctx.joint:
            distributed.all_reduce(sums := own.clone())
        scale = (var + EPSILON).rsqrt()
        if weight is not None:
            scale = scale * weight
        # The gradient through mean and variance removes the mean of grad and its correlation with the normalised x.
        by_x = F.batch_norm(x, mean, var, *(sums * (scale * (-1 / ctx.count))), eps=EPSILON)
        by_x.addcmul_(grad, scale.to(grad.dtype)[:, None, None])
        by_parameters = (part if needed else None for part, needed in zip(own, ctx.needs_input_grad[1:3], strict=True))
        return by_x, *by_parameters, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased) of each channel; zeros if there are no images."""
    if len(x) == 0:
        return tuple(_columns(x).new_zeros(2, x.shape[1]))
    by_column = torch.ops.aten.batch_norm_update_stats(_columns(x), None, None, 0.0)
    means, variances = (values.view(x.shape[3], -1) for values in by_column)
    between, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + between


def _of_all_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of all processes' pixels together, from those of each."""
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    table = own.new_zeros(distributed.get_world_size(), len(own))
    table[distributed.get_rank()] = own
    distributed.all_reduce(table)  # each has added its own row
    means, variances, counts = table.split([len(mean), len(var), 1], dim=1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), counts.sum()


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Sums over the pixels of grad * normalised x, and of grad: (2, C)."""
    width = x.shape[3]
    if len(x) == 0:
        return mean.new_zeros(2, x.shape[1])
    statistics = (value.expand(width, -1).contiguous().flatten() for value in (mean, var))  # `repeat`, but faster
    _, *sums = torch.ops.aten.native_batch_norm_backward(
        _columns(grad), _columns(x), None, *statistics, None, None, False, EPSILON, [False, True, True],
    )  # fmt: skip
    return torch.stack(sums).view(2, width, -1).sum(1)


def _columns(x: Tensor) -> Tensor:
    """x (N, C, H, W), in channels_last, as (1, W * C, N * H, 1), in channels_last too; float32 at least."""
    x = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(1, -1, 1, x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)

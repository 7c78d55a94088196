"""The bilevel search: architecture parameters on one half of the data, weights on the other, step by step.

In:  a supernet with `arch_parameters()` and `weight_parameters()`; per step two batches on its device, each
     (images (N, 3, H, W) float, labels (N,) int64), one from the weight half and one from the architecture half.
Out: the trained supernet, whose `genotype()` is the search's result; losses as tensors that stay on the device.

A step first moves alpha and beta by Adam on the validation loss, then the weights by SGD on the training loss
(DARTS algorithm 1; PC-DARTS section 4.2). First order takes the weights as they are; `unrolled` takes them one
SGD step ahead (DARTS section 2.3). Alpha and beta rest for the first `rest_steps`, until the weights mean something
(PC-DARTS section 4.2). That takes steps, whatever the number of images, so the search is measured in steps.

Deviations from the published code: alpha and beta get no gradient in the weight step, and the weights none in
the architecture step, where no one uses them; in the second order no extra pass moves BatchNorm's running statistics,
and the weights are restored bit for bit. In the first order the architecture pass does move the running statistics,
as published. Data loading, logs and files are left to the caller.

In a joint search the processes of torch.distributed take every step together, each with its own part of both batches,
and their gradients are summed. BatchNorm sees the parts, unless `fast.norm.join_norms` has joined them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from darts_space.derivation import Removal
from darts_space.removal import removal_losses
from darts_space.settings import BilevelConfig, learning_rate
from darts_space.unrolled import unrolled_gradient

Batch = tuple[Tensor, Tensor]

_AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """One step's losses: detached 0-dimensional tensors on the model's device, so that no step waits for them.

    In a joint search they are this process's addends: their sums are those of the whole batches.
    """

    train_loss: Tensor
    """Mean cross-entropy of the training batch before the weight step."""
    train_correct: Tensor
    """Number of correct predictions in it, int64, 0..N."""
    val_loss: Tensor | None
    """Mean cross-entropy of the validation batch before the architecture step (in the second order: at the
    weights one step ahead); None while alpha and beta rest."""


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Compute without these parameters' gradients, and keep nothing that only they would need."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Search:
    """A supernet with its two optimisers. Call `step` for each pair of batches, `config.steps` times.

    The model is trained in place, on the device where its parameters are. A step never waits for a GPU.
    """

    steps_done: int
    """Steps taken so far."""

    def __init__(self, model: nn.Module, config: BilevelConfig, *, joint: bool = False):
        """The processes of a `joint` search start from equal models, which then stay equal to the bit."""
        self.model = model
        self.config = config
        self.joint = joint
        self.weights: list[nn.Parameter] = list(model.weight_parameters())
        self.arch: list[nn.Parameter] = list(model.arch_parameters())
        self.device = self.arch[0].device
        if config.amp == "fp16" and self.device.type != "cuda":
            raise ValueError(f"amp 'fp16' needs a CUDA device, the model is on {self.device}; use 'bf16' or 'off'.")
        # On a GPU the fused optimisers also spare fp16 a wait: they skip an overflown step on the device itself.
        kernels = {"fused": True} if self.device.type == "cuda" else {"foreach": True}
        self.weight_optimizer = torch.optim.SGD(
            self.weights, config.lr, config.momentum, weight_decay=config.weight_decay, **kernels
        )
        self.arch_optimizer = torch.optim.Adam(
            self.arch, config.arch_lr, config.arch_betas, weight_decay=config.arch_weight_decay, **kernels
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.steps_done = 0

    @property
    def resting(self) -> bool:
        """Whether alpha and beta rest in the step to come."""
        return self.steps_done < self.config.rest_steps

    @property
    def lr(self) -> float:
        """SGD's rate in the step to come."""
        return learning_rate(self.config, self.steps_done)

    def set_lr(self, lr: float) -> None:
        """Set SGD's rate for a step taken by `weight_step`; `step` sets it itself."""
        for group in self.weight_optimizer.param_groups:
            group["lr"] = lr

    def set_arch_lr(self, lr: float) -> None:
        """Set Adam's rate."""
        for group in self.arch_optimizer.param_groups:
            group["lr"] = lr

    def step(self, train_batch: Batch, val_batch: Batch | None) -> StepResult:
        """One architecture step on `val_batch` (none while alpha and beta rest, and none is read), one weight step."""
        if self.steps_done >= self.config.steps:
            raise ValueError(f"The search has taken all of its {self.config.steps} steps.")
        val_loss = None
        self.set_lr(self.lr)
        if not self.resting:
            if val_batch is None:
                raise ValueError(f"Step {self.steps_done} moves the architecture and needs a validation batch.")
            val_loss = self.arch_step(train_batch, val_batch)
        train_loss, correct = self.weight_step(train_batch)
        self.scaler.update()
        self.steps_done += 1
        return StepResult(train_loss, correct, val_loss)

    def arch_step(self, train_batch: Batch, val_batch: Batch) -> Tensor:
        """Update alpha and beta and return the validation loss before. The first order ignores the training batch."""
        self.model.train()
        if self.config.unrolled:
            val_loss, grads = self._second_order(train_batch, val_batch)
        else:
            val_loss, grads = self._first_order(val_batch)
        self._update(self.arch_optimizer, self.arch, grads, self.config.arch_grad_clip)
        return val_loss

    def weight_step(self, train_batch: Batch) -> tuple[Tensor, Tensor]:
        """Update the weights and return the training loss and the number of correct predictions before."""
        self.model.train()
        with _without_gradients(self.arch):
            train_loss, logits = self._loss(train_batch)
        grads = self._summed(torch.autograd.grad(self.scaler.scale(train_loss), self.weights))
        self._update(self.weight_optimizer, self.weights, grads, self.config.grad_clip)
        return train_loss.detach(), (logits.argmax(1) == train_batch[1]).sum()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, in a joint search this process's addend, and logits."""
        images, labels = batch
        dtype = _AMP_DTYPES[self.config.amp]
        if dtype is None:
            logits = self.model(images)
        else:
            with torch.autocast(self.device.type, dtype):
                logits = self.model(images).float()
        size = len(labels)
        if self.joint:
            distributed.all_reduce(size := torch.full((), float(size), device=self.device))  # of the whole batch
        return F.cross_entropy(logits, labels, reduction="sum") / size, logits

    def _summed(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the whole batch's mean loss from those of its addends."""
        if not self.joint:
            return grads
        together = torch.cat([grad.flatten() for grad in grads])  # one message instead of hundreds
        distributed.all_reduce(together)
        parts = together.split([grad.numel() for grad in grads])
        return [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)]

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        grads: Sequence[Tensor],
        clip: float | None,
    ) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            if self.device.type == "cuda" and grad.stride() != parameter.stride():  # the fused optimisers want the same
                grad = torch.empty_like(parameter).copy_(grad)
            parameter.grad = grad
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def arch_gradient(self, val_batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Validation loss and its gradient with respect to alpha and beta at the present weights.

        No parameter moves, but BatchNorm's running statistics do. With fp16 the gradient has the scale of the losses.
        """
        return self._first_order(val_batch)

    def removal_losses(self, val_batches: Sequence[Batch]) -> Removal:
        """By how much the validation loss rises if an edge is removed; nothing moves. See `removal.removal_losses`."""
        rises = removal_losses(self.model, lambda batch: self._loss(batch)[0], val_batches)
        if self.joint:  # addends so far
            distributed.all_reduce(together := torch.stack(rises).to(self.device))
            rises = (together[0].cpu(), together[1].cpu())
        return rises

    def _first_order(self, val_batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        with _without_gradients(self.weights):
            loss, _ = self._loss(val_batch)
        return loss.detach(), self._summed(torch.autograd.grad(self.scaler.scale(loss), self.arch))

    def _second_order(self, train_batch: Batch, val_batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """The same, but through one SGD step on the training batch."""
        buffers = [self.weight_optimizer.state[weight].get("momentum_buffer") for weight in self.weights]
        return unrolled_gradient(
            lambda: self._loss(train_batch)[0],
            lambda: self._loss(val_batch)[0],
            self.weights,
            self.arch,
            list(self.model.buffers()),
            self._summed,
            momentum_buffers=None if buffers[0] is None else buffers,  # there are none before the first weight step
            lr=self.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, as tensors and plain values (`torch.load(weights_only=True)` reads it).

        As in PyTorch the tensors are the live ones: save or copy them before the next step.
        """
        return {
            "steps_done": self.steps_done,
            "model": self.model.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict()["state"],
            "arch_optimizer": self.arch_optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same model and config; another model's is a ValueError before anything moves."""
        keys = ("steps_done", "model", "weight_optimizer", "arch_optimizer", "scaler")
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"The search state lacks {', '.join(missing)}; it is not one of Search.state_dict.")
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state["model"].items()}
        if different := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
            name = different[0]
            raise ValueError(
                f"The search state is of another supernet: {len(different)} tensors differ, first {name} with "
                f"{found.get(name, 'nothing')} for {shapes.get(name, 'nothing')}; build the model as it was saved."
            )
        self.model.load_state_dict(state["model"])
        for name in ("weight_optimizer", "arch_optimizer"):
            optimizer = getattr(self, name)
            # Rates and kernels stay this search's own, so that it may go on on another kind of device.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[name], "param_groups": groups})
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the search so far had no use for one
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]

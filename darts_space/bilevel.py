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
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_space.unrolled import unrolled_gradient

Batch = tuple[Tensor, Tensor]

_AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BilevelConfig:
    """Hyper-parameters of the search. The defaults are PC-DARTS's on CIFAR-10 (section 4.2), batch 256."""

    rest_steps: int = 1470
    """First steps, in which only the weights move. PC-DARTS 4.2: 15 epochs of 98 steps."""
    arch_steps: int = 3430
    """Steps after them, which move alpha and beta too. PC-DARTS 4.2: 35 epochs."""
    lr: float = 0.1
    """SGD's first learning rate, for batch 256 (see `scaled_lr`). PC-DARTS 4.2; ImageNet (4.3) 0.5 at 1024."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """SGD's rate over all steps: half a cosine from `lr` to `lr_min` (PC-DARTS 4.2), or `lr` throughout."""
    lr_min: float = 0.0
    """The rate that the cosine approaches. PC-DARTS 4.2."""
    epoch_steps: int = 98
    """Steps between changes of the rate. PC-DARTS 4.2: an epoch of 25,000 images."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up of SGD's rate. Published ImageNet code: 5."""
    momentum: float = 0.9
    """SGD's momentum. PC-DARTS 4.2."""
    weight_decay: float = 3e-4
    """SGD's weight decay. PC-DARTS 4.2."""
    grad_clip: float = 5.0
    """Clip the norm of the gradient of all weights together to this. Published code."""
    arch_lr: float = 6e-4
    """Constant learning rate of Adam for alpha and beta. PC-DARTS 4.2; ImageNet (4.3) 6e-3."""
    arch_betas: tuple[float, float] = (0.5, 0.999)
    """Adam's two decay rates (not the edge parameters beta). PC-DARTS 4.2."""
    arch_weight_decay: float = 1e-3
    """Adam's weight decay on alpha and beta. PC-DARTS 4.2."""
    arch_grad_clip: float | None = None
    """Largest norm of the gradient of alpha and beta; None does not clip. Published ImageNet code: 5."""
    unrolled: bool = False
    """Use the second-order architecture gradient. DARTS 2.3; PC-DARTS uses the first order."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast the forward passes; fp16 needs a GPU and scales the losses. Not in the papers."""

    def __post_init__(self) -> None:
        for name in ("rest_steps", "arch_steps", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; choose 0 or more.")
        if self.steps < 1 or self.epoch_steps < 1:
            raise ValueError(
                f"A search and its epochs need at least 1 step, not {self.rest_steps} + {self.arch_steps} and "
                f"{self.epoch_steps}."
            )
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'cosine' or 'constant'.")
        for name in ("lr", "grad_clip", "arch_lr", "arch_grad_clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; choose a positive number.")
        if self.amp not in _AMP_DTYPES:
            raise ValueError(f"amp is {self.amp!r}; use one of {', '.join(_AMP_DTYPES)}.")
        if self.unrolled and self.amp != "off":
            raise ValueError(
                f"The unrolled step takes the difference of two nearly equal gradients, which {self.amp} cannot "
                "resolve; use amp 'off' or the first order."
            )

    @property
    def steps(self) -> int:
        """All steps of the search."""
        return self.rest_steps + self.arch_steps


class StepResult(NamedTuple):
    """One step's losses: detached 0-dimensional tensors on the model's device, so that no step waits for them."""

    train_loss: Tensor
    """Mean cross-entropy of the training batch before the weight step."""
    train_correct: Tensor
    """Number of correct predictions in it, int64, 0..N."""
    val_loss: Tensor | None
    """Mean cross-entropy of the validation batch before the architecture step (in the second order: at the
    weights one step ahead); None while alpha and beta rest."""


def scaled_lr(batch_size: int, lr: float = 0.1, full_batch: int = 256) -> float:
    """SGD's learning rate: `lr` for `full_batch` images and more, proportionally less for smaller batches.

    The paper fixes the batch at 256 (1024 on ImageNet); with the same rate at batch 96 searches collapsed to skip
    connections.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
    return lr * min(batch_size, full_batch) / full_batch


def learning_rate(config: BilevelConfig, step: int) -> float:
    """SGD's rate in `step` 0..config.steps - 1; it changes once an epoch.

    In epoch e of the warm-up it is lr * (e + 1) / warmup_epochs; the cosine then goes on where it would be.
    """
    epoch = step // config.epoch_steps
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1) / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    done = epoch * config.epoch_steps / config.steps
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * done)) / 2


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

    def __init__(self, model: nn.Module, config: BilevelConfig):
        self.model = model
        self.config = config
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
        grads = torch.autograd.grad(self.scaler.scale(train_loss), self.weights)
        self._update(self.weight_optimizer, self.weights, grads, self.config.grad_clip)
        return train_loss.detach(), (logits.argmax(1) == train_batch[1]).sum()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and logits."""
        images, labels = batch
        dtype = _AMP_DTYPES[self.config.amp]
        if dtype is None:
            logits = self.model(images)
        else:
            with torch.autocast(self.device.type, dtype):
                logits = self.model(images).float()
        return F.cross_entropy(logits, labels), logits

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        grads: Iterable[Tensor],
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

    def arch_gradient(self, val_batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Validation loss and its gradient with respect to alpha and beta at the present weights; nothing moves."""
        return self._first_order(val_batch)

    def _first_order(self, val_batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        with _without_gradients(self.weights):
            loss, _ = self._loss(val_batch)
        return loss.detach(), torch.autograd.grad(self.scaler.scale(loss), self.arch)

    def _second_order(self, train_batch: Batch, val_batch: Batch) -> tuple[Tensor, Iterable[Tensor]]:
        """The same, but through one SGD step on the training batch."""
        buffers = [self.weight_optimizer.state[weight].get("momentum_buffer") for weight in self.weights]
        return unrolled_gradient(
            lambda: self._loss(train_batch)[0],
            lambda: self._loss(val_batch)[0],
            self.weights,
            self.arch,
            list(self.model.buffers()),
            momentum_buffers=None if buffers[0] is None else buffers,  # there are none before the first weight step
            lr=self.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Mean cross-entropy and accuracy (0..1) over all images of `batches`, in eval mode."""
        was_training = self.model.training
        self.model.eval()
        loss_sum, correct, count = 0.0, 0.0, 0
        for batch in batches:
            loss, logits = self._loss(batch)
            loss_sum = loss_sum + loss.double() * len(batch[1])
            correct = correct + (logits.argmax(1) == batch[1]).sum()
            count += len(batch[1])
        self.model.train(was_training)
        if count == 0:
            raise ValueError("There are no images to evaluate; pass at least one batch.")
        return float(loss_sum) / count, float(correct) / count

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

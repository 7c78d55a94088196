"""The bilevel search: architecture parameters on one half of the data, weights on the other, step by step.

In:  a supernet with `arch_parameters()` and `weight_parameters()`; per step two batches on its device, each
     (images (N, 3, H, W) float, labels (N,) int64), one from the weight half and one from the architecture half.
Out: the trained supernet, whose `genotype()` is the search's result; losses as tensors that stay on the device.

A step first moves alpha and beta by Adam on the validation loss, then the weights by SGD on the training loss
(DARTS algorithm 1; PC-DARTS section 4.2). First order takes the weights as they are; `unrolled` takes them one
SGD step ahead (DARTS section 2.3). In the first epochs alpha and beta are frozen (PC-DARTS section 4.2).

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

    epochs: int = 50
    """Epochs of the search, which is also the length of the cosine schedule."""
    lr: float = 0.1
    """Initial learning rate of SGD for batch 256 (see `scaled_lr`). PC-DARTS 4.2; ImageNet (4.3) 0.5 at 1024."""
    lr_min: float = 0.0
    """The learning rate at which the cosine schedule ends. PC-DARTS 4.2."""
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
    """Clip the norm of the gradient of alpha and beta to this; None does not clip. Published ImageNet code: 5."""
    frozen_epochs: int | None = None
    """Epochs at the start in which alpha and beta are frozen. PC-DARTS 4.2: 15 of 50; ImageNet (4.3): 35 of 50.
    None means min(15, epochs // 2)."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up of SGD's learning rate. Published ImageNet code: 5."""
    unrolled: bool = False
    """Use the second-order architecture gradient. DARTS 2.3; PC-DARTS uses the first order."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast the forward passes; fp16 needs a GPU and scales the losses. Not in the papers."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"A search needs at least 1 epoch, not {self.epochs}.")
        for name in ("frozen_epochs", "warmup_epochs"):
            if not 0 <= (getattr(self, name) or 0) <= self.epochs:
                raise ValueError(f"{name} is {getattr(self, name)}; choose a value from 0 to {self.epochs} epochs.")
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
    def first_arch_epoch(self) -> int:
        """The first epoch (from 0) with architecture steps: the number of frozen epochs."""
        return min(15, self.epochs // 2) if self.frozen_epochs is None else self.frozen_epochs


class StepResult(NamedTuple):
    """One step's losses: detached 0-dimensional tensors on the model's device, so that no step waits for them."""

    train_loss: Tensor
    """Mean cross-entropy of the training batch before the weight step."""
    train_correct: Tensor
    """Number of correct predictions in it, int64, 0..N."""
    val_loss: Tensor | None
    """Mean cross-entropy of the validation batch before the architecture step (in the second order: at the
    weights one step ahead); None in frozen epochs."""


def scaled_lr(batch_size: int, lr: float = 0.1, full_batch: int = 256) -> float:
    """SGD's learning rate: `lr` for `full_batch` images and more, proportionally less for smaller batches.

    The paper fixes the batch at 256 (1024 on ImageNet); with the same rate at batch 96 searches collapsed to skip
    connections.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
    return lr * min(batch_size, full_batch) / full_batch


def cosine_lr(epoch: int, *, epochs: int = 50, lr: float = 0.1, lr_min: float = 0.0, warmup_epochs: int = 0) -> float:
    """SGD's learning rate in `epoch`, 0..epochs - 1: half a cosine from `lr` to `lr_min`, reached after the last epoch.

    During the `warmup_epochs` it is lr * (epoch + 1) / warmup_epochs; the cosine continues as if it had run meanwhile.
    """
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / warmup_epochs
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2


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
    """A supernet with its two optimisers. Call `start_epoch(epoch)` from 0, then `step` for each pair of batches.

    The model is trained in place, on the device where its parameters are. A step never waits for a GPU.
    """

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
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch (from 0): it sets SGD's learning rate and whether the architecture is frozen."""
        config = self.config
        self.epoch = epoch
        self.lr = cosine_lr(
            epoch, epochs=config.epochs, lr=config.lr, lr_min=config.lr_min, warmup_epochs=config.warmup_epochs
        )
        for group in self.weight_optimizer.param_groups:
            group["lr"] = self.lr

    @property
    def frozen(self) -> bool:
        """Whether alpha and beta are frozen in the current epoch."""
        return self.epoch < self.config.first_arch_epoch

    def step(self, train_batch: Batch, val_batch: Batch | None) -> StepResult:
        """One architecture step on `val_batch`, which frozen epochs skip and ignore, then one weight step."""
        val_loss = None
        if not self.frozen:
            if val_batch is None:
                raise ValueError(f"Epoch {self.epoch} moves the architecture and needs a validation batch.")
            val_loss = self.arch_step(train_batch, val_batch)
        train_loss, correct = self.weight_step(train_batch)
        self.scaler.update()
        return StepResult(train_loss, correct, val_loss)

    def arch_step(self, train_batch: Batch, val_batch: Batch) -> Tensor:
        """Update alpha and beta and return the validation loss before. The first order ignores the training batch."""
        self.model.train()
        gradient = self._second_order if self.config.unrolled else self._first_order
        val_loss, grads = gradient(train_batch, val_batch)
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
            parameter.grad = grad
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def _first_order(self, train_batch: Batch, val_batch: Batch) -> tuple[Tensor, Iterable[Tensor]]:
        """Validation loss and its gradient by alpha and beta at the current weights; the training batch is unused."""
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
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of the same model and config. Another model's raises a ValueError before anything changes."""
        keys = ("epoch", "model", "weight_optimizer", "arch_optimizer", "scaler")
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
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the search so far had no use for one
            self.scaler.load_state_dict(state["scaler"])
        self.start_epoch(state["epoch"])

"""The settings of the bilevel search, and what they make of SGD's learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AMPS = ("off", "bf16", "fp16")


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
        for name in ("lr_min", "weight_decay", "arch_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; choose 0 or more.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1.")
        if self.amp not in AMPS:
            raise ValueError(f"amp is {self.amp!r}; use one of {', '.join(AMPS)}.")
        if self.unrolled and self.amp != "off":
            raise ValueError(
                f"The unrolled step takes the difference of two nearly equal gradients, which {self.amp} cannot "
                "resolve; use amp 'off' or the first order."
            )

    @property
    def steps(self) -> int:
        """All steps of the search."""
        return self.rest_steps + self.arch_steps


def scaled_lr(batch_size: int, lr: float = 0.1, full_batch: int = 256) -> float:
    """SGD's learning rate: `lr` for `full_batch` images and more, proportionally less for smaller batches.

    The paper fixes the batch at 256 (1024 on ImageNet); with the same rate at batch 96 searches collapsed to skip
    connections.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
    return lr * min(batch_size, full_batch) / full_batch


def learning_rate(config: BilevelConfig, step: int) -> float:
    """SGD's learning rate in `step` 0..config.steps - 1; it changes once per epoch.

    In epoch e of the warm-up it is lr * (e + 1) / warmup_epochs; then the cosine continues as if without warm-up.
    """
    epoch = step // config.epoch_steps
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1) / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    done = epoch * config.epoch_steps / config.steps
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * done)) / 2

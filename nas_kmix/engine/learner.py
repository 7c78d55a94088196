"""One optimisation step and everything that it changes: weights, their average, optimiser, loss scale.

In:  images and soft labels of one batch.
Out: the mean loss and the number of hits; and, as plain content, what a checkpoint needs to take the next step as if
nothing had happened.

A network may return (logits, auxiliary logits) while it trains, and may offer `draw_drop_path(batch_size, probability,
generator=)`, whose result it takes as a second argument; nothing else is required.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nas_kmix.engine.compute import Compute
from nas_kmix.engine.distributed import World


@dataclass(frozen=True)
class OptimConfig:
    """SGD with Nesterov momentum. Defaults: the paper's PyramidNet-110 on CIFAR (Table 1, after CutMix)."""

    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.25
    """Initial learning rate."""
    schedule: Literal["step", "cosine", "linear"] = "step"
    """step: divided by ten at each of `milestones` | cosine: to zero over all epochs |
    linear: to zero, at a fifth of the slope in the last five epochs (PC-DARTS's on ImageNet)."""
    milestones: tuple[float, ...] = (0.75, 0.9)
    """Fractions of the epochs after which `step` divides the learning rate by ten (225 and 270 of 300)."""
    momentum: float = 0.9
    weight_decay: float = 4e-5

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or not 0.0 < self.lr < math.inf:
            raise ValueError(
                f"Training needs at least one epoch, a batch size of at least 1 and a positive learning rate, not "
                f"{self.epochs}, {self.batch_size} and {self.lr}."
            )
        if not (0.0 <= self.momentum < 1.0 and 0.0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"--momentum must lie in [0, 1) and --weight-decay be 0 or more, not {self.momentum} and "
                f"{self.weight_decay}."
            )
        if not all(0.0 < share <= 1.0 for share in self.milestones):
            raise ValueError(
                f"--milestones are fractions of the epochs, such as .5 .75, not {' '.join(map(str, self.milestones))}."
            )


@dataclass(frozen=True)
class Recipe:
    """What a training adds to plain SGD. The defaults add nothing."""

    nesterov: bool = True
    warmup_epochs: int = 0
    """Epochs of linear learning-rate warm-up."""
    grad_clip: float | None = None
    """Clip the norm of the gradient of all weights to this value."""
    loss: Literal["cross_entropy", "softmax_bce"] = "cross_entropy"
    """softmax_bce: binary cross-entropy of every class's softmax probability, as in Co-Mixup's published code."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss, if the network has one."""
    drop_path: float = 0.0
    """Drop-path probability per image and operation, rising linearly: p * epoch / epochs."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights; the average is then evaluated and saved."""
    accumulate: int = 1
    """Compute each batch in this many parts to save memory (gradient accumulation); BatchNorm sees each part alone."""
    limit_steps: int | None = None
    """Maximum number of steps per epoch."""

    def __post_init__(self):
        for name in ("label_smoothing", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"--{_flag(name)} must be at least 0 and below 1, not {getattr(self, name)}.")
        for name in ("warmup_epochs", "auxiliary_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{_flag(name)} must be 0 or more, not {getattr(self, name)}.")
        if self.grad_clip is not None and not self.grad_clip > 0.0:
            raise ValueError(f"--grad-clip must be above 0, not {self.grad_clip}; None does not clip.")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"--ema must lie strictly between 0 and 1, not {self.ema}; leave it out for no average.")
        if self.accumulate < 1 or (self.limit_steps is not None and self.limit_steps < 1):
            raise ValueError("--accumulate and --limit-steps must be at least 1.")


def _flag(name: str) -> str:
    return name.replace("_", "-")


class Learner:
    """Trains the caller's `model` in place with SGD."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        recipe: Recipe,
        compute: Compute | None = None,
        world: World | None = None,
        *,
        joint_norms: bool = False,
    ):
        """`joint_norms`: the network's BatchNorms take the parts of all processes of the world for a single batch."""
        self.model, self.recipe, self._compute = model, recipe, compute or Compute()
        self._world, self._joint_norms = world or World(), joint_norms
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=recipe.nesterov and config.momentum > 0.0,  # no effect without momentum, but torch refuses it
        )
        self._scaler = torch.amp.GradScaler(self._compute.device.type, enabled=self._compute.amp == "fp16")
        self._average: AveragedModel | None = None
        if recipe.ema is not None:
            # Buffers too: running statistics of the unaveraged weights would not fit the averaged ones.
            averaging = get_ema_multi_avg_fn(recipe.ema)
            self._average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
        self._forward = self._world.wrap(model, self._compute.device)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and keep: the average of the weights if there is one."""
        return self.model if self._average is None else self._average.module

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(
        self, images: Tensor, soft_labels: Tensor, drop_path: Tensor | None = None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """One step of SGD on images (N, 3, S, S) and soft labels (N, classes).

        Returns the mean loss and the number of hits, on the device. A hit is an image for which the network predicts
        the class with the largest share of the label.
        `drop_path` (layers, edges, N) is a draw of the network's own. `weight` is the weight of these images when the
        gradients of all processes are averaged: 1 if all have equally many. With joint norms, a process may have none.
        """
        total = images.new_zeros((), dtype=soft_labels.dtype)
        hits = torch.zeros((), dtype=torch.int64, device=images.device)
        self.optimizer.zero_grad(set_to_none=True)
        count = self._parts(len(images))
        masks = [None] * count if drop_path is None else drop_path.tensor_split(count, dim=2)
        parts = zip(images.tensor_split(count), soft_labels.tensor_split(count), masks, strict=True)
        for i, (part, labels, mask) in enumerate(parts, start=1):
            share = len(part) / max(1, len(images))
            waits = i < count and self._forward is not self.model  # sync gradients once, with the last part
            with self._forward.no_sync() if waits else nullcontext():
                loss, objective, correct = self._losses(part, labels, mask)
                self._scaler.scale(objective * (share * weight)).backward()
            total = total + loss.detach() * share
            hits = hits + correct
        if self.recipe.grad_clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return total, hits

    def _parts(self, images: int) -> int:
        """The number of parts in which to compute this many images; the same in all processes if norms are joint."""
        if self._joint_norms and self.recipe.accumulate > 1:
            images = int(self._world.highest(images)[0])
        return max(1, min(self.recipe.accumulate, images))

    def _losses(self, images: Tensor, soft_labels: Tensor, drop_path: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the logits, the objective (that loss plus the auxiliary head's, weighted), and the hits."""
        with self._compute.autocast():
            images = self._compute.layout(images)
            outputs = self._forward(images) if drop_path is None else self._forward(images, drop_path)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss_of(logits, soft_labels)
        objective = loss
        for extra in auxiliary:
            objective = objective + self.recipe.auxiliary_weight * self._loss_of(extra, soft_labels)
        return loss, objective, (logits.argmax(1) == soft_labels.argmax(1)).sum()

    def _loss_of(self, logits: Tensor, soft_labels: Tensor) -> Tensor:
        """In the labels' precision, whatever autocast chose for the logits; 0 of no images."""
        logits, smoothing = logits.to(soft_labels.dtype), self.recipe.label_smoothing
        if len(logits) == 0:
            return logits.sum()
        if self.recipe.loss == "cross_entropy":
            return F.cross_entropy(logits, soft_labels, label_smoothing=smoothing)
        smoothed = torch.lerp(soft_labels, torch.full_like(soft_labels, 1.0 / soft_labels.shape[1]), smoothing)
        return F.binary_cross_entropy(logits.softmax(dim=1), smoothed)

    def state_dict(self) -> dict[str, Any]:
        """Plain content; `model` is the state of `evaluated`."""
        state = {
            "model": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        if self._average is not None:
            state["unaveraged"] = self.model.state_dict()
            state["averaged_steps"] = int(self._average.n_averaged)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.evaluated.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run so far did not need one
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self.model.load_state_dict(state["unaveraged"])
            self._average.n_averaged.fill_(state["averaged_steps"])

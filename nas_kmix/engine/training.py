"""The one supervised training loop: a model and resident or streamed images in, a trained model out.

It knows no method: how a batch is mixed is a function handed to it, and what is saved at the end is the caller's.
Batch order and augmentation are functions of (seed, epoch, step), so resuming needs no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.engine.data import DataConfig, ImageData, augment_batch, epoch_batches
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run

# (images float (N, 3, S, S), labels int64 (N,), rng) to (images, soft labels float32 (N, classes))
Mix = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]
ORDER, AUGMENT = 1, 2  # random streams: a draw of one never shifts a draw of another


@dataclass(frozen=True)
class TrainConfig:
    """SGD with Nesterov momentum. The defaults are the paper's PyramidNet-110 on CIFAR (Table 1, after CutMix)."""

    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.25
    """Learning rate at the start."""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 after each of `milestones`; cosine: to zero over all epochs."""
    milestones: tuple[float, ...] = (0.75, 0.9)
    """Shares of the epochs after which `step` divides the rate by ten (225 and 270 of 300)."""
    momentum: float = 0.9
    weight_decay: float = 4e-5
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Of the initial weights, the order of the batches, the augmentation and the mixing."""

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0.0:
            raise ValueError(
                f"Training needs at least one epoch, a batch size of 1 and a positive learning rate, not "
                f"{self.epochs}, {self.batch_size} and {self.lr}."
            )


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The rate throughout `epoch`, counted from 0."""
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / config.epochs))
    return config.lr * 0.1 ** sum(epoch >= round(share * config.epochs) for share in config.milestones)


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    data_config: DataConfig,
    *,
    mix: Mix,
    run: Run,
    stage: str,
    key: Mapping[str, Any],
) -> None:
    """Train `model` in place on all good images of `data`, resuming from the checkpoint of `stage` if there is one.

    The loss is the cross-entropy against the soft labels of `mix`. Bills and logs to `run` under the name `stage`.
    Raises NonFiniteLossError, StoppedError (its state saved) and StageMismatchError.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    images = data.good()
    steps = math.ceil(len(images) / config.batch_size)
    meter = Meter(run.device)
    first_epoch = first_step = 0
    if (state := run.load_checkpoint(stage, key)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run so far had no use for one
            scaler.load_state_dict(state["scaler"])
        meter.load_state_dict(state["meter"])
        first_epoch, first_step = state["epoch"], state["step"]

    def save(epoch: int, step: int) -> None:
        meter.check(stage, epoch)
        training = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        run.save_checkpoint(stage, key, {**training, "meter": meter.state_dict(), "epoch": epoch, "step": step})

    progress = run.progress(stage, steps * config.epochs, done=first_epoch * steps + first_step)
    with run.stage(stage) as cost:
        model.train()
        for epoch in range(first_epoch, config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch)
            plan = epoch_batches(images, config.batch_size, steps, seed=(config.seed, ORDER, epoch))
            for step, batch in enumerate(data.batches(plan[first_step:]), start=first_step):
                if len(batch.indices) == 0:  # every file of it was bad
                    continue
                rng = np.random.default_rng([config.seed, AUGMENT, epoch, step])
                inputs = augment_batch(batch.images, data, data_config, rng=rng)
                loss = _step(model, optimizer, scaler, *mix(inputs, batch.labels, rng), run)
                meter.add(step, len(inputs), loss=loss * len(inputs))
                cost.images_forward += len(inputs)
                cost.images_backward += len(inputs)
                progress.update(note=f"epoch {epoch + 1}/{config.epochs}{meter.note(stage, epoch, step)}")
                if run.checkpoint_due() and step + 1 < steps:
                    save(epoch, step + 1)
                    run.raise_if_stopping()
            meter.check(stage, epoch)
            run.log(stage, epoch, lr=learning_rate(config, epoch), loss=meter.means()["loss"])
            meter, first_step = Meter(run.device), 0
            save(epoch + 1, 0)
            run.raise_if_stopping()
    progress.close()


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    soft_labels: Tensor,
    run: Run,
) -> Tensor:
    """One step of SGD; returns the mean loss, on the device."""
    with run.autocast():
        logits = model(run.layout(images))
    loss = F.cross_entropy(logits.float(), soft_labels)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss

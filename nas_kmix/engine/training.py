"""The one supervised training loop: a model and resident or streamed images in, a trained model out.

It knows no method: how a batch is mixed and how the model is evaluated are functions handed to it. Batch order,
augmentation, drop-path and layers that draw are functions of (seed, epoch, step), so resuming needs no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.data import DataConfig, ImageData
from nas_kmix.engine.feed import LAYERS, Feed, Mix
from nas_kmix.engine.learner import Learner, Recipe
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run

LINEAR_TAIL = 5  # last epochs of the linear schedule, at a fifth of its slope


@dataclass(frozen=True)
class TrainConfig:
    """SGD with Nesterov momentum. The defaults are the paper's PyramidNet-110 on CIFAR (Table 1, after CutMix)."""

    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.25
    """Learning rate at the start."""
    schedule: Literal["step", "cosine", "linear"] = "step"
    """step: x0.1 after each of `milestones`; cosine: to zero over all epochs; linear: likewise, its last five epochs
    share what is left of the slope (PC-DARTS's on ImageNet)."""
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


def learning_rate(config: TrainConfig, epoch: int, warmup_epochs: int = 0) -> float:
    """The rate throughout `epoch`, counted from 0. It rises to `config.lr` in the `warmup_epochs` first epochs."""
    if epoch < warmup_epochs:
        return config.lr * (epoch + 1) / warmup_epochs
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / config.epochs))
    if config.schedule == "linear":
        tail = min(LINEAR_TAIL, config.epochs // 2)
        steep = config.epochs - tail
        if epoch < steep:
            return config.lr * (steep - epoch) / steep
        return config.lr * (config.epochs - epoch) / (steep * tail)
    return config.lr * 0.1 ** sum(epoch >= round(share * config.epochs) for share in config.milestones)


@dataclass(frozen=True)
class Validation:
    """How a model is evaluated while it trains: `evaluate` turns it into metrics, e.g. val_accuracy and test_accuracy.

    `select` names the metric whose highest value chooses the epoch that best.pt keeps; None chooses no epoch.
    """

    evaluate: Callable[[nn.Module], dict[str, float]]
    select: str | None
    every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""


@dataclass(frozen=True)
class Trained:
    """`model` is the one to use, the averaged one where an average was kept.

    last and best: the metrics of the last epoch and of the chosen one, with its number, from 0, as `epoch`.
    """

    model: nn.Module
    last: dict[str, float] | None
    best: dict[str, float] | None


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
    recipe: Recipe | None = None,
    indices: np.ndarray | None = None,
    validation: Validation | None = None,
    checkpoint: str | None = None,
    content: Mapping[str, Any] | None = None,
    bad: BadFiles | None = None,
    photographs: bool = False,
) -> Trained:
    """Train `model` in place on `indices` of `data` (default: all good images), resuming from the run's checkpoint.

    The loss is the cross-entropy against the soft labels of `mix`. Bills and logs to `run` under the name `stage`, by
    which the checkpoint goes too unless `checkpoint` names it; `content` and the state of `bad` are stored in it
    besides. With a `validation` that selects, `best` is a checkpoint of the same kind. For `photographs` see `Feed`.
    Raises NonFiniteLossError, StoppedError (its state saved) and StageMismatchError.
    """
    recipe = recipe or Recipe()
    learner = Learner(model, config, recipe, run)
    feed = Feed(model, data, config, data_config, recipe, mix, run.world, photographs)
    indices = data.good() if indices is None else indices
    steps = math.ceil(len(indices) / config.batch_size)
    steps = min(steps, recipe.limit_steps or steps)
    meter = Meter(run.device)
    last = best = None
    first_epoch = first_step = 0
    with run.resumed(checkpoint or stage, key) as state:
        if state is not None:
            learner.load_state_dict(state)
            if run.world.main:  # whose checkpoint holds the sums of all
                meter.load_state_dict(state["meter"])
            first_epoch, first_step = int(state["epoch"]), int(state["step"])
            last, best = state.get("last"), state.get("best")
            if bad is not None:
                bad.load_state_dict(state)

    def save(name: str, epoch: int, step: int) -> None:
        meter.gather(run.world)
        meter.check(stage, epoch)
        results = {} if validation is None else {"last": last, "best": best}
        position = {"meter": meter.state_dict(), "epoch": epoch, "step": step}
        besides = {**(content or {}), **({} if bad is None else bad.state_dict())}
        run.save_checkpoint(name, key, {**besides, **learner.state_dict(), **results, **position})

    progress = run.progress(stage, steps * config.epochs, done=first_epoch * steps + first_step)
    if first_epoch == config.epochs:  # nothing is done, and nothing billed: a finished run tells the same again
        progress.close()
        return Trained(learner.evaluated, last, best)
    with run.stage(stage) as cost:
        model.train()
        for epoch in range(first_epoch, config.epochs):
            lr = learning_rate(config, epoch, recipe.warmup_epochs)
            learner.set_lr(lr)
            for step, share in feed.epoch(indices, steps, epoch, first_step):
                if share is None:
                    continue
                with _seeded(run.device, (config.seed, LAYERS, epoch, step)):
                    loss = learner.step(share.images, share.soft_labels, share.drop_path, share.weight)
                meter.add(step, share.n, loss=loss * share.n)
                cost.images_forward += share.total
                cost.images_backward += share.total
                progress.update(note=f"epoch {epoch + 1}/{config.epochs}{meter.note(stage, epoch, step)}")
                if run.checkpoint_due() and step + 1 < steps:
                    save(checkpoint or stage, epoch, step + 1)
                    run.raise_if_stopping()
            meter.gather(run.world)
            meter.check(stage, epoch)
            metrics, improved = {}, False
            if validation is not None and ((epoch + 1) % validation.every == 0 or epoch + 1 == config.epochs):
                run.world.align_buffers(learner.evaluated)
                metrics = validation.evaluate(learner.evaluated)
                last = {"epoch": epoch, **metrics}
                improved = validation.select is not None and (
                    best is None or metrics[validation.select] > best[validation.select]
                )
                best = last if improved else best
            run.log(stage, epoch, lr=lr, loss=meter.means()["loss"], **metrics)
            meter, first_step = Meter(run.device), 0
            for name in ("best",) * improved + (checkpoint or stage,):
                save(name, epoch + 1, 0)
            run.raise_if_stopping()
    progress.close()
    return Trained(learner.evaluated, last, best)


@contextmanager
def _seeded(device: torch.device, seed: tuple[int, ...]) -> Iterator[None]:
    """Let layers that draw from torch's global generators, such as stochastic depth, depend on `seed` alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng(list(seed)).integers(2**63)))
        yield

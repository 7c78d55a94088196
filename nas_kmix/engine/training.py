"""Supervised training: a model and resident or streamed images in, a trained model out.

It knows no method: it is handed the functions that mix a batch and evaluate the model. Batch order, augmentation,
drop-path and random layers are functions of (seed, epoch, step), so resuming needs no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.feed import LAYERS, Feed, Mix, Share
from nas_kmix.engine.learner import Learner, OptimConfig, Recipe
from nas_kmix.engine.loop import Ended, run_loop
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run

BEST = "best.pt"
LINEAR_TAIL = 5  # last epochs of the linear schedule, at a fifth of its slope


def learning_rate(config: OptimConfig, epoch: int, warmup_epochs: int = 0) -> float:
    """The learning rate of `epoch`, counted from 0.

    It rises to `config.lr` over the first `warmup_epochs` epochs, but at most half of all.
    """
    warmup_epochs = min(warmup_epochs, config.epochs // 2)
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
    return config.lr * 0.1 ** sum(epoch >= max(1, round(share * config.epochs)) for share in config.milestones)


@dataclass(frozen=True)
class Validation:
    """How a model is evaluated while it trains: `evaluate` returns metrics, e.g. val_accuracy and test_accuracy.

    `select` names the metric whose highest value selects the epoch in best.pt; None selects no epoch.
    """

    evaluate: Callable[[nn.Module], dict[str, float]]
    select: str | None
    every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """What `evaluate` remembers from one epoch to the next; the checkpoints hold it."""


@dataclass(frozen=True)
class Trained:
    """`model` is the network to use, the averaged one if an average was kept.

    last and best: the metrics of the last and of the selected epoch, with its number, from 0, as `epoch`.
    """

    model: nn.Module
    last: dict[str, float] | None
    best: dict[str, float] | None


def train(
    model: nn.Module,
    data: ImageData,
    config: OptimConfig,
    augmentation: Augmentation,
    *,
    mix: Mix,
    seed: int,
    run: Run,
    stage: str,
    key: Mapping[str, Any],
    recipe: Recipe | None = None,
    indices: np.ndarray | None = None,
    validation: Validation | None = None,
    checkpoint: str | None = None,
    content: Mapping[str, Any] | None = None,
    bad: BadFileList | None = None,
    photographs: bool = False,
    joint_norms: bool = False,
) -> Trained:
    """Train `model` in place on `indices` of `data` (default: all good images), resuming from the run's checkpoint.

    The loss is that of `recipe`, against the soft labels of `mix`. `seed` fixes the order of the batches, the
    augmentation and the mixing. Bills and logs to `run` under the name `stage`. Training resumes from the file
    `checkpoint` (default: the stage's own), which also holds `content` and the state of `bad`. If `validation` selects
    an epoch, best.pt is a checkpoint of the same kind. For `photographs` see `Feed`, for `joint_norms` see `Learner`.
    Raises NonFiniteLossError, StoppedError (its state saved) and StageMismatchError.
    """
    recipe = recipe or Recipe()
    indices = data.good() if indices is None else indices
    steps = math.ceil(len(indices) / config.batch_size)
    steps = min(steps, recipe.limit_steps or steps)
    task = _Training(
        config,
        Learner(model, config, recipe, run.compute, run.world, joint_norms=joint_norms),
        Feed(model, data, config, augmentation, recipe, mix, run.world, seed, photographs, joint_norms),
        indices,
        steps,
        stage,
        run,
        validation,
        content or {},
        bad,
    )
    run_loop(task, [steps] * config.epochs, name=stage, key=key, run=run, checkpoint=checkpoint)
    return Trained(task.learner.evaluated, task.last, task.best)


@dataclass
class _Training:
    """The task of a supervised training (see `engine.loop`); `last` and `best` are as in `Trained`."""

    config: OptimConfig
    learner: Learner
    feed: Feed
    indices: np.ndarray
    steps: int
    stage: str
    run: Run
    validation: Validation | None
    content: Mapping[str, Any]
    bad: BadFileList | None
    last: dict[str, float] | None = None
    best: dict[str, float] | None = None
    lr: float = 0.0

    def start(self, epoch: int) -> None:
        self.lr = learning_rate(self.config, epoch, self.learner.recipe.warmup_epochs)
        self.learner.set_lr(self.lr)
        self.learner.model.train()

    def batches(self, epoch: int, first_step: int) -> Iterator[Share | None]:
        return self.feed.epoch(self.indices, self.steps, epoch, first_step)

    def step(self, share: Share, epoch: int, step: int, meter: Meter) -> int:
        with _seeded(self.run.compute.device, (self.feed.seed, LAYERS, epoch, step)):
            loss, hits = self.learner.step(share.images, share.soft_labels, share.drop_path, share.weight)
        meter.add(step, share.n, loss=loss * share.n, accuracy=hits * min(share.n, 1))  # an empty part hits nothing
        return share.total

    def end(self, epoch: int, means: Mapping[str, float]) -> Ended:
        metrics, improved = {}, False
        validation = self.validation
        if validation is not None and ((epoch + 1) % validation.every == 0 or epoch + 1 == self.config.epochs):
            self.run.world.align_buffers(self.learner.evaluated)
            metrics = validation.evaluate(self.learner.evaluated)
            self.last = {"epoch": epoch, **metrics}
            improved = validation.select is not None and (
                self.best is None or metrics[validation.select] > self.best[validation.select]
            )
            self.best = self.last if improved else self.best
        return Ended({"lr": self.lr, **means, **metrics}, files=(BEST,) if improved else (), evaluated=bool(metrics))

    def state_dict(self) -> dict[str, Any]:
        bad = {} if self.bad is None else self.bad.state_dict()
        results = {} if self.validation is None else {"last": self.last, "best": self.best}
        if self.validation is not None and self.validation.memory:
            results["memory"] = dict(self.validation.memory)
        return {**self.content, **bad, **self.learner.state_dict(), **results}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.last, self.best = state.get("last"), state.get("best")
        if self.validation is not None:
            self.validation.memory.update(state.get("memory", {}))
        if self.bad is not None:
            self.bad.load_state_dict(state)


@contextmanager
def _seeded(device: torch.device, seed: tuple[int, ...]) -> Iterator[None]:
    """Let layers that draw from torch's global generators, such as stochastic depth, depend on `seed` alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng(list(seed)).integers(2**63)))
        yield

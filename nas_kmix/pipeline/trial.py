"""One candidate trained for one rung of the finals, as a network of its own, and judged.

In:  a genotype and its width, the weights after the rung before, images to train on and to be judged by.
Out: accuracies, losses, and the weights.

`train_rung` is the training; `Trainer` does one rung in a child process. A rung has twice the epochs of the one before
and starts with a warm restart: the rate goes down half a cosine from its first value to zero again (Loshchilov &
Hutter 2017, T_mult 2), and momentum starts from nothing. Batches and augmentation are the same for all candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F

from darts_space import Genotype
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.compute import Compute, DeviceConfig, pick_compute
from nas_kmix.engine.data import ImageData, prepared_for_evaluation
from nas_kmix.engine.decoding import decode_all
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.feed import step_batches
from nas_kmix.engine.keys import NOT_IN_KEY
from nas_kmix.engine.learner import Learner, OptimConfig, Recipe
from nas_kmix.pipeline.candidates import Shape
from nas_kmix.splits import Part

ORDER, AUGMENT = 42, 43  # random streams
STEPS_BETWEEN_CHECKS = 50  # reading a loss waits for the device

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class FinalsConfig:
    """How candidates are trained and compared after a search (see `pipeline.finals`)."""

    epochs: int = 2
    """Epochs of the first rung; every further rung has twice as many."""
    rungs: int = 3
    """Number of rungs. After each, the better half of the searched and given candidates goes on."""
    controls: int = 6
    """Number of random genotypes that are trained beside, of about as many multiply-adds; at least 2."""
    images: int | None = None
    """Train on this many images of the training split instead of the proxy's half for the weights."""
    channels: int = 8
    """Channels of the first cell's nodes. A candidate that costs over 25 % more or less than the median gets others."""
    layers: int = 8
    """Number of cells."""
    batch_size: int = 64
    lr: float = 0.1
    """SGD's learning rate at the start of each rung."""
    weight_decay: float = 3e-4
    augmentation: Annotated[Augmentation, tyro.conf.Suppress] = field(default_factory=Augmentation)
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the controls, the initial weights, the batches and the augmentation."""
    jobs: Annotated[int, tyro.conf.Suppress] = field(default=1, metadata=NOT_IN_KEY)
    """Child processes."""

    def __post_init__(self):
        for name, least in (("epochs", 1), ("rungs", 1), ("controls", 2), ("images", 1), ("layers", 3)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--finals.{name} must be at least {least}, not {value}.")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"--finals.channels must be even and at least 2, not {self.channels}.")
        if self.batch_size < 2 or not 0.0 < self.lr < math.inf:
            raise ValueError(
                f"The finals need a batch size of at least 2 and a positive learning rate, not {self.batch_size} and "
                f"{self.lr}."
            )
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"--finals.weight-decay must be 0 or more, not {self.weight_decay}.")

    def epochs_of(self, rung: int) -> int:
        return self.epochs * 2**rung

    def steps(self, images: int, rung: int) -> int:
        """Steps of a rung on so many images."""
        return self.epochs_of(rung) * math.ceil(images / self.batch_size)


def train_rung(
    network: nn.Module,
    data: ImageData,
    indices: np.ndarray,
    config: FinalsConfig,
    *,
    rung: int,
    compute: Compute | None = None,
) -> float:
    """Train `network` in place on `indices` of `data` for one rung; returns the mean training loss of its steps.

    Not a number if the training diverged; it then ended early. A function of its arguments and `config.seed`.
    """
    steps, seed = config.steps(len(indices), rung), config.seed
    optim = OptimConfig(1, config.batch_size, config.lr, weight_decay=config.weight_decay)
    learner = Learner(network.train(), optim, Recipe(grad_clip=5.0), compute)
    total, count = torch.zeros((), device=data.device), 0
    plan = step_batches(indices, config.batch_size, 0, steps, seed=(seed, ORDER, rung))
    for step, batch in enumerate(data.batches(plan)):
        if len(batch.indices) == 0:  # no file of it could be read
            continue
        learner.set_lr(config.lr * (1 + math.cos(math.pi * step / steps)) / 2)
        rng = np.random.default_rng([seed, AUGMENT, rung, step])
        images = augment_batch(batch.images, data, config.augmentation, rng=rng)
        total = total + learner.step(images, F.one_hot(batch.labels, data.num_classes).float())[0]
        count += 1
        if step % STEPS_BETWEEN_CHECKS == 0 and not total.isfinite():
            break
    return float(total) / max(1, count)


class Task(NamedTuple):
    """A rung of a candidate. `state` are the weights after the rung before; `last` asks for the verdict's accuracy."""

    genotype: Genotype
    channels: int
    rung: int
    state: State | None
    last: bool


class Outcome(NamedTuple):
    """What a rung gave. A candidate that diverged has an accuracy of 0, none on the verdict's images, and no state.

    accuracy, loss: of the images that judge; verdict_accuracy: of the images of the verdict, after the last rung alone.
    """

    accuracy: float
    loss: float
    verdict_accuracy: float | None
    state: State | None


DIVERGED = Outcome(0.0, math.inf, None, None)


@dataclass(frozen=True)
class Roles:
    """Which images train the candidates, judge them, and give the verdict: int64, sorted, disjoint."""

    train: np.ndarray
    judge: np.ndarray
    verdict: np.ndarray


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains and judges one rung, in whatever process it is called. Make it with `Trainer.of`."""

    data: ImageData
    """The images that are needed, without their pixels where these are cheaper read again than sent."""
    resident: bool
    roles: Roles
    shape: Shape
    config: FinalsConfig
    device: DeviceConfig

    @classmethod
    def of(cls, data: ImageData, roles: Roles, config: FinalsConfig, compute: Compute) -> Trainer:
        needed = np.unique(np.concatenate([roles.train, roles.judge, roles.verdict]))
        places = (np.searchsorted(needed, part) for part in (roles.train, roles.judge, roles.verdict))
        part = replace(data, source=data.source.part(needed), images=None, workers=0, bad=BadFiles())
        device = DeviceConfig(str(compute.device), threads=1, amp=compute.amp, channels_last=compute.channels_last)
        return cls(part, data.resident, Roles(*places), Shape.of(data, config.layers), config, device)

    @cached_property
    def _compute(self) -> Compute:
        return pick_compute(self.device)

    @cached_property
    def _parts(self) -> tuple[ImageData, Part, Part]:
        """The training images, those that judge, and those of the verdict."""
        data = self.data
        if self.resident:
            images = decode_all(data.source, data.image_size, data.resize, threads=1, bad=data.bad)
            data = replace(data, images=images.to(data.device))
        judges = []
        for indices in (self.roles.judge, self.roles.verdict):
            own = prepared_for_evaluation(data, indices)
            judges.append(Part(data, indices) if own is data else Part(own, own.good()))
        return data, *judges

    def __call__(self, task: Task) -> Outcome:
        compute = self._compute  # first, since it tells what is wrong with a device
        data, judge, verdict = self._parts
        generator = torch.Generator().manual_seed(self.config.seed)
        network = self.shape.network(task.genotype, task.channels, generator)
        if task.state is not None:
            network.load_state_dict({name: torch.from_numpy(array) for name, array in task.state.items()})
        network = compute.layout(network.to(compute.device))
        train_loss = train_rung(network, data, self.roles.train, self.config, rung=task.rung, compute=compute)
        found = self._judged(network, judge)
        if not (math.isfinite(train_loss) and math.isfinite(found["loss"])):
            return DIVERGED
        accuracy = self._judged(network, verdict)["accuracy"] if task.last else None
        state = None if task.last else {n: t.cpu().numpy() for n, t in network.state_dict().items()}
        return Outcome(found["accuracy"], found["loss"], accuracy, state)

    def _judged(self, network: nn.Module, part: Part) -> dict[str, float]:
        return evaluate(network, part.data, compute=self._compute, indices=part.indices)

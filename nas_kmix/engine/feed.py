"""Training batches: read in random order, augmented, mixed, and divided among the processes of a world.

Every draw is a function of (seed, epoch, step). With a resident set every process prepares the whole batch and takes
its own rows, so that several processes train on exactly the batches of a single one. A streamed set is divided before
it is read: the images are the same, but every process draws its own crops and mixing partners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.distributed import World
from nas_kmix.engine.learner import OptimConfig, Recipe
from nas_kmix.engine.photographs import PhotoCrops

# (images float (N, 3, S, S), labels int64 (N,), rng) to (images, soft labels float32 (N, classes))
Mix = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]
ORDER, AUGMENT, DROP_PATH, LAYERS = 1, 2, 3, 4  # random streams: a draw of one never shifts a draw of another


@dataclass(frozen=True)
class Division:
    """How the processes of a world divide the batches of a set among themselves.

    A resident set is divided after its batches have been augmented, so that the parts are those of a single process's
    batch; a streamed one before it is read.
    """

    data: ImageData
    world: World

    @property
    def before_reading(self) -> bool:
        return not self.data.resident and self.world.size > 1

    def plan(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """What this process has to read."""
        return [batch[self.world.share(len(batch))] for batch in batches] if self.before_reading else batches

    def moment(self, *moment: int) -> tuple[int, ...]:
        """What seeds the draws of a batch: where each process draws its own, with its rank."""
        return (*moment, self.world.rank) if self.before_reading else moment

    def rows(self, batch: Batch) -> tuple[slice, int]:
        """This process's rows of what it has read, and the number of images in all parts of the batch."""
        n = len(batch.indices)
        if self.before_reading:
            return slice(0, n), int(self.world.total(n)[0])
        return self.world.share(n), n


@dataclass(frozen=True)
class Share:
    """One process's part of a batch, with its drop-path mask (layers, edges, N) or None.

    n: images of the part; total: images of all parts. Every process must take part: an empty part holds one image of
    weight 0, unless joint norms can do without.
    """

    images: Tensor
    soft_labels: Tensor
    drop_path: Tensor | None
    n: int
    total: int
    weight: float


@dataclass(frozen=True)
class Feed:
    """Hands out the shares of an epoch."""

    model: nn.Module
    data: ImageData
    config: OptimConfig
    augmentation: Augmentation
    recipe: Recipe
    mix: Mix
    world: World
    seed: int
    photographs: bool = False
    """In a streamed set above 64 px, crop whole photographs instead of their centre squares."""
    joint_norms: bool = False
    """Whether the network's BatchNorms take the parts of a batch for a single one."""

    def epoch(self, indices: np.ndarray, steps: int, epoch: int, first_step: int) -> Iterator[Share | None]:
        """The shares from `first_step` on; None for a batch without a readable file."""
        plan = epoch_batches(indices, self.config.batch_size, steps, seed=(self.seed, ORDER, epoch))[first_step:]
        plan = Division(self.data, self.world).plan(plan)
        crops = PhotoCrops(self.data.image_size, self.seed) if self.photographs else None
        batches = self.data.batches(plan, crops=crops, epoch=epoch, persistent=True)
        for step, batch in enumerate(batches, start=first_step):
            yield self._share(batch, epoch, step)

    def _share(self, batch: Batch, epoch: int, step: int) -> Share | None:
        division = Division(self.data, self.world)
        rows, total = division.rows(batch)
        if total == 0:
            return None
        moment = division.moment(epoch, step)
        n = rows.stop - rows.start
        if n == 0 and not self.joint_norms:
            rows = slice(0, 1)
        if len(batch.indices) == 0:
            side = self.data.image_size
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.data.device)
            batch = Batch(blank, torch.zeros(1, dtype=torch.int64, device=self.data.device), batch.indices)
        rng = np.random.default_rng([self.seed, AUGMENT, *moment])
        images = augment_batch(batch.images, self.data, self.augmentation, rng=rng, cropped=self.photographs)
        images, soft_labels = self.mix(images, batch.labels, rng)
        mask = self._drop_path(len(images), epoch, moment)
        mask = mask if mask is None else mask[:, :, rows]
        return Share(images[rows], soft_labels[rows], mask, n, total, n * self.world.size / total)

    def _drop_path(self, n: int, epoch: int, moment: tuple[int, ...]) -> Tensor | None:
        probability = self.recipe.drop_path * epoch / self.config.epochs
        if probability == 0.0:
            return None
        seed = np.random.default_rng([self.seed, DROP_PATH, *moment]).integers(2**63)
        return self.model.draw_drop_path(n, probability, generator=torch.Generator().manual_seed(int(seed)))


def step_batches(
    indices: np.ndarray, batch_size: int, first: int, steps: int, *, seed: tuple[int, ...]
) -> list[np.ndarray]:
    """Batches `first` to `first + steps - 1` of an endless sequence of shuffled passes over `indices`.

    They depend only on `seed` and on their numbers. All have `batch_size` images, or all of `indices` if those are
    fewer.
    """
    n = len(indices)
    size = min(batch_size, n)
    start, stop = first * size, (first + steps) * size
    passes = range(start // n, math.ceil(stop / n))
    order = np.concatenate(
        [indices[:0], *(np.random.default_rng([*seed, number]).permutation(indices) for number in passes)]
    )
    return np.split(order[start - passes.start * n :][: stop - start], steps) if steps else []


def epoch_batches(indices: np.ndarray, batch_size: int, steps: int, *, seed: tuple[int, ...]) -> list[np.ndarray]:
    """`steps` batches of a shuffled pass over `indices`, followed by further passes if one is too short.

    A function of `seed` alone, e.g. (seed, stream, epoch). The last batch of a single pass may be smaller.
    """
    passes = math.ceil(((steps - 1) * batch_size + 1) / len(indices))
    rng = np.random.default_rng(list(seed))
    order = np.concatenate([rng.permutation(indices) for _ in range(passes)])
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]

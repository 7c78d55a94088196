"""Run a cell: train a supernet and read its architecture's gradient, or its architecture, along the way.

A cell is a generator that yields after every step, so that several can share a GPU, each in a stream of its own; on a
CPU one process runs one of them. Steps, supernet and augmentation are the product's.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from darts_space import BilevelConfig, Search, SuperNet
from darts_space.bilevel import Batch
from darts_space.fast.graphs import GraphedSearch
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import ImageData
from studies.search_quality.arms import Cell, Setting

WEIGHT_ORDER, ARCH_ORDER, AUGMENT, IMAGES = 21, 22, 23, 31  # random streams
ARCH_IMAGES, FIRST = 2500, 150
READING_BATCHES, READING_BATCH, REMOVAL_BATCHES = 16, 64, 4
BLOCK = 100  # steps whose batches are prepared together

Halves = tuple[np.ndarray, np.ndarray]


def random_halves(data: ImageData, weight_images: int, seed: int) -> Halves:
    """Class-balanced random images for the weights, and others for the architecture; sorted.

    They come from the first 150 of each class, so that a machine needs no more than those.
    """
    rng = np.random.default_rng([seed, IMAGES])
    classes = data.num_classes
    weights, arch = [], []
    for label in range(classes):
        own = rng.permutation(np.flatnonzero(data.labels == label)[:FIRST])
        arch.append(own[: ARCH_IMAGES // classes])
        weights.append(own[ARCH_IMAGES // classes :][: weight_images // classes])
    return np.sort(np.concatenate(weights)), np.sort(np.concatenate(arch))


def batches(data: ImageData, indices: np.ndarray, batch: int, size: int, seed: tuple[int, ...]) -> Iterator[Batch]:
    """Augmented batches of one half, in order, averaged to `size` pixels, without end."""
    rng = np.random.default_rng([*seed, AUGMENT])
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch * BLOCK:  # one shuffled pass after the other
            order = np.concatenate([order, rng.permutation(indices)])
        block, order = order[: batch * BLOCK], order[batch * BLOCK :]
        found = data.fetch(block)
        images = augment_batch(found.images, data, Augmentation(), rng=rng)
        images = F.avg_pool2d(images, images.shape[2] // size)
        images = images.contiguous(memory_format=torch.channels_last)
        yield from zip(images.split(batch), found.labels.split(batch), strict=True)


def learning_rate(setting: Setting, step: int) -> float:
    """SGD's rate in `step`, counted from 0."""
    if setting.schedule == "constant":
        return setting.lr
    length = setting.rest_steps + (setting.arch_steps if setting.forks else 0)
    return setting.lr * (1 + math.cos(math.pi * min(step, length) / length)) / 2


def search_for(setting: Setting, classes: int, seed: int, device: torch.device) -> Search:
    """A fresh supernet with its optimisers."""
    generator = torch.Generator().manual_seed(seed)
    net = SuperNet(setting.channels, classes, setting.layers, setting.partial, generator=generator)
    net = net.to(device, memory_format=torch.channels_last)
    kind = GraphedSearch if device.type == "cuda" else Search
    return kind(net, BilevelConfig(lr=setting.lr))


class Training:
    """The supernet of one cell, its batches, and what has been read so far."""

    def __init__(self, cell: Cell, data: ImageData, halves: Halves):
        self.setting = setting = cell.setting
        self.search = search_for(setting, data.num_classes, cell.seed, data.device)
        stream = partial(batches, data, size=setting.size)
        self.train = stream(halves[0], setting.batch, seed=(cell.seed, WEIGHT_ORDER))
        self.val = stream(halves[1], setting.batch, seed=(cell.seed, ARCH_ORDER))
        self.probe = stream(halves[1], READING_BATCH, seed=(cell.seed, ARCH_ORDER, 1))
        self.removal_batches = list(islice(self.probe, REMOVAL_BATCHES))
        self.readings: list[dict[str, Any]] = []
        self._results: list[tuple[Tensor, Tensor]] = []

    def weight_step(self, step: int) -> None:
        self.search.set_lr(learning_rate(self.setting, step))
        self._results.append(self.search.weight_step(next(self.train)))

    def progress(self) -> dict[str, float]:
        """Training loss and accuracy since the last call."""
        if not self._results:
            return {}
        losses, correct = (torch.stack(values).float().mean() for values in zip(*self._results, strict=True))
        self._results.clear()
        return {"loss": round(float(losses), 4), "accuracy": round(float(correct) / self.setting.batch, 4)}

    def read_gradient(self, step: int) -> Generator[None, None, None]:
        """The mean gradient over sixteen batches and its t statistic, negated: where alpha and beta would go."""
        losses, grads = [], []
        for _ in range(READING_BATCHES):
            loss, grad = self.search.arch_gradient(next(self.probe))
            losses.append(loss)
            grads.append(grad)
            yield
        reading = {"step": step, **self.progress(), "val_loss": round(float(torch.stack(losses).mean()), 4)}
        self.readings.append({**reading, **gradient_reading(grads)})

    def fork(self, step: int) -> Generator[None, None, None]:
        """A bilevel search from here. Afterwards weights, alpha and optimisers are as before; the batches move on."""
        self.progress()
        live = [*self.search.model.parameters(), *self.search.model.buffers()]
        live += _moments(self.search.weight_optimizer)
        before = [tensor.detach().clone() for tensor in live]
        for tensor in _moments(self.search.arch_optimizer):
            tensor.zero_()
        self.search.set_arch_lr(self.setting.arch_lr)
        for arch_step in range(1, self.setting.arch_steps + 1):
            self.search.arch_step((), next(self.val))
            self.weight_step(step + arch_step - 1)
            if arch_step % self.setting.read_arch_every == 0:
                tables = packed(list(self.search.arch))
                removal = packed(list(self.search.removal_losses(self.removal_batches)))
                place = {"step": step, "arch_lr": self.setting.arch_lr, "arch_step": arch_step}
                self.readings.append({**place, **self.progress(), "alpha": tables, "removal": removal})
            yield
        with torch.no_grad():
            for tensor, value in zip(live, before, strict=True):
                tensor.copy_(value)


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def gradient_reading(grads: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    """From the gradients by alpha and beta of several batches, in the order of ARCHITECTURE_NAMES."""
    stacked = [torch.stack(parts) for parts in zip(*grads, strict=True)]
    means = [-part.mean(0) for part in stacked]
    errors = [part.std(0) / math.sqrt(len(part)) for part in stacked]
    t = [mean / error.clamp_min(1e-12) for mean, error in zip(means, errors, strict=True)]
    return {"mean": packed(means), "t": packed(t)}


def packed(tables: list[Tensor]) -> str:
    """Tables as base64 of half-precision numbers, scaled to a largest magnitude of 1."""
    flat = torch.cat([table.detach().flatten() for table in tables]).float().cpu().numpy()
    return base64.b64encode((flat / np.abs(flat).max()).astype("<f2").tobytes()).decode()


def run_cell(cell: Cell, data: ImageData, halves: Halves) -> Generator[None, None, dict[str, Any]]:
    """Train and read; returns the fields of the cell's line."""
    setting = cell.setting
    if setting.initialisations:
        readings = [(yield from _untrained(cell, data, halves))]
    else:
        training = Training(cell, data, halves)
        readings = training.readings
        for step in range(setting.rest_steps + 1):
            if step % setting.read_every == 0:
                yield from training.read_gradient(step)
            if step in setting.forks:
                yield from training.fork(step)
                # What there is so far, for whoever has to end a long cell.
                print(f"{cell.name}: {json.dumps(readings)}", file=sys.stderr, flush=True)
            if step < setting.rest_steps:
                training.weight_step(step)
                yield
    return {"setting": asdict(setting), "readings": readings}


def _untrained(cell: Cell, data: ImageData, halves: Halves) -> Generator[None, None, dict[str, Any]]:
    grads = []
    probe = batches(data, halves[1], READING_BATCH, cell.setting.size, (cell.seed, ARCH_ORDER, 1))
    for i in range(cell.setting.initialisations):
        search = search_for(cell.setting, data.num_classes, 1000 * (cell.seed + 1) + i, data.device)
        grads.append(search.arch_gradient(next(probe))[1])
        yield
    return {"step": 0, **gradient_reading(grads)}


def side_by_side(
    todo: list[Cell], data: ImageData, halves_of: Callable[[Cell], Halves], together: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Finished cells as they come, `together` at a time, each in a CUDA stream of its own."""
    waiting, running = list(reversed(todo)), []
    while waiting or running:
        while waiting and len(running) < together:
            cell = waiting.pop()
            stream = torch.cuda.Stream(data.device) if data.device.type == "cuda" else None
            running.append((cell, run_cell(cell, data, halves_of(cell)), stream))
        for item in list(running):
            cell, generator, stream = item
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                try:
                    for _ in range(4):
                        next(generator)
                except StopIteration as end:
                    running.remove(item)
                    yield cell, end.value

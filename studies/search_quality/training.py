"""Run a cell: train a supernet and read its architecture's gradient, or its architecture, along the way.

A cell is a generator that yields after every step, so that several can share a GPU, each in a stream of its own; on a
CPU one process runs one of them. Steps, supernet and augmentation are the product's.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from darts_space import ARCHITECTURE_NAMES, BilevelConfig, Search, SuperNet
from darts_space.bilevel import Batch
from darts_space.graphs import GraphedSearch
from nas_kmix.engine.data import DataConfig, ImageData, augment_batch
from studies.search_quality.arms import Cell, Setting

WEIGHT_ORDER, ARCH_ORDER, AUGMENT, IMAGES = 21, 22, 23, 31  # random streams
ARCH_IMAGES, FIRST = 2500, 150
READING_BATCHES, READING_BATCH = 16, 64
BLOCK = 100  # steps whose batches are prepared together
FLOOR = 0.1

Halves = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Reading:
    """Two sets of tables: the mean gradient and its t statistic, both negated, or alpha and beta twice."""

    step: int
    arch_step: int
    tables: list[Tensor]
    second: list[Tensor] | None


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


class Batches:
    """Augmented batches of one half, in order, averaged to `size` pixels."""

    def __init__(self, data: ImageData, indices: np.ndarray, batch: int, size: int, seed: tuple[int, ...]):
        self.data, self.indices, self.batch, self.size, self.seed = data, indices, batch, size, seed

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([*self.seed, AUGMENT])
        order = np.empty(0, dtype=np.int64)
        while True:
            while len(order) < self.batch * BLOCK:  # one shuffled pass after the other
                order = np.concatenate([order, rng.permutation(self.indices)])
            block, order = order[: self.batch * BLOCK], order[self.batch * BLOCK :]
            found = self.data.fetch(block)
            images = augment_batch(found.images, self.data, DataConfig(data="cifar100"), rng=rng)
            images = F.avg_pool2d(images, images.shape[2] // self.size)
            images = images.contiguous(memory_format=torch.channels_last)
            yield from zip(images.split(self.batch), found.labels.split(self.batch), strict=True)


def learning_rate(setting: Setting, step: int) -> float:
    """SGD's rate in `step`, counted from 0."""
    if setting.schedule == "constant":
        return setting.lr
    cosine = setting.rest_steps + (setting.arch_steps if setting.schedule == "cosine" else 0)
    low = 0.0 if setting.schedule == "cosine" else FLOOR * setting.lr
    return low + (setting.lr - low) * (1 + math.cos(math.pi * min(step, cosine) / cosine)) / 2


def search_for(setting: Setting, classes: int, seed: int, device: torch.device) -> Search:
    """A fresh supernet with its optimisers."""
    generator = torch.Generator().manual_seed(seed)
    net = SuperNet(setting.channels, classes, setting.layers, setting.partial, generator=generator)
    net = net.to(device, memory_format=torch.channels_last)
    kind = GraphedSearch if device.type == "cuda" else Search
    return kind(net, BilevelConfig(lr=setting.lr, arch_lr=setting.arch_lr))


def run_cell(cell: Cell, data: ImageData, halves: Halves) -> Generator[None, None, dict[str, Any]]:
    """Train and read; returns the fields of the cell's line."""
    setting, seed = cell.setting, cell.seed
    readings: list[Reading] = []
    curve: list[dict[str, float]] = []
    if setting.initialisations:
        readings.append((yield from _untrained(setting, seed, data, halves)))
    else:
        search = search_for(setting, data.num_classes, seed, data.device)
        train = iter(Batches(data, halves[0], setting.batch, setting.size, (seed, WEIGHT_ORDER)))
        val = iter(Batches(data, halves[1], setting.batch, setting.size, (seed, ARCH_ORDER)))
        probe = iter(Batches(data, halves[1], READING_BATCH, setting.size, (seed, ARCH_ORDER, 1)))
        losses, correct, seen = [], [], 0
        for step in range(setting.rest_steps + setting.arch_steps + 1):
            resting = step <= setting.rest_steps
            if resting and step >= setting.read_from and (step - setting.read_from) % setting.read_every == 0:
                reading, loss = yield from _read_gradient(search, probe, step)
                readings.append(reading)
                if seen:
                    accuracy = float(torch.stack(correct).sum()) / seen
                    curve.append({"step": step, "loss": float(torch.stack(losses).mean()), "accuracy": accuracy})
                    curve[-1]["val_loss"] = loss
                losses, correct, seen = [], [], 0
            arch_step = step - setting.rest_steps
            if arch_step > 0 and arch_step % setting.read_every == 0:
                readings.append(Reading(step, arch_step, _architecture(search), None))
            if step == setting.rest_steps + setting.arch_steps:
                break
            search.set_lr(learning_rate(setting, step))
            batch = next(train)
            if step >= setting.rest_steps:
                search.arch_step(batch, next(val))
            loss, right = search.weight_step(batch)
            losses.append(loss)
            correct.append(right)
            seen += len(batch[1])
            yield
    return {"setting": asdict(setting), "curve": curve, "readings": [_packed(reading) for reading in readings]}


def _architecture(search: Search) -> list[Tensor]:
    return [getattr(search.model, name).detach().float().cpu().clone() for name in ARCHITECTURE_NAMES]


def _read_gradient(search: Search, probe: Iterator[Batch], step: int) -> Generator[None, None, tuple[Reading, float]]:
    grads, losses = [], []
    for _ in range(READING_BATCHES):
        loss, grad = search.arch_gradient(next(probe))
        grads.append([part.float() for part in grad])
        losses.append(loss)
        yield
    # alphas_normal, alphas_reduce, betas_normal, betas_reduce: the order of ARCHITECTURE_NAMES
    stacked = [torch.stack(parts) for parts in zip(*grads, strict=True)]
    return _gradient_reading(stacked, step), float(torch.stack(losses).mean())


def _gradient_reading(stacked: list[Tensor], step: int) -> Reading:
    means = [-part.mean(0).cpu() for part in stacked]
    errors = [(part.std(0) / math.sqrt(len(part))).cpu() for part in stacked]
    return Reading(step, 0, means, [m / e.clamp_min(1e-12) for m, e in zip(means, errors, strict=True)])


def _untrained(setting: Setting, seed: int, data: ImageData, halves: Halves) -> Generator[None, None, Reading]:
    grads = []
    probe = iter(Batches(data, halves[1], READING_BATCH, setting.size, (seed, ARCH_ORDER, 1)))
    for i in range(setting.initialisations):
        search = search_for(setting, data.num_classes, 1000 * (seed + 1) + i, data.device)
        grads.append(search.arch_gradient(next(probe))[1])
        yield
    return _gradient_reading([torch.stack(parts) for parts in zip(*grads, strict=True)], 0)


def _packed(reading: Reading) -> dict[str, Any]:
    """Tables as base64 of 252 half-precision numbers, each set scaled to a largest magnitude of 1."""
    fields: dict[str, Any] = {"step": reading.step, "arch_step": reading.arch_step}
    for name, tables in (("tables", reading.tables), ("t", reading.second)):
        if tables is not None:
            flat = torch.cat([table.flatten() for table in tables]).numpy().astype(np.float32)
            scale = float(np.abs(flat).max())
            fields[name] = base64.b64encode((flat / scale).astype("<f2").tobytes()).decode()
            fields[f"{name}_scale"] = float(f"{scale:.6g}")
    return fields


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

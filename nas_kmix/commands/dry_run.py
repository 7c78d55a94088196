"""What a command would do, how long it would take and how much memory, from a few steps; nothing is written.

In:  a config. Out: lines of text, one per stage. What the command refuses is refused here, too, with its sentence.

Of every network that would be trained, two small batches of random images are timed and the tensors counted that they
keep for the backward pass; time and memory of a whole batch follow on a straight line through the two. Reading and
augmenting images is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from darts_space import GENOTYPES, Search, build_network, read_genotype
from nas_kmix.commands.summary import of_images
from nas_kmix.engine.compute import Compute, pick_compute
from nas_kmix.engine.data import ImageData, load_data
from nas_kmix.engine.datasets import check_run_folder
from nas_kmix.engine.distributed import World, joined
from nas_kmix.engine.forecast import Cost, at, gigabytes, measured
from nas_kmix.engine.learner import Learner, OptimConfig, Recipe
from nas_kmix.engine.memory import free_bytes
from nas_kmix.engine.progress import duration
from nas_kmix.engine.run import Run
from nas_kmix.pipeline import finals, network, proxy, scorer, scores, search
from nas_kmix.pipeline.candidates import CHECKPOINTS
from nas_kmix.pipeline.checks import check_flags, check_forgetting, check_later_stages, check_memory, without_effect
from nas_kmix.pipeline.config import ALL_IMAGES, Config
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.network import NetworkTraining
from nas_kmix.pipeline.stage import Stage
from nas_kmix.sampling import select, split_by_class
from nas_kmix.scoring import score_dataset


@dataclass
class Chain:
    """The stages of a command: their costs so far, and where the command would find its results."""

    data: ImageData
    compute: Compute
    folder: Path
    fresh: bool = False
    world: World = field(default_factory=World)
    seconds: float = 0.0
    bytes: float = 0.0

    def find(self, stage: Stage[Any], config: Any, *inputs: Any, given: Path | None = None) -> Any:
        """The result of a stage if it is given, or there. Raises StageMismatchError where the command would."""
        if given is not None:
            return stage.load(given, config, *inputs, run=self.run, key=None)
        path = self.run.path(stage.FILE)
        if self.fresh or not path.exists():
            return None
        return stage.load(path, config, *inputs, run=self.run, key=stage.key(config, *inputs))

    @property
    def run(self) -> Run:
        """To read what is there; it is not opened."""
        return Run(self.folder, stages=(), compute=self.compute, world=self.world)

    def line(self, name: str, what: str, cost: Cost | None = None) -> str:
        """One stage, which frees its memory before the next."""
        if cost is None:
            return f"{name:9} {what}"
        self.seconds, self.bytes = self.seconds + cost.seconds, max(self.bytes, cost.bytes)
        return f"{name:9} {what}: about {duration(cost.seconds)}, {gigabytes(cost.bytes)}"

    def end(self) -> Iterator[str]:
        resident = 0 if self.data.images is None else self.data.images.numel()
        needed, free = resident + self.bytes, free_bytes(self.data.device)
        yield f"{'total':9} about {duration(self.seconds)} and {gigabytes(needed)}, besides PyTorch and the reading"
        if needed > free:
            yield f"warning: only {gigabytes(free)} are free; lower the batch size of the largest stage"


# -- search.py ---------------------------------------------------------------------------------------------------------


def of_search(config: Config) -> Iterator[str]:
    """What search.py would do."""
    check_flags(config)
    unused = list(without_effect(config))
    config = config.spread().located()
    check_run_folder(config.out, config.input.data)
    compute, given, until = pick_compute(config.device), config.given, config.stop_after
    data = load_data(config.input, device=compute.device, workers=config.device.workers)
    check_later_stages(config, data)
    with joined(compute.device) as world:
        config.scorer.mix.check_processes(world.size)
        chain = Chain(data, compute, config.out, config.fresh, world)
        check_memory(config, data, chain.run)
    yield of_images(data, len(data), config.augmentation)
    yield from unused
    table = None
    if config.uses_scores:
        trained = None
        if given.scores is None:
            trained = scorer.from_elsewhere(given.scorer, config.scorer, data, run=chain.run)
            trained = trained or chain.find(scorer, config.scorer, data, given=given.scorer)
            if trained is not None:
                check_forgetting(config, trained)
            yield _scorer(config, chain, trained)
        if until != "scorer":
            if trained is not None or given.scores is not None:
                table = chain.find(scores, config.scoring, trained, data, given=given.scores)
            yield _scoring(config, chain, trained, table)
    if until not in ("scorer", "scores"):
        if table is not None and config.selection.method != "random":
            table.measure(config.selection.measure)  # refuses scores that lack it
        known = table is not None or given.proxy is not None or not config.uses_scores
        selected = _selected(config, chain, table, known)
        yield selected.line
        if until != "proxy":
            yield from _search_and_finals(config, chain, selected)
    yield from chain.end()


def _scorer(config: Config, chain: Chain, found: scorer.Scorer | None) -> str:
    if found is not None:
        return chain.line(scorer.NAME, "found")
    settings, data = config.scorer, chain.data
    model, recipe = scorer.build(settings, data, chain.compute), Recipe()
    step = _training_step(model, settings.optim, recipe, chain)
    images = len(scorer.divided(settings, data)[0].indices)
    return chain.line(scorer.NAME, *_epochs(settings.backbone, settings.optim, recipe, images, step))


def _scoring(config: Config, chain: Chain, trained: scorer.Scorer | None, found: Any) -> str:
    if found is not None:
        return chain.line(scores.NAME, "found")
    data, settings = chain.data, config.scoring
    if trained is None:
        trained = scorer.Scorer(scorer.build(config.scorer, data, chain.compute), data, None)
    model, good = trained.model, data.good()

    def score(n: int) -> None:
        score_dataset(model, trained.data, settings, indices=good[:n], compute=chain.compute)

    cost = at(len(good), *measured(score, model))
    kept = Cost(cost.seconds, 0.0)  # nothing is kept for a backward pass
    return chain.line(scores.NAME, f"{settings.draws} losses and the EL2N of each of {len(good):,} images", kept)


class _Selected(NamedTuple):
    """Which images train the weights and which the architecture; before there is a proxy, as many others.

    identity: that of `Halves`, None before there is a proxy. line: what the output says.
    """

    weights: np.ndarray
    arch: np.ndarray
    identity: str | None
    line: str


def _selected(config: Config, chain: Chain, table: Any, known: bool) -> _Selected:
    """The proxy that is there, or its size, which does not depend on the scores."""
    data, selection = chain.data, config.selection
    if config.given.proxy == ALL_IMAGES:
        halves = Halves.of_all_images(data, selection.arch_share, seed=config.seed)
        line = chain.line("proxy", f"all images, {_shares(halves.weights, halves.arch)}")
        return _Selected(halves.weights, halves.arch, halves.identity, line)
    found = chain.find(proxy, selection, table, data, given=config.given.proxy) if known else None
    if found is not None:
        indices, weights, arch = found.indices, found.weights, found.arch
    else:
        good = data.good()
        labels, options = data.labels[good], {"balanced": selection.balanced, "method": "top"}
        indices = good[select(np.zeros(len(good)), labels, selection.ratio, **options)]
        weights, arch = split_by_class(indices, data.labels[indices], selection.arch_share, seed=config.seed)
    counts = np.bincount(data.labels[indices], minlength=data.num_classes)
    each = f", {counts.min()} to {counts.max()} of each class" if found is not None or selection.balanced else ""
    state = "found" if found is not None else "select"
    line = f"{state}, {len(indices):,} of {len(data):,} images{each}: {_shares(weights, arch)}"
    return _Selected(weights, arch, None if found is None else found.hash(), chain.line("proxy", line))


def _search_and_finals(config: Config, chain: Chain, selected: _Selected) -> Iterator[str]:
    data, settings, found = chain.data, config.finals, None
    halves = Halves(selected.weights, selected.arch, selected.identity or "")
    roles = finals.divide(data, halves.weights, halves.arch, settings) if config.with_finals else None
    searched = None if selected.identity is None else chain.find(search, config.search, halves, data)
    yield chain.line(search.NAME, "found") if searched is not None else _search(config, chain, halves)
    if roles is None:
        if searched is not None:
            chain.find(search.Unproved(), config.search, searched, halves, data)
        return
    named = {text: read_genotype(text) for text in config.candidates}
    if searched is not None:
        entrants = finals.entrants(searched.candidates, searched.provenance, named, settings, data)
        found = chain.find(finals, settings, entrants, roles, data)
    yield chain.line(finals.NAME, "found") if found is not None else _finals(config, chain, len(roles.train))


def _finals(config: Config, chain: Chain, images: int) -> str:
    """As many candidates as a search can have, of which half goes on after each rung."""
    settings, data = config.finals, chain.data
    shape = {"kind": data.stem, "layers": settings.layers, "num_classes": data.num_classes, "auxiliary": False}
    model = build_network({**shape, "channels": settings.channels, "genotype": GENOTYPES["PC_DARTS_cifar"].to_json()})
    optim = OptimConfig(1, settings.batch_size, settings.lr)
    with _one_thread():  # as in a child
        step = _training_step(model.to(chain.compute.device), optim, Recipe(grad_clip=5.0), chain)
    most = config.search.seeds * (1 + CHECKPOINTS) + len(config.candidates)
    rungs = range(settings.rungs)
    steps = sum((math.ceil(most / 2**rung) + settings.controls) * settings.steps(images, rung) for rung in rungs)
    one = at(min(settings.batch_size, images), *step)
    epochs = ", ".join(str(settings.epochs_of(rung)) for rung in rungs)
    said = f"at most {most} candidates and {settings.controls} random ones, for {epochs} epochs of {images:,} images"
    children = config.jobs * chain.world.size
    return chain.line(finals.NAME, said, Cost(steps * one.seconds / children, one.bytes * config.jobs))


def _search(config: Config, chain: Chain, halves: Halves) -> str:
    settings, data, compute = config.search, chain.data, chain.compute
    bilevel = settings.bilevel(compute.amp, halves.epoch_steps(settings.batch_size))
    supernet = compute.layout(settings.supernet(data).to(compute.device))
    task, size = Search(supernet, bilevel), settings.search_size or data.image_size

    def batch(n: int) -> tuple[Tensor, Tensor]:
        images, labels = _random_images(n, size, data)
        return compute.layout(images), labels.argmax(1)

    def rest(n: int) -> None:
        task.weight_step(batch(n))
        task.scaler.update()  # fp16's losses are scaled anew after every step

    def move(n: int) -> None:
        task.arch_step(batch(n), batch(n))
        task.scaler.update()

    in_children = settings.seeds > 1 and compute.device.type == "cpu" and chain.world.size == 1
    children = min(settings.seeds, settings.jobs) if in_children else 1
    at_once = chain.world.size if chain.world.deals_out(settings.seeds) else children
    with _one_thread() if in_children else nullcontext():
        resting, moving = measured(rest, supernet), measured(move, supernet)
    n = min(settings.batch_size, len(halves.weights))
    weights, arch = at(n, *resting), at(min(settings.batch_size, len(halves.arch)), *moving)
    seconds = math.ceil(settings.seeds / at_once) * (
        bilevel.steps * weights.seconds + bilevel.arch_steps * arch.seconds
    )
    several = f"{settings.seeds} times " if settings.seeds > 1 else ""
    steps = f"{several}{bilevel.rest_steps:,} steps on the weights, then {bilevel.arch_steps:,} on the architecture too"
    shared = chain.world.size > 1 and not chain.world.deals_out(settings.seeds)
    recorded = settings.cuda_graphs and compute.device.type == "cuda" and not shared
    slower = ", timed kernel by kernel; the search replays recorded steps and is faster" if recorded else ""
    cost = Cost(seconds, children * max(weights.bytes, arch.bytes))
    return chain.line(search.NAME, f"{steps}, {n} images{slower}", cost)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Measure with the one thread that a child process has."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


# -- train_eval.py -----------------------------------------------------------------------------------------------------


def of_training(
    name: str, model: nn.Module, settings: NetworkTraining, images: int, chain: Chain, is_found: bool
) -> Iterator[str]:
    """What train_eval.py would do with this network, on so many images."""
    yield of_images(chain.data, images, settings.augmentation)
    if is_found:
        yield chain.line(network.NAME, "found")
        return
    if not chain.fresh and (chain.folder / network.FILE).exists():
        yield f"{chain.folder / network.FILE} is there: training goes on after its last epoch"
    step = _training_step(model.to(chain.compute.device), settings.optim, settings.recipe, chain)
    yield chain.line(network.NAME, *_epochs(name, settings.optim, settings.recipe, images, step))
    yield from chain.end()


# -- a few steps -------------------------------------------------------------------------------------------------------


def _training_step(model: nn.Module, optim: OptimConfig, recipe: Recipe, chain: Chain) -> tuple[Cost, Cost]:
    learner = Learner(chain.compute.layout(model).train(), optim, replace(recipe, accumulate=1), chain.compute)
    size, data = chain.data.image_size, chain.data
    return measured(lambda n: learner.step(*_random_images(n, size, data)), model)


def _epochs(name: str, optim: OptimConfig, recipe: Recipe, images: int, step: tuple[Cost, Cost]) -> tuple[str, Cost]:
    """A line on a training, and its cost."""
    steps, n = math.ceil(images / optim.batch_size), min(optim.batch_size, images)
    if recipe.limit_steps is not None and recipe.limit_steps < steps:
        steps, images = recipe.limit_steps, recipe.limit_steps * n
    said = f"train {name} for {optim.epochs} epochs of {steps:,} steps with {n} images"
    part = at(math.ceil(n / recipe.accumulate), *step)  # all that is in memory at once
    return said, Cost(optim.epochs * images / n * at(n, *step).seconds, part.bytes)


def _random_images(n: int, size: int, data: ImageData) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, size, size) and one-hot labels (n, classes), on the device."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 3, size, size, generator=generator)
    labels = torch.nn.functional.one_hot(torch.arange(n) % data.num_classes, data.num_classes).float()
    return images.to(data.device), labels.to(data.device)


# -- lines -------------------------------------------------------------------------------------------------------------


def _shares(weights: np.ndarray, arch: np.ndarray) -> str:
    return f"{len(weights):,} train the weights, {len(arch):,} the architecture"

"""One bilevel search on the two halves of a proxy: its settings, and the loop that a run goes through.

In:  a `SearchConfig`, the `Halves` and the images. Out: the genotype after the last step, and the history in a folder.

`darts_space.bilevel` takes the bilevel steps. This module reads their batches, augments them and, with `search_size`,
averages them to fewer pixels. First the weights move alone, then the architecture too. From then on `history` records
the genotype and the four architecture tables every `record_every` steps, and `run.on_record` receives the search's
name, the step, the tables so far, the genotype, and the total number of records.

The processes of a world take every step together, each with its part of both batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from darts_space import BilevelConfig, Genotype, Search, SuperNet, learning_rate, scaled_lr
from darts_space.derivation import EdgesBy, Removal
from darts_space.fast.graphs import GraphedSearch
from darts_space.fast.norm import join_norms
from darts_space.removal import REMOVAL_PASSES
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.feed import Division, step_batches
from nas_kmix.engine.keys import NOT_IN_KEY
from nas_kmix.engine.loop import Ended, run_loop
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run
from nas_kmix.pipeline import history
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.stage import Key

WEIGHT_ORDER, ARCH_ORDER, WEIGHT_AUGMENT, ARCH_AUGMENT, REMOVAL_IMAGES = range(21, 26)  # random streams
REMOVAL_BATCH, REMOVAL_BATCHES = 128, 4  # on which the removal of edges is measured
NOT_FINITE = (
    "Run it again with --amp off, or search in another --out with a lower --lr or --arch-lr, and with --proxy and the "
    "proxy.json of this run."
)
TURN_STEPS, TURN_PASSES = 350, 10
"""Steps on the weights, and passes over the images that train them, before which the gradient of alpha favours pools
(studies/search_quality). So few steps are enough for the smallest supernet alone, that of the preset quick."""


@dataclass(frozen=True)
class SearchConfig:
    """The supernet and its bilevel search. Defaults are PC-DARTS's on CIFAR (Xu et al. 2020, section 4.2)."""

    rest_steps: int | None = None
    """Steps that train the weights alone, before the architecture moves. Default: --frozen-epochs."""
    arch_steps: int | None = None
    """Steps that then train weights and architecture. Default: --epochs less --frozen-epochs."""
    epochs: int = field(default=50, metadata=NOT_IN_KEY)  # these two act through the steps
    """Length of the search in epochs of the weights' half, unless the steps are given."""
    frozen_epochs: int | None = field(default=None, metadata=NOT_IN_KEY)
    """First epochs, which train the weights alone; half of --epochs where that leaves none. Default: 15, or half of
    --epochs if that is less."""
    batch_size: int = 256
    """Images per step from each half; a smaller half is one batch."""
    search_size: int | None = None
    """Side in pixels to which augmented images are downsampled by averaging. Default: their own."""
    lr: float | None = None
    """SGD's initial learning rate. Default: 0.1 from batch size 256 up (imagenet: 0.5 from 1024), scaled down below."""
    full_lr: Annotated[float, tyro.conf.Suppress] = field(default=0.1, metadata=NOT_IN_KEY)  # it acts through lr
    full_batch: Annotated[int, tyro.conf.Suppress] = field(default=256, metadata=NOT_IN_KEY)
    """Batch size from which `full_lr` holds; a given `lr` holds for any batch size."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """SGD's learning-rate schedule: half a cosine to --lr-min over all steps, or constant."""
    lr_min: float = 0.0
    """SGD's last learning rate."""
    momentum: float = 0.9
    weight_decay: float = 3e-4
    """SGD's weight decay."""
    grad_clip: float = 5.0
    """Clip the gradient norm of the weights to this value."""
    warmup_epochs: int = 0
    """Epochs of learning-rate warm-up, at most half of --epochs."""
    channels: int = 16
    """Channels of the first cell's nodes."""
    layers: int = 8
    """Number of cells."""
    partial: int = 4
    """K: one channel in K enters the operations (CIFAR 4, ImageNet 2; 1 without edge normalisation is DARTS)."""
    edge_normalisation: bool = True
    """Weight a node's edges by the softmax of beta."""
    edges_by: EdgesBy = "alpha-beta"
    """What chooses the two inputs of a node: alpha; its product with beta, as in PC-DARTS; by how much the validation
    loss rises if an input is removed; or inputs: always those of the cell (studies/search_quality)."""
    arch_lr: float = 6e-4
    """Adam's learning rate for alpha and beta."""
    arch_weight_decay: float = 1e-3
    """Adam's weight decay on alpha and beta."""
    arch_grad_clip: float | None = None
    """Clip the gradient norm of alpha and beta to this value. Default: no clipping."""
    unrolled: bool = False
    """Use DARTS's second-order architecture gradient, at about three times the cost."""
    record_every: int | None = None
    """Steps between rows of the log and, once the architecture moves, of genotypes.jsonl. Default: an epoch."""
    seeds: int = 1
    """Number of searches on the same proxy. The finals compare them; without finals, genotype.json is the one that
    shares most edges with the others."""
    sync_batchnorm: bool = False
    """Under torchrun, compute BatchNorm's statistics over the batches of all processes."""
    cuda_graphs: bool = field(default=False, metadata=NOT_IN_KEY)
    """On a GPU, record a step once, then replay it: nine times as fast for a small supernet. First order, no fp16;
    processes of torchrun that share a search do without."""
    augmentation: Annotated[Augmentation, tyro.conf.Suppress] = field(default_factory=Augmentation)
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the initial weights, batches and augmentation; several searches count up from it."""
    jobs: Annotated[int, tyro.conf.Suppress] = field(default=1, metadata=NOT_IN_KEY)
    """Child processes for several searches."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "seeds", "record_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")

    def bilevel(self, amp: str, epoch_steps: int) -> BilevelConfig:
        """The settings of `darts_space`, for epochs of `epoch_steps` steps. Raises ValueError if they are invalid."""
        half = self.epochs // 2
        frozen = min(15, half) if self.frozen_epochs is None else self.frozen_epochs
        if frozen >= self.epochs:  # those of a preset, where --epochs makes the search short
            frozen = half
        own = {item.name: getattr(self, item.name) for item in fields(BilevelConfig) if hasattr(self, item.name)}
        resolved = {
            "rest_steps": frozen * epoch_steps if self.rest_steps is None else self.rest_steps,
            "arch_steps": (self.epochs - frozen) * epoch_steps if self.arch_steps is None else self.arch_steps,
            "lr": scaled_lr(self.batch_size, self.full_lr, self.full_batch) if self.lr is None else self.lr,
            "epoch_steps": epoch_steps,
            "warmup_epochs": min(self.warmup_epochs, half),
            "amp": amp,
        }
        return BilevelConfig(**own | resolved)

    def supernet(self, data: ImageData) -> SuperNet:
        """A new supernet for these images."""
        return SuperNet(
            self.channels,
            data.num_classes,
            self.layers,
            self.partial,
            data.stem,
            self.edge_normalisation,
            generator=torch.Generator().manual_seed(self.seed),
        )


def say_how_long(bilevel: BilevelConfig, config: SearchConfig, halves: Halves, data: ImageData, run: Run) -> None:
    """Log the resolved numbers of steps, and warn if the architecture moves too early."""
    size, epoch_steps = config.search_size or data.image_size, halves.epoch_steps(config.batch_size)
    shared = run.world.size > 1 and not run.world.deals_out(config.seeds)
    run.say(
        f"search: {bilevel.rest_steps} steps on the weights alone, then {bilevel.arch_steps} on weights and "
        f"architecture; {min(config.batch_size, len(halves.weights))} images of {size} px per step"
        f"{f', shared by {run.world.size} processes' if shared else ''}"
    )
    enough = max(TURN_STEPS, TURN_PASSES * epoch_steps)
    if bilevel.arch_steps > 0 and bilevel.rest_steps < enough:
        run.say(
            f"warning: the architecture moves after {bilevel.rest_steps} steps on the weights, "
            f"{bilevel.rest_steps / epoch_steps:.1f} passes over their {len(halves.weights)} images; in the first "
            f"{TURN_STEPS} steps and {TURN_PASSES} to 20 passes its gradient favours pools. Set --rest-steps to "
            f"{enough} or more, or search on fewer images."
        )


def search_once(
    name: str, folder: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key
) -> Genotype:
    """Search, write the history into `folder`, and return the genotype after the last step."""
    epoch_steps = halves.epoch_steps(config.batch_size)
    bilevel = config.bilevel(run.compute.amp, epoch_steps)
    supernet = run.compute.layout(config.supernet(data).to(run.compute.device))
    if run.world.size > 1:
        halves.check_processes(run.world.size, config.batch_size)
        if config.sync_batchnorm:
            join_norms(supernet)
        search = Search(supernet, bilevel, joint=True)
    else:
        graphed = config.cuda_graphs and run.compute.device.type == "cuda"
        search = (GraphedSearch if graphed else Search)(supernet, bilevel)
    every = config.record_every or epoch_steps
    periods = [*_periods(bilevel.rest_steps, every), *_periods(bilevel.arch_steps, every)]
    task = _Searching(name, folder, search, periods, config, halves, data, run)
    run_loop(task, periods, name=name, key=key, run=run, remedy=NOT_FINITE)
    genotype = history.genotype_of(task.rows[-1])
    history.say_how_sure(genotype, task.rows, name, run)
    return genotype


def _periods(steps: int, every: int) -> list[int]:
    """`steps` cut into periods of `every` steps; the last may be shorter."""
    return [min(every, steps - start) for start in range(0, steps, every)]


@dataclass
class _Searching:
    """The task of a search (see `engine.loop`); `rows` are its history."""

    name: str
    folder: Path
    search: Search
    periods: Sequence[int]
    config: SearchConfig
    halves: Halves
    data: ImageData
    run: Run
    rows: list[history.Row] = field(default_factory=list)

    def start(self, period: int) -> None:
        """Nothing to set: the learning rate changes step by step."""

    def batches(self, period: int, first_step: int) -> Iterator[tuple[Batch, Batch]]:
        """Pairs of full batches, one from each half, over successive shuffled passes; or this process's parts."""
        first, steps = self.search.steps_done, self.periods[period] - first_step
        seed, size = self.config.seed, self.config.batch_size
        weight_plan = step_batches(self.halves.weights, size, first, steps, seed=(seed, WEIGHT_ORDER))
        arch_plan = step_batches(self.halves.arch, size, first, steps, seed=(seed, ARCH_ORDER))
        if self.search.resting:
            arch_plan = [indices[:0] for indices in arch_plan]  # not used while the architecture rests, so not read
        batches = (self.data.batches(self._division.plan(plan)) for plan in (weight_plan, arch_plan))
        return zip(*batches, strict=True)

    def step(self, batch: tuple[Batch, Batch], period: int, step: int, meter: Meter) -> int:
        resting, done, seed = self.search.resting, self.search.steps_done, self.config.seed
        train, n = self._prepared(batch[0], (seed, WEIGHT_AUGMENT, done))
        val, n_val = (None, 0) if resting else self._prepared(batch[1], (seed, ARCH_AUGMENT, done))
        result = self.search.step(train, val)
        own = len(train[1])
        meter.add(step, own, loss=result.train_loss * n, accuracy=result.train_correct)
        if result.val_loss is not None:
            meter.add(step, len(val[1]), val_loss=result.val_loss * n_val)
        return n * (4 if self.config.unrolled and not resting else 1) + n_val

    @property
    def _division(self) -> Division:
        return Division(self.data, self.run.world)

    def _prepared(self, batch: Batch, moment: tuple[int, ...]) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        """This process's augmented float images at the search's size, and labels; the number of images of all."""
        rows, n = self._division.rows(batch)
        if len(batch.labels) == 0:
            raise ValueError(
                f"{self.data.source.name}: no file of a batch can be read any more; the first is "
                f"{self.data.bad.first()}"
            )
        rng = np.random.default_rng(self._division.moment(*moment))
        images = augment_batch(batch.images, self.data, self.config.augmentation, rng=rng)[rows]
        return (self._downsampled(images), batch.labels[rows]), n

    def _downsampled(self, images: torch.Tensor) -> torch.Tensor:
        if self.config.search_size is not None:
            images = F.interpolate(images, size=(self.config.search_size,) * 2, mode="area")
        return self.run.compute.layout(images)

    def _removal(self) -> Removal:
        """How much the loss rises without an edge, on the same images of the architecture's half at every record."""
        order = np.random.default_rng([self.config.seed, REMOVAL_IMAGES]).permutation(self.halves.arch)
        size = min(REMOVAL_BATCH, len(order))
        plan = [order[i * size : (i + 1) * size] for i in range(min(REMOVAL_BATCHES, len(order) // size))]
        batches, cost = [], self.run.ledger.costs[self.name.partition("/")[0]]
        for batch in self.data.batches(self._division.plan(plan)):
            rows, n = self._division.rows(batch)
            batches.append((self._downsampled(self.data.normalise(batch.images[rows])), batch.labels[rows]))
            cost.images_forward += REMOVAL_PASSES * n
        return self.search.removal_losses(batches)

    def end(self, period: int, means: Mapping[str, float]) -> Ended:
        bilevel, done, edges_by = self.search.config, self.search.steps_done, self.config.edges_by
        removal = self._removal() if edges_by == "removal" and done >= bilevel.rest_steps else None
        if edges_by == "removal" and removal is None:
            edges_by = "alpha"  # only the log sees the genotype of a resting architecture
        row = history.row_of(self.search, edges_by, removal)
        lr = learning_rate(bilevel, done - 1)
        place = {"step": done, "arch_step": max(0, row["arch_step"])}
        if row["arch_step"] >= 0:
            self.rows.append(row)
        if row["arch_step"] >= 0 and self.run.world.main:
            history.write_history(self.rows, self.folder)
            tables = [row["tables"] for row in self.rows]
            records = sum(end >= bilevel.rest_steps for end in accumulate(self.periods))
            self.run.on_record(self.name, done, tables, history.genotype_of(row), records=records)
        return Ended({**place, "lr": lr, **means, **row["diagnostics"]})

    def state_dict(self) -> dict[str, Any]:
        return {"search": self.search.state_dict(), "history": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search.load_state_dict(state["search"])
        self.rows = list(state["history"])

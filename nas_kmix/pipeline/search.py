"""Stage four: search an architecture on the two halves of a proxy dataset. Images in, `genotype.json` out.

The bilevel steps themselves are in `darts_space.bilevel`. Here their batches are read and augmented, and after every
epoch the present genotype and the four architecture tables are recorded (`history`) and `run.on_epoch` is told of the
search's name, the epoch, the number of epochs and the tables so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from darts_space import BilevelConfig, Genotype, Search, SuperNet, scaled_lr
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.feed import epoch_batches
from nas_kmix.engine.keys import NOT_IN_KEY, check_key, identity, stage_key
from nas_kmix.engine.loop import run_loop
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run
from nas_kmix.manifest import ProxyManifest
from nas_kmix.pipeline import history
from nas_kmix.pipeline.stage import Key, obtain
from nas_kmix.sampling import split_by_class

NAME = "search"
FILE = "genotype.json"
WEIGHT_ORDER, ARCH_ORDER, WEIGHT_AUGMENT, ARCH_AUGMENT = 21, 22, 23, 24  # random streams


@dataclass(frozen=True)
class SearchConfig:
    """The supernet and its bilevel search. Defaults are PC-DARTS's on CIFAR (Xu et al. 2020, section 4.2)."""

    epochs: int = 50
    batch_size: int = 256
    """Images per step and half; a smaller half is one batch."""
    lr: float | None = None
    """SGD's first learning rate. Default: 0.1 from batch 256 up (imagenet: 0.5 from 1024 up), in proportion below."""
    full_lr: Annotated[float, tyro.conf.Suppress] = field(default=0.1, metadata=NOT_IN_KEY)  # it acts through lr
    full_batch: Annotated[int, tyro.conf.Suppress] = field(default=256, metadata=NOT_IN_KEY)
    """Images in a batch from which `full_lr` holds; a given `lr` holds for any batch."""
    channels: int = 16
    """Width of the first cell's nodes."""
    layers: int = 8
    """Cells."""
    partial: int = 4
    """K, one channel in K goes through the operations (4 on CIFAR, 2 on ImageNet; 1 with plain sums is DARTS)."""
    edge_normalisation: bool = True
    """Weight a node's edges by the softmax of beta."""
    frozen_epochs: int | None = None
    """First epochs that leave the architecture alone; where --epochs is not above this, half of --epochs. Default: 15,
    or half of --epochs if that is less."""
    warmup_epochs: int = 0
    """First epochs in which the learning rate rises; where --epochs is not above this, half of --epochs."""
    arch_lr: float = 6e-4
    arch_grad_clip: float | None = None
    unrolled: bool = False
    """Second-order architecture gradient (DARTS); costs about three times as much."""
    step_matched: bool = field(default=False, metadata=NOT_IN_KEY)  # it acts through epochs
    """Give a proxy as many steps as the whole set would have had: the epochs grow by the ratio of their steps."""
    seeds: int = 1
    """Searches on the same proxy; genotype.json is then the one that shares most edges with the others."""
    augmentation: Annotated[Augmentation, tyro.conf.Suppress] = field(default_factory=Augmentation)
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the weights, the batches and their augmentation; several searches count on from it."""

    def __post_init__(self):
        for name in ("batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")

    def _at_most_half(self, wanted: int | None) -> int | None:
        """Epochs of a preset for a long search, where `--epochs` cuts it short."""
        return wanted if wanted is None or wanted < self.epochs else self.epochs // 2

    def bilevel(self, amp: str) -> BilevelConfig:
        """The part that `darts_space` reads. Raises ValueError for values that make no search."""
        return BilevelConfig(
            epochs=self.epochs,
            lr=scaled_lr(self.batch_size, self.full_lr, self.full_batch) if self.lr is None else self.lr,
            arch_lr=self.arch_lr,
            arch_grad_clip=self.arch_grad_clip,
            frozen_epochs=self._at_most_half(self.frozen_epochs),
            warmup_epochs=self._at_most_half(self.warmup_epochs),
            unrolled=self.unrolled,
            amp=amp,
        )

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


@dataclass(frozen=True)
class Halves:
    """Which images train the weights and which the architecture: int64, sorted; `identity` tells halves apart."""

    weights: np.ndarray
    arch: np.ndarray
    identity: str

    def __post_init__(self):
        if len(self.weights) == 0 or len(self.arch) == 0:
            raise ValueError("The proxy leaves no image for the architecture; raise --ratio or --arch-share.")

    @staticmethod
    def of_proxy(manifest: ProxyManifest) -> Halves:
        return Halves(manifest.weights, manifest.arch, identity=manifest.hash())

    @staticmethod
    def of_all_images(data: ImageData, arch_share: float, *, seed: int) -> Halves:
        """All images that can be read, divided by class."""
        weights, arch = split_by_class(data.good(), data.labels[data.good()], arch_share, seed=seed)
        return Halves(weights, arch, identity=f"all images, arch_share {arch_share}")


# -- the stage ---------------------------------------------------------------------------------------------------------


def key(config: SearchConfig, halves: Halves, data: ImageData) -> Key:
    """What a search depends on, in values that are resolved: the epochs of a step-matched search, not its wish."""
    config = _step_matched(config, halves, data)
    resolved = asdict(config.bilevel("off"))
    del resolved["amp"]  # a search may go on on another device
    return stage_key(NAME, identity(config) | resolved, {"data": data.fingerprint, "proxy": halves.identity})


def load(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key | None) -> Genotype:
    """The genotype in `path`."""
    genotype = Genotype.load(path)
    check_key(path, files.read_json(path).get("provenance"), key)
    for name in history.FILES if config.seeds == 1 else ():
        if not path.with_name(name).exists():
            run.say(f"warning: {path.with_name(name)} is gone; remove {path.name} to search anew and get both")
    return genotype


def make(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key) -> Genotype:
    """Search once, or once for each of the `seeds` and choose the genotype that is most like the others."""
    if config.seeds == 1:
        return _search(NAME, path, config, halves, data, run=run, key=key)
    genotypes = []
    for i in range(config.seeds):
        one = replace(config, seeds=1, seed=config.seed + i)
        genotypes.append(obtain(OneSeed(i), one, halves, data, run=run))
    shared = [sum(one.shared_edges(other) for other in genotypes) - 16 for one in genotypes]
    chosen = int(np.argmax(shared))
    mean = shared[chosen] / (config.seeds - 1)
    run.say(f"seeds: seed-{chosen} shares {mean:.1f} of its 16 edges with each of the others, the most of all")
    genotypes[chosen].save(path, provenance={**key, "chosen": f"seed-{chosen}", "shared_edges": shared})
    return genotypes[chosen]


class OneSeed:
    """One of several searches, a stage of its own in the subfolder seed-N."""

    key, load = staticmethod(key), staticmethod(load)

    def __init__(self, number: int):
        self.NAME, self.FILE = f"{NAME}/seed-{number}", f"seed-{number}/{FILE}"

    def make(self, path: Path, *inputs: Any, run: Run, key: Key) -> Genotype:
        return _search(self.NAME, path, *inputs, run=run, key=key)


# -- one search --------------------------------------------------------------------------------------------------------


def _search(
    name: str, path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key
) -> Genotype:
    """The genotype after the last epoch, which is written to `path`, and the history beside it."""
    config = _step_matched(config, halves, data)
    supernet = run.compute.layout(config.supernet(data).to(run.compute.device))
    search = Search(supernet, config.bilevel(run.compute.amp))
    task = _Searching(name, path.parent, search, config, halves, data, run)
    run_loop(task, [task.steps] * config.epochs, name=name, key=key, run=run)
    genotype = search.model.genotype()
    skips, _ = genotype.skip_connections()
    if skips >= history.SKIP_COLLAPSE:
        run.say(
            f"warning: {skips} of the 8 operations of the normal cell are skip connections; the search may have "
            f"collapsed. Fewer epochs, a lower --lr or more data (--ratio) help."
        )
    genotype.save(path, provenance=key)
    return genotype


@dataclass
class _Searching:
    """The task of a search (see `engine.loop`); `rows` are its history."""

    name: str
    folder: Path
    search: Search
    config: SearchConfig
    halves: Halves
    data: ImageData
    run: Run
    rows: list[history.Row] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of an epoch: all batches of the weights' half."""
        return math.ceil(len(self.halves.weights) / self.config.batch_size)

    def start(self, epoch: int) -> None:
        self.search.start_epoch(epoch)

    def batches(self, epoch: int, first_step: int) -> Iterator[tuple[Batch, Batch]]:
        """Pairs of batches, one of each half; the smaller half is passed over several times."""
        weights, arch, size, seed = self.halves.weights, self.halves.arch, self.config.batch_size, self.config.seed
        weight_plan = epoch_batches(weights, size, self.steps, seed=(seed, WEIGHT_ORDER, epoch))
        arch_plan = epoch_batches(arch, min(size, len(arch)), self.steps, seed=(seed, ARCH_ORDER, epoch))
        if self.search.frozen:
            arch_plan = [indices[:0] for indices in arch_plan]  # not looked at, so not read either
        return zip(self.data.batches(weight_plan[first_step:]), self.data.batches(arch_plan[first_step:]), strict=True)

    def step(self, batch: tuple[Batch, Batch], epoch: int, step: int, meter: Meter) -> int:
        train, val = batch
        frozen, seed = self.search.frozen, self.config.seed
        result = self.search.step(
            self._prepared(train, [seed, WEIGHT_AUGMENT, epoch, step]),
            None if frozen else self._prepared(val, [seed, ARCH_AUGMENT, epoch, step]),
        )
        n = len(train.labels)
        meter.add(step, n, loss=result.train_loss * n, accuracy=result.train_correct)
        if result.val_loss is not None:
            meter.add(step, len(val.labels), val_loss=result.val_loss * len(val.labels))
        return n * (4 if self.config.unrolled and not frozen else 1) + len(val.labels)

    def _prepared(self, batch: Batch, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented float images and labels."""
        if len(batch.labels) == 0:
            raise ValueError(
                f"{self.data.source.name}: not one file of a batch can be read any more; the first is "
                f"{self.data.bad.first()}"
            )
        images = augment_batch(batch.images, self.data, self.config.augmentation, rng=np.random.default_rng(seed))
        return self.run.compute.layout(images), batch.labels

    def end(self, epoch: int, means: Mapping[str, float]) -> Sequence[str]:
        row = history.row_of(self.search, epoch)
        self.rows.append(row)
        history.write_history(self.rows, self.folder)
        self.run.log.add(self.name, epoch, lr=self.search.lr, **means, **row["diagnostics"])
        self.run.on_epoch(self.name, epoch, self.config.epochs, [row["tables"] for row in self.rows])
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {"search": self.search.state_dict(), "history": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search.load_state_dict(state["search"])
        self.rows = list(state["history"])


def _step_matched(config: SearchConfig, halves: Halves, data: ImageData) -> SearchConfig:
    """The config with as many epochs as make the steps that the whole set would have had, if that was asked for."""
    if not config.step_matched:
        return config
    weight_share = len(halves.weights) / (len(halves.weights) + len(halves.arch))
    steps_of_all = math.ceil(len(data.good()) * weight_share / config.batch_size)
    factor = steps_of_all / math.ceil(len(halves.weights) / config.batch_size)
    return replace(config, epochs=round(config.epochs * factor), step_matched=False)

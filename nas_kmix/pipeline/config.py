"""The settings of a search: its flags, their presets, and the checks for flags that contradict each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from darts_space import read_genotype
from darts_space.search_network import INPUT_MULTIPLES, check_shape
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.cli import Invocation
from nas_kmix.engine.compute import DeviceConfig
from nas_kmix.engine.data import DataConfig, ImageData
from nas_kmix.engine.evaluation import EVALUATION_BATCH
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.workers import check_room
from nas_kmix.mixers import MixConfig
from nas_kmix.pipeline.one_search import SearchConfig
from nas_kmix.pipeline.scorer import ScorerConfig
from nas_kmix.pipeline.trial import FinalsConfig
from nas_kmix.pretrained import is_published
from nas_kmix.proxies import published
from nas_kmix.proxy import ProxyConfig, smallest_ratio
from nas_kmix.scores import COLUMNS
from nas_kmix.scoring import IMAGES_PER_SHARD, ScoringConfig

ALL_IMAGES = Path("none")  # `--proxy none`: no proxy, search on all images
Flat = tyro.conf.arg(name="")  # flags without a prefix: --epochs, not --search.epochs


@dataclass(frozen=True)
class Given:
    """Results of another run to start from; at most one."""

    scorer: Path | None = None
    """Use the scorer.pt of another run; torchvision:NAME[:WEIGHTS] or timm:NAME with its published weights; or a state
    dict of the network --scorer.backbone."""
    scores: Path | None = None
    """Use the scores.npz of another run on the same data."""
    proxy: Path | None = None
    """Use this proxy.json, made on any copy of the data, or a published one: cifar100-interval-5, cifar100-interval-10,
    cifar100-coverage-5, cifar100-coverage-10; `none` searches on all images."""


@dataclass(frozen=True)
class Config:
    """All settings. `--preset` sets the defaults shown here; every other flag overrides one of them."""

    preset: Literal["quick", "cpu", "gpu", "paper", "imagenet"] = "quick"
    """quick: digits, a minute | cpu: small scorer, supernet | gpu: PC-DARTS's supernet at 16 px on one GPU |
    paper: the paper's settings | imagenet: 224 px."""
    out: Path = Path("runs/search")
    """The run folder."""
    seed: int = 0
    """Seed of every stage."""
    stop_after: Literal["scorer", "scores", "proxy"] | None = None
    """Stop once this result exists."""
    given: Annotated[Given, Flat] = field(default_factory=Given)
    export_list: Path | None = None
    """Also write the proxy to this file, one line `path-or-index, label, class name` per image, for other trainers."""
    invocation: Annotated[Invocation, Flat] = field(default_factory=Invocation)
    fresh: bool = False
    """Remove what an earlier run left in --out and start over."""
    jobs: int = min(8, os.cpu_count() or 1)
    """Child processes of one thread each that work side by side; results are the same whatever the number."""
    quiet: bool = False
    """Print nothing but warnings and the results."""
    report: bool = True
    """Show the architecture in TensorBoard during the search, and write the page report.html at the end."""
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    augmentation: Annotated[Augmentation, Flat] = field(default_factory=Augmentation)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    selection: Annotated[ProxyConfig, Flat] = field(default_factory=ProxyConfig)
    search: Annotated[SearchConfig, Flat] = field(default_factory=SearchConfig)
    candidates: tuple[str, ...] = ()
    """Further genotypes for the finals: files, names of published ones, or texts."""
    with_finals: Annotated[bool, tyro.conf.arg(name="finals")] = True
    """Train the candidates of the search beside random architectures, choose the best, and say what the search is
    worth. Without finals genotype.json is what the search ended with, unproved."""
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)

    @property
    def uses_scores(self) -> bool:
        """Whether this command needs scores, given or not."""
        if self.given.proxy is not None:
            return False
        return self.selection.method != "random" or self.stop_after in ("scorer", "scores")

    def spread(self) -> Config:
        """The same config, with the shared seed and augmentation copied into the config of every stage.

        The scorer goes without Cutout, as in the published code, since its images are mixed.
        """
        common = {"seed": self.seed, "augmentation": self.augmentation}
        return replace(
            self,
            scorer=replace(self.scorer, seed=self.seed, augmentation=replace(self.augmentation, cutout=0)),
            scoring=replace(self.scoring, seed=self.seed),
            selection=replace(self.selection, seed=self.seed),
            search=replace(self.search, **common, jobs=self.jobs),
            finals=replace(self.finals, **common, jobs=self.jobs),
        )


PRESETS: dict[str, Config] = {
    # Shows that everything works, in a minute on two idle cores. The ranking is mostly noise.
    "quick": Config(
        input=DataConfig(data="digits"),
        augmentation=Augmentation(flip=False, crop_padding=2),  # digits must not be mirrored
        scorer=ScorerConfig(
            "tiny", OptimConfig(epochs=15, batch_size=64, lr=0.1, schedule="cosine", weight_decay=1e-4),
            val_share=0.1,
        ),
        selection=ProxyConfig(ratio=0.2),
        search=SearchConfig(
            rest_steps=600, arch_steps=20, batch_size=8, search_size=8, lr=0.025, schedule="constant", channels=8,
            layers=3, edges_by="removal", arch_lr=6e-3, record_every=5,
        ),
        finals=FinalsConfig(epochs=2, rungs=2, controls=2, channels=4, layers=5, batch_size=16),
        device=DeviceConfig(channels_last=True),
    ),
    # CIFAR-100 without a GPU, in about an hour of one idle thread, half of it for the finals. The scorer reaches 46 %
    # accuracy (studies/first_run); how long alpha rests comes from studies/search_quality.
    "cpu": Config(
        preset="cpu",
        input=DataConfig(data="cifar100"),
        scorer=ScorerConfig(
            "small", OptimConfig(epochs=20, batch_size=128, lr=0.1, schedule="cosine", weight_decay=1e-4),
            val_share=0.1,
        ),
        search=SearchConfig(
            rest_steps=2400, arch_steps=75, batch_size=32, search_size=16, lr=0.025, schedule="constant",
            edges_by="removal", arch_lr=6e-3, record_every=25,
        ),
        finals=FinalsConfig(epochs=3, rungs=2, batch_size=32),
        device=DeviceConfig(channels_last=True),
    ),
    # CIFAR on one GPU: PC-DARTS's supernet, which sees 16 px, and a scorer that takes minutes.
    "gpu": Config(
        preset="gpu",
        input=DataConfig(data="cifar100"),
        scorer=ScorerConfig(
            "preactresnet18", OptimConfig(epochs=30, batch_size=128, lr=0.1, schedule="cosine", weight_decay=5e-4),
            val_share=0.1,
        ),
        search=SearchConfig(
            rest_steps=2000, arch_steps=100, batch_size=64, search_size=16, lr=0.025, schedule="constant",
            edges_by="removal", arch_lr=6e-3, record_every=25, cuda_graphs=True,
        ),
        with_finals=False,
        device=DeviceConfig(channels_last=True),
    ),
    # PyramidNet-110 for 300 epochs (the paper's Table 1: 16.95 % top-1 error) and PC-DARTS for 50 (Table 5). For a GPU.
    "paper": Config(preset="paper", input=DataConfig(data="cifar100"), with_finals=False),
    # PC-DARTS's ImageNet search (section 4.3): 10 % of each class for the weights, 2.5 % for the architecture. The
    # scorer is the paper's ResNet-50 (Table 3: 21.76 % top-1 error). For several GPUs.
    "imagenet": Config(
        preset="imagenet",
        input=DataConfig(data="imagenet", image_size=224),
        scorer=ScorerConfig(
            "resnet50",
            OptimConfig(epochs=300, batch_size=256, lr=0.1, weight_decay=1e-4, milestones=(0.25, 0.5, 0.75)),
            MixConfig("dcutmix", mix_k=3, mix_alpha=1 / 3),
        ),
        selection=ProxyConfig(ratio=0.125, arch_share=0.2),
        search=SearchConfig(
            batch_size=1024, full_lr=0.5, full_batch=1024, partial=2, frozen_epochs=35, warmup_epochs=5, arch_lr=6e-3,
            arch_grad_clip=5.0,
        ),
        with_finals=False,
    ),
}  # fmt: skip


def check_flags(config: Config) -> None:
    """Refuse flags that contradict each other."""
    paths = {flag: path for flag, path in vars(config.given).items() if path is not None}
    order, given = ("scorer", "scores", "proxy"), list(paths)
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both start the chain; give only the later one.")
    if config.given.proxy == ALL_IMAGES and (config.stop_after is not None or config.export_list is not None):
        flag = "--stop-after" if config.stop_after is not None else "--export-list"
        raise ValueError(f"--proxy none makes no proxy, so {flag} has no effect; leave one of them out.")
    if given and config.stop_after is not None and order.index(config.stop_after) < order.index(given[0]):
        raise ValueError(f"--{given[0]} starts after --stop-after {config.stop_after}; leave one of them out.")
    if config.selection.method == "random" and given in (["scorer"], ["scores"]):
        raise ValueError(f"--method random uses no scores, so --{given[0]} has no effect; leave one of them out.")
    if config.export_list is not None and config.stop_after in ("scorer", "scores"):
        raise ValueError(f"--export-list needs a proxy, but --stop-after {config.stop_after} ends before there is one.")
    if config.export_list is not None and config.export_list.is_dir():
        raise ValueError(f"--export-list {config.export_list} is a folder; name a file.")
    selection, stops = config.selection, config.stop_after in ("scorer", "scores")
    selects = selection.method != "random" and not stops and not set(given) & {"scores", "proxy"}
    asked = {"--scoring.baselines": config.scoring.baselines, "--scorer.forgetting": config.scorer.forgetting}
    needed = COLUMNS.get(selection.measure)
    if selects and needed is not None and not asked[needed] and (needed, given) != ("--scorer.forgetting", ["scorer"]):
        raise ValueError(f"--measure {selection.measure} needs {needed}, which measures it.")
    for flag, path in paths.items():
        if is_published(path):
            continue
        names = ("none", *published()) if flag == "proxy" else ()
        if not path.is_file() and str(path) not in names:
            others = f"; published proxies are {', '.join(published())}" if names else ""
            raise ValueError(f"--{flag} {path}: there is no such file{others}.")
        if config.fresh and path.parent.resolve() == config.out.resolve():
            raise ValueError(
                f"--fresh would remove the file of --{flag}; leave one of them out, or choose another --out."
            )
    preset = PRESETS[config.preset].search
    for name, steps in (("epochs", ("rest_steps", "arch_steps")), ("frozen_epochs", ("rest_steps",))):
        measured = all(getattr(config.search, step) is not None for step in steps)
        if measured and getattr(config.search, name) != getattr(preset, name):
            flags = " and ".join(f"--{step.replace('_', '-')}" for step in steps)
            raise ValueError(f"--{name.replace('_', '-')} has no effect beside {flags}; change those, or leave it out.")
    if config.candidates and not config.with_finals:
        raise ValueError("--candidates compete in the finals, so they have no effect with --no-finals; leave one out.")
    for text in config.candidates:
        read_genotype(text)
    if config.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {config.jobs}.")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2**63, not {config.seed}.")


def without_effect(config: Config) -> list[str]:
    """The selection flags that were changed but have no effect on a given proxy; `none` still uses --arch-share."""
    preset = PRESETS[config.preset].selection
    used = {"seed", "arch_share"} if config.given.proxy == ALL_IMAGES else {"seed"}
    names = [f.name for f in fields(preset) if f.name not in used]
    changed = [name for name in names if getattr(config.selection, name) != getattr(preset, name)]
    return [f"--{name.replace('_', '-')}" for name in changed]


def check_later_stages(config: Config, data: ImageData) -> None:
    """Refuse now what a later stage would refuse after the first one has spent hours."""
    scores_anew = config.uses_scores and config.given.scores is None and config.stop_after != "scorer"
    if scores_anew and config.scoring.k > len(data):
        raise ValueError(f"--scoring.k {config.scoring.k} is more than the {len(data)} images of --data.")
    if not data.resident:
        batches = [config.scorer.optim.batch_size, EVALUATION_BATCH, IMAGES_PER_SHARD] if config.uses_scores else []
        batches += [2 * config.search.batch_size] if config.stop_after is None else []  # of each half
        check_room(min(max(batches, default=0), len(data)), data.image_size, data.workers, processes=1)
    if config.stop_after is not None:
        return
    _check_halves(config, data)
    search = config.search
    check_shape(search.channels, search.layers, search.partial, data.stem)
    multiple = INPUT_MULTIPLES[data.stem]
    flag, size = (
        ("--image-size", data.image_size) if search.search_size is None else ("--search-size", search.search_size)
    )
    if size % multiple or size < multiple:
        nearest = max(multiple, round(size / multiple) * multiple)
        raise ValueError(
            f"The supernet halves its images several times: the side must be a multiple of {multiple} px, not {size}; "
            f"use {flag} {nearest}."
        )
    if size > data.image_size:
        raise ValueError(f"--search-size {size} is larger than the images, {data.image_size} px; leave it out.")
    search.bilevel(config.device.amp, epoch_steps=1)  # checks its values
    if search.edges_by == "removal" and not search.edge_normalisation:
        raise ValueError("--edges-by removal needs beta to remove an edge; add --edge-normalisation or use alpha.")
    if search.cuda_graphs and (search.unrolled or config.device.amp == "fp16"):
        flag = "--unrolled" if search.unrolled else "--amp fp16"
        raise ValueError(f"--cuda-graphs cannot record the steps of {flag}; leave one of them out.")


def _check_halves(config: Config, data: ImageData) -> None:
    """Refuse where no image would be left to train the architecture: classes and ratio tell that without any score."""
    if config.given.proxy not in (None, ALL_IMAGES):
        return
    selection = config.selection
    counts = np.bincount(data.labels[data.good()])
    least = smallest_ratio(counts, balanced=selection.balanced)
    if least is None:
        raise ValueError(
            f"--data {config.input.data}: no class has two images, so none is left to train the architecture; add some."
        )
    if config.given.proxy is None and selection.ratio < least:
        reuse = ""
        if (config.out / "proxy.json").exists() and not config.fresh:  # it would not fit the other ratio
            scores = config.out / "scores.npz"
            given = f" --scores {scores}" if scores.exists() and config.given == Given() and config.uses_scores else ""
            reuse = f" with --out {config.out}-2{given}"
        raise ValueError(
            f"--ratio {selection.ratio:g} leaves no image to train the architecture, since it takes a single one of a "
            f"class{'' if selection.balanced else ', or may do so'}; use --ratio {least:g} or more{reuse}."
        )
    if config.with_finals and config.given.proxy is None and (np.floor(selection.ratio * counts + 0.5) >= counts).all():
        raise ValueError(
            f"--ratio {selection.ratio:g} takes every image, so none is left for the verdict of the finals; lower it, "
            "or use --no-finals."
        )

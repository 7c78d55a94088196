"""The settings of a search: its flags and their presets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.cli import Flat, Invocation
from nas_kmix.engine.compute import DeviceConfig, cores
from nas_kmix.engine.data import DataConfig
from nas_kmix.engine.datasets import located
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.mixers import MixConfig
from nas_kmix.pipeline.one_search import SearchConfig
from nas_kmix.pipeline.scorer import ScorerConfig
from nas_kmix.pipeline.trial import FinalsConfig
from nas_kmix.proxy import ProxyConfig
from nas_kmix.scoring import ScoringConfig

ALL_IMAGES = Path("none")  # `--proxy none`: no proxy, search on all images


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
    """quick: digits, in a minute | cpu: small scorer, supernet | gpu: PC-DARTS's supernet at 16 px on one GPU |
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
    jobs: int = field(default_factory=lambda: min(8, cores()))
    """Child processes of one thread each that work side by side, for each process of torchrun; on CPUs the results are
    the same whatever the number. Default: this process's share of the cores, at most 8."""
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

    def located(self) -> Config:
        """The same config with absolute paths of --data and of the given file, for a record that is used elsewhere."""
        given = {  # names of published weights and proxies stay as they are
            flag: Path(os.path.abspath(path)) if path is not None and path.is_file() else path
            for flag, path in vars(self.given).items()
        }
        return replace(self, input=replace(self.input, data=located(self.input.data)), given=Given(**given))


PAPER_SCORING = ScoringConfig(loss="mixed", partners="fresh")
PAPER_SELECTION = ProxyConfig(measure="cv", method="interval", interval=4)  # SM Fig. 3

PRESETS: dict[str, Config] = {
    # Shows that everything works, in little more than a minute on two idle cores.
    "quick": Config(
        input=DataConfig(data="digits"),
        augmentation=Augmentation(flip=False, crop_padding=2),  # digits must not be mirrored
        scorer=ScorerConfig(
            "tiny", OptimConfig(epochs=15, batch_size=64, lr=0.1, schedule="cosine", weight_decay=1e-4),
            val_share=0.1,
        ),
        selection=ProxyConfig(ratio=0.2),
        search=SearchConfig(
            rest_steps=350, arch_steps=20, batch_size=8, search_size=8, lr=0.025, schedule="constant", channels=8,
            layers=3, edges_by="inputs", arch_lr=6e-3, record_every=5,
        ),
        finals=FinalsConfig(epochs=2, rungs=2, controls=2, channels=4, layers=5, batch_size=16),
        device=DeviceConfig(threads=1, channels_last=True),  # such small tensors gain nothing by a second thread
    ),
    # CIFAR-100 without a GPU, in about an hour of one idle thread, half of it for the finals. The scorer reaches 46 %
    # accuracy (studies/first_run). The architecture moves from just after the turn on (studies/search_quality), so that
    # everything before the finals takes 40 minutes.
    "cpu": Config(
        preset="cpu",
        input=DataConfig(data="cifar100"),
        scorer=ScorerConfig(
            "small", OptimConfig(epochs=20, batch_size=128, lr=0.1, schedule="cosine", weight_decay=1e-4),
            val_share=0.1,
        ),
        search=SearchConfig(
            rest_steps=1800, arch_steps=75, batch_size=32, search_size=16, lr=0.025, schedule="constant",
            edges_by="inputs", arch_lr=6e-3, record_every=25,
        ),
        finals=FinalsConfig(epochs=3, rungs=2, batch_size=32),
        device=DeviceConfig(channels_last=True),
    ),
    # CIFAR on one GPU: PC-DARTS's supernet, which sees 16 px, and a scorer that takes minutes.
    "gpu": Config(
        preset="gpu",
        input=DataConfig(data="cifar100"),
        scorer=ScorerConfig(
            "wrn16_8", OptimConfig(epochs=30, batch_size=128, lr=0.1, schedule="cosine", weight_decay=5e-4),
            val_share=0.1,
        ),
        search=SearchConfig(
            rest_steps=2000, arch_steps=100, batch_size=64, search_size=16, lr=0.025, schedule="constant",
            edges_by="inputs", arch_lr=6e-3, record_every=25, cuda_graphs=True,
        ),
        with_finals=False,
        device=DeviceConfig(channels_last=True),
    ),
    # PyramidNet-110 for 300 epochs (the paper's Table 1: 16.95 % top-1 error) and PC-DARTS for 50 (Table 5). For a GPU.
    "paper": Config(
        preset="paper", input=DataConfig(data="cifar100"), scoring=PAPER_SCORING, selection=PAPER_SELECTION,
        with_finals=False,
    ),
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
        scoring=PAPER_SCORING,
        selection=replace(PAPER_SELECTION, ratio=0.125, arch_share=0.2),
        search=SearchConfig(
            batch_size=1024, full_lr=0.5, full_batch=1024, partial=2, frozen_epochs=35, warmup_epochs=5, arch_lr=6e-3,
            arch_grad_clip=5.0,
        ),
        with_finals=False,
    ),
}  # fmt: skip

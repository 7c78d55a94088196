"""Search an architecture on a proxy dataset: images in, `genotype.json` out.

    python search.py --out runs/digits                                # handwritten digits, half a minute on two cores
    python search.py --preset cpu --data cifar100 --out runs/c100     # a small scorer and supernet
    python search.py --preset paper --data cifar100 --out runs/paper  # the paper's settings, for a GPU
    python search.py --preset paper --data cifar100 --stop-after proxy --export-list proxy.tsv

Four stages, each ending in one file that the next one reads: scorer.pt, scores.npz, proxy.json, genotype.json. The
same command again resumes or skips, stage by stage; --scorer, --scores and --proxy start later in the chain. Under
torchrun all processes train the scorer and score; then those but the first leave it to search on its device.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from darts_space import ARCHITECTURE_NAMES, BilevelConfig, Genotype, Search, SuperNet, scaled_lr
from darts_space.cell import GENOTYPE_EDGES
from darts_space.search_network import INPUT_MULTIPLES, check_shape
from nas_kmix.analysis.report import write_report_of_run
from nas_kmix.engine import cli, files
from nas_kmix.engine.data import Batch, DataConfig, ImageData, augment_batch, epoch_batches, load_data
from nas_kmix.engine.device import DeviceConfig, environment, pick_device
from nas_kmix.engine.distributed import is_main, joined
from nas_kmix.engine.meter import Meter
from nas_kmix.engine.progress import duration
from nas_kmix.engine.run import Run, StageMismatchError, check_key, stage_key
from nas_kmix.proxy import ProxyConfig, ProxyManifest, make_proxy, split_halves
from nas_kmix.scorer import ScorerConfig, load_scorer, train_scorer
from nas_kmix.scores import ScoreTable, verdict
from nas_kmix.scoring import ScoringConfig, score_stage, scoring_key

STAGES = ("scorer", "scoring", "selection", "search")
RESULTS = ("scorer.pt", "scores.npz", "proxy.json", "genotype.json", "genotypes.jsonl", "alphas.npz", "bad_images.txt")
COMPARED_BY = ("search/val_loss", "search/entropy_normal", "search/skips_normal")  # runs, in TensorBoard
WEIGHT_ORDER, ARCH_ORDER, WEIGHT_AUGMENT, ARCH_AUGMENT = 21, 22, 23, 24  # random streams
ALL_IMAGES = Path("none")  # what --proxy means by it
PICTURES = 5  # of the architecture, in TensorBoard over a search


@dataclass(frozen=True)
class SearchConfig:
    """The supernet and its bilevel search. Defaults are PC-DARTS's on CIFAR (Xu et al. 2020, section 4.2)."""

    epochs: int = 50
    batch_size: int = 256
    """Images per step and half; a smaller half is one batch."""
    lr: float | None = None
    """SGD's first learning rate. Default: 0.1 from batch 256 up (imagenet: 0.5 from 1024 up), in proportion below."""
    full_lr: Annotated[float, tyro.conf.Suppress] = 0.1
    full_batch: Annotated[int, tyro.conf.Suppress] = 256
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
    step_matched: bool = False
    """Give a proxy as many steps as the whole set would have had: the epochs grow by the ratio of their steps."""
    seeds: int = 1
    """Searches on the same proxy; genotype.json is then the one that shares most edges with the others."""

    def __post_init__(self):
        for name in ("batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")

    def _at_most_half(self, wanted: int | None) -> int | None:
        """Epochs of a preset for a long search, where `--epochs` cuts it short."""
        return wanted if wanted is None or wanted < self.epochs else self.epochs // 2

    def bilevel(self, amp: str) -> BilevelConfig:
        """The part that `darts_space` reads."""
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


Flat = tyro.conf.arg(name="")  # flags without a prefix: --epochs, not --search.epochs


@dataclass(frozen=True)
class Config:
    """Everything that can be set. `--preset` chooses the values shown here; other flags change single ones."""

    preset: Literal["quick", "cpu", "paper", "imagenet"] = "quick"
    """quick: digits in half a minute | cpu: a small scorer and supernet | paper: the paper's | imagenet: 224 px."""
    out: Path = Path("runs/search")
    """The run folder."""
    seed: int = 0
    """Of every stage. Data, proxy and genotype are functions of it."""
    stop_after: Literal["scorer", "scores", "proxy"] | None = None
    """End with that file."""
    scorer: Path | None = None
    """Use this scorer.pt of another run."""
    scores: Path | None = None
    """Use this scores.npz of another run on the same data."""
    proxy: Path | None = None
    """Use this proxy.json, made from any copy of the data; `none` searches on all images."""
    export_list: Path | None = None
    """Also write the proxy as lines `path-or-index, label, class name`, for other trainers."""
    fresh: bool = False
    """Remove what an earlier run left in --out and start over."""
    report: bool = True
    """Draw the architecture for TensorBoard during the search, and write the run as a page, report.html, at its end."""
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    training: Annotated[ScorerConfig, tyro.conf.arg(name="scorer")] = field(default_factory=ScorerConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    selection: Annotated[ProxyConfig, Flat] = field(default_factory=ProxyConfig)
    search: Annotated[SearchConfig, Flat] = field(default_factory=SearchConfig)
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)


PRESETS: dict[str, Config] = {
    # The embedded digits, which must not be mirrored.
    "quick": Config(
        input=DataConfig(data="digits", flip=False, crop_padding=2),
        training=ScorerConfig(backbone="tiny", epochs=15, batch_size=64, lr=0.1, schedule="cosine", weight_decay=1e-4),
        selection=ProxyConfig(ratio=0.2),
        search=SearchConfig(epochs=10, batch_size=32, channels=8, layers=5),
        device=DeviceConfig(channels_last=True),
    ),
    "cpu": Config(
        preset="cpu",
        input=DataConfig(data="cifar100"),
        training=ScorerConfig(
            backbone="small", epochs=20, batch_size=128, lr=0.1, schedule="cosine", weight_decay=1e-4
        ),
        search=SearchConfig(epochs=20, batch_size=64, channels=8, layers=5),
        device=DeviceConfig(channels_last=True),
    ),
    # PyramidNet-110 for 300 epochs and PC-DARTS for 50, as in the paper's Tables 1 and 5.
    "paper": Config(preset="paper", input=DataConfig(data="cifar100")),
    # PC-DARTS's ImageNet search (section 4.3): 10 % of each class for the weights, 2.5 % for the architecture. The
    # scorer is the paper's ResNet-50 (Table 3).
    "imagenet": Config(
        preset="imagenet",
        input=DataConfig(data="imagenet", image_size=224),
        training=ScorerConfig(
            backbone="resnet50", epochs=300, batch_size=256, lr=0.1, weight_decay=1e-4, milestones=(0.25, 0.5, 0.75),
            mix_k=3, mix_alpha=1 / 3,
        ),
        selection=ProxyConfig(ratio=0.125, arch_share=0.2),
        search=SearchConfig(
            batch_size=1024, full_lr=0.5, full_batch=1024, partial=2, frozen_epochs=35, warmup_epochs=5, arch_lr=6e-3,
            arch_grad_clip=5.0,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a run ended with; later stages are None where `--stop-after` cut it short."""

    folder: Path
    table: ScoreTable | None = None
    proxy: ProxyManifest | None = None
    genotype: Genotype | None = None


def run(config: Config) -> Result:
    """Go through the stages in `config.out`, skipping those whose file is there and fits.

    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, NonFiniteLossError, OSError.
    """
    _check_flags(config)
    config = replace(
        config,
        training=replace(config.training, seed=config.seed),
        scoring=replace(config.scoring, seed=config.seed),
        selection=replace(config.selection, seed=config.seed),
    )
    device = pick_device(config.device)
    options = {"amp": config.device.amp, "channels_last": config.device.channels_last, "compared_by": COMPARED_BY}
    with joined(device) as world, Run(config.out, stages=STAGES, device=device, world=world, **options) as folder:
        data = load_data(config.input, device=device, workers=config.device.workers)
        _check_search(config, data)
        if config.fresh:
            folder.clear((*RESULTS, "report.html", *(f"seed-*/{name}" for name in RESULTS)))
        folder.records = {"config.json": asdict(config), "env.json": environment(device)}
        folder.say(
            f"{data.source.name}: {len(data)} training images of {data.num_classes} classes, "
            f"{data.image_size} px, {'resident' if data.resident else 'streamed'} on {device}"
        )
        try:
            result = _stages(config, data, folder)
            folder.keep_records()
            folder.write_cost()
            _list_bad_images(data, folder)
            if config.report and folder.world.main and (folder.started or _report_is_old(folder)):
                folder.say(write_report_of_run(folder.folder, data))
            return result
        except BaseException:
            if folder.started:  # a refused command leaves the folder as it was
                _list_bad_images(data, folder)
            raise


def _uses_scores(config: Config) -> bool:
    return config.proxy is None and (config.selection.method != "random" or config.stop_after in ("scorer", "scores"))


def _stages(config: Config, data: ImageData, folder: Run) -> Result:
    """Scorer, scores, proxy, genotype: each given, found or made, until `--stop-after`."""
    result = Result(folder.folder)
    if _uses_scores(config):
        scorer = _scorer(config, data, folder) if config.scores is None else None
        if config.stop_after == "scorer":
            return result
        result = replace(result, table=_scores(config, data, scorer, folder))
        if config.stop_after == "scores":
            return result
    if not folder.go_on_alone():
        return result
    if config.proxy is not None and (flags := _without_effect(config)):
        folder.say(f"the proxy is given by --proxy {config.proxy}, so there is no effect of {', '.join(flags)}")
    if config.proxy == ALL_IMAGES:
        share = config.selection.arch_share
        weights, arch = split_halves(data.good(), data.labels[data.good()], share, seed=config.seed)
        halves = Halves(weights, arch, identity=f"all images, arch_share {share}")
        return replace(result, genotype=_searches(config, data, halves, folder))
    if config.proxy is None:
        proxy = _selection(config, data, result.table, folder)
    else:
        proxy = _given_proxy(config.proxy, data, folder)
    if config.export_list is not None:
        proxy.export_list(config.export_list)
    result = replace(result, proxy=proxy)
    if config.stop_after == "proxy":
        return result
    halves = Halves(proxy.weights, proxy.arch, identity=proxy.hash())
    return replace(result, genotype=_searches(config, data, halves, folder))


Scorer = tuple[torch.nn.Module, ImageData]  # the network, and the images normalised as it was trained with


# -- images to proxy ---------------------------------------------------------------------------------------------------


def _scorer(config: Config, data: ImageData, folder: Run) -> Scorer:
    """The trained scorer: given, found, or trained now."""
    if config.scorer is not None:
        scorer = load_scorer(config.scorer, data, run=folder)
        _adopt(config.scorer, ("scorer",), folder)
        return scorer
    path = folder.path("scorer.pt")
    settings = {**asdict(config.training), **_augmentation(config)}
    key = stage_key("scorer", settings, {"data": data.fingerprint})
    if path.exists():
        scorer = load_scorer(path, data, run=folder, key=key)
        folder.remove_checkpoint("scorer")  # of a run that was killed between the two
        folder.say(f"scorer: {path} fits, skipped")
        return scorer
    return train_scorer(data, config.training, config.input, run=folder, key=key, path=path), data


def _scores(config: Config, data: ImageData, scorer: Scorer | None, folder: Run) -> ScoreTable:
    """The table of scores: given, found, or computed now by `scorer`."""
    if config.scores is not None:
        table = ScoreTable.load(config.scores)
        if not table.belongs_to(data):
            raise ValueError(f"--scores {config.scores} was made from other data than --data; score these images anew.")
        data.bad.update(table.bad)
        _adopt(config.scores, ("scorer", "scoring"), folder)
        return table
    model, view = scorer
    path = folder.path("scores.npz")
    if path.exists():
        table = ScoreTable.load(path)
        check_key(path, table.key, scoring_key(model, view, config.scoring))
        if not table.belongs_to(data):
            raise ValueError(f"{path} is damaged: it has other images than --data; remove it.")
        data.bad.update(table.bad)
        folder.remove_checkpoint("scoring")  # of a run that was killed between the two
        folder.say(f"scoring: {path} fits, skipped")
        return table
    return score_stage(model, view, config.scoring, run=folder, path=path)


def _selection(config: Config, data: ImageData, table: ScoreTable | None, folder: Run) -> ProxyManifest:
    """The proxy of these scores: found, or selected now."""
    path = folder.path("proxy.json")
    inputs = {"data": data.fingerprint, "scores": None if table is None else table.hash()}
    key = stage_key("selection", asdict(config.selection), inputs)
    if path.exists():
        proxy = ProxyManifest.load(path)
        check_key(path, proxy.key(), key)
        folder.say(f"selection: {path} fits, skipped")
        return proxy
    with folder.stage("selection"):
        proxy = make_proxy(data, table, config.selection)
        proxy.save(path)
    folder.say(f"selection: {len(proxy.indices)} images, {len(proxy.weights)} for weights, {len(proxy.arch)} for alpha")
    many = np.bincount(data.labels, minlength=data.num_classes) > 1
    single = np.flatnonzero(many & (np.bincount(proxy.labels, minlength=data.num_classes) == 1))
    if len(single):
        folder.say(
            f"warning: {len(single)} classes have a single image in the proxy, which goes to the weights "
            f"(first: {data.class_names[single[0]]}); a larger --ratio gives the architecture some too"
        )
    return proxy


def _given_proxy(path: Path, data: ImageData, folder: Run) -> ProxyManifest:
    proxy = ProxyManifest.load(path).apply(data)
    _adopt(path, ("scorer", "scoring", "selection"), folder)
    return proxy


def _adopt(given: Path, stages: tuple[str, ...], folder: Run) -> None:
    """Bill a result of another run with what it cost there."""
    if given.parent.resolve() == folder.folder.resolve():
        return
    if not folder.adopt_costs(given.parent / "cost.json", stages):
        folder.say(f"warning: {given.parent} has no readable cost.json, so what {given.name} cost is not billed here")


def _augmentation(config: Config) -> dict[str, Any]:
    return {"flip": config.input.flip, "crop_padding": config.input.crop_padding}


# -- proxy to genotype -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """Which images train the weights and which the architecture: int64, sorted; `identity` tells proxies apart."""

    weights: np.ndarray
    arch: np.ndarray
    identity: str

    def __post_init__(self):
        if len(self.weights) == 0 or len(self.arch) == 0:
            raise ValueError("The proxy leaves no image for the architecture; raise --ratio or --arch-share.")


@dataclass(frozen=True)
class Job:
    """What the searches of a run share."""

    config: Config
    settings: SearchConfig
    data: ImageData
    halves: Halves
    folder: Run


def _searches(config: Config, data: ImageData, halves: Halves, folder: Run) -> Genotype:
    """One search, or `--seeds` of them and the genotype that is most like the others."""
    settings = config.search
    if settings.step_matched:
        weight_share = len(halves.weights) / (len(halves.weights) + len(halves.arch))
        steps_of_all = math.ceil(len(data.good()) * weight_share / settings.batch_size)
        factor = steps_of_all / math.ceil(len(halves.weights) / settings.batch_size)
        settings = replace(settings, epochs=round(settings.epochs * factor))
    identity = {**asdict(settings.bilevel("off")), **_augmentation(config)}
    for name in ("channels", "layers", "partial", "edge_normalisation", "batch_size", "seeds"):
        identity[name] = getattr(settings, name)
    key = stage_key("search", {**identity, "seed": config.seed}, {"data": data.fingerprint, "proxy": halves.identity})
    job = Job(config, settings, data, halves, folder)
    if settings.seeds == 1:
        return _one_search(job, key, subfolder="")
    path = folder.path("genotype.json")
    if (genotype := _found_genotype(path, key, folder)) is not None:
        return genotype
    genotypes = []
    for i in range(settings.seeds):
        key_of_one = {**key, "config": {**key["config"], "seeds": 1, "seed": config.seed + i}}
        genotypes.append(_one_search(job, key_of_one, subfolder=f"seed-{i}/"))
    shared = [sum(one.shared_edges(other) for other in genotypes) - GENOTYPE_EDGES for one in genotypes]
    chosen = int(np.argmax(shared))
    mean = shared[chosen] / (settings.seeds - 1)
    folder.say(
        f"seeds: seed-{chosen} shares {mean:.1f} of its {GENOTYPE_EDGES} edges with each of the others, the most of all"
    )
    genotypes[chosen].save(path, provenance={**key, "chosen": f"seed-{chosen}", "shared_edges": shared})
    return genotypes[chosen]


def _found_genotype(path: Path, key: dict[str, Any], folder: Run) -> Genotype | None:
    """The genotype of an earlier run with the same key, None where there is none."""
    if not path.exists():
        return None
    genotype = Genotype.load(path)
    check_key(path, files.read_json(path).get("provenance"), key)
    folder.say(f"search: {path} fits, skipped")
    return genotype


def _one_search(job: Job, key: dict[str, Any], *, subfolder: str) -> Genotype:
    """The genotype of one seed: found, or searched now."""
    path = job.folder.path(f"{subfolder}genotype.json")
    stage = f"search/{subfolder[:-1]}" if subfolder else "search"
    if (genotype := _found_genotype(path, key, job.folder)) is None:
        genotype = _search(job, key, stage=stage, subfolder=subfolder)
        genotype.save(path, provenance=key)
    for name in ("genotypes.jsonl", "alphas.npz"):
        if not path.with_name(name).exists():
            job.folder.say(f"warning: {path.with_name(name)} is gone; remove {path.name} to search anew and get both")
    job.folder.remove_checkpoint(stage.replace("/", "-"))
    return genotype


def _search(job: Job, key: dict[str, Any], *, stage: str, subfolder: str) -> Genotype:
    """Search with the seed in `key`, from the start or a checkpoint. The genotype is the one after the last epoch."""
    settings, data, halves, folder = job.settings, job.data, job.halves, job.folder
    seed = key["config"]["seed"]
    bilevel = settings.bilevel(job.config.device.amp)
    search = Search(folder.layout(_supernet(settings, data, seed).to(folder.device)), bilevel)
    history: list[dict[str, Any]] = []
    meter = Meter(folder.device)
    first_epoch = first_step = 0
    checkpoint = stage.replace("/", "-")
    with folder.resumed(checkpoint, key) as state:
        if state is not None:
            search.load_state_dict(state["search"])
            meter.load_state_dict(state["meter"])
            history, first_epoch, first_step = list(state["history"]), int(state["epoch"]), int(state["step"])

    def save(epoch: int, step: int) -> None:
        meter.check(stage, epoch)
        state = {"search": search.state_dict(), "meter": meter.state_dict(), "history": history}
        folder.save_checkpoint(checkpoint, key, {**state, "epoch": epoch, "step": step})

    steps = math.ceil(len(halves.weights) / settings.batch_size)
    arch_batch = min(settings.batch_size, len(halves.arch))
    progress = folder.progress(stage, steps * settings.epochs, done=first_epoch * steps + first_step)
    with folder.stage("search") as cost:
        for epoch in range(first_epoch, settings.epochs):
            search.start_epoch(epoch)
            weight_plan = epoch_batches(halves.weights, settings.batch_size, steps, seed=(seed, WEIGHT_ORDER, epoch))
            arch_plan = epoch_batches(halves.arch, arch_batch, steps, seed=(seed, ARCH_ORDER, epoch))
            if search.frozen:
                arch_plan = [indices[:0] for indices in arch_plan]  # not looked at, so not read either
            batches = zip(data.batches(weight_plan[first_step:]), data.batches(arch_plan[first_step:]), strict=True)
            for step, (train, val) in enumerate(batches, start=first_step):
                result = search.step(
                    _prepare(train, job, [seed, WEIGHT_AUGMENT, epoch, step]),
                    None if search.frozen else _prepare(val, job, [seed, ARCH_AUGMENT, epoch, step]),
                )
                n = len(train.labels)
                meter.add(step, n, loss=result.train_loss * n, accuracy=result.train_correct)
                if result.val_loss is not None:
                    meter.add(step, len(val.labels), val_loss=result.val_loss * len(val.labels))
                passes = n * (4 if bilevel.unrolled and not search.frozen else 1) + len(val.labels)
                cost.images_forward += passes
                cost.images_backward += passes
                progress.update(note=f"epoch {epoch + 1}/{settings.epochs}{meter.note(stage, epoch, step)}")
                if folder.checkpoint_due() and step + 1 < steps:
                    save(epoch, step + 1)
                    folder.raise_if_stopping()
            meter.check(stage, epoch)
            history.append(_record(search, epoch))
            _write_history(history, folder, subfolder)
            folder.log(stage, epoch, lr=search.lr, **meter.means(), **history[-1]["diagnostics"])
            if job.config.report and (epoch + 1 == settings.epochs or epoch % max(1, settings.epochs // PICTURES) == 0):
                _log_pictures(search, history, stage, folder)
            meter, first_step = Meter(folder.device), 0
            save(epoch + 1, 0)
            folder.raise_if_stopping()
        genotype = search.model.genotype()
        _warn_of_collapse(genotype, folder)
    progress.close()
    return genotype


def _supernet(settings: SearchConfig, data: ImageData, seed: int) -> SuperNet:
    return SuperNet(
        settings.channels,
        data.num_classes,
        settings.layers,
        settings.partial,
        data.stem,
        settings.edge_normalisation,
        generator=torch.Generator().manual_seed(seed),
    )


def _prepare(batch: Batch, job: Job, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented float images and labels."""
    if len(batch.labels) == 0:
        first = next(iter(job.data.bad.values()), "")
        raise ValueError(f"{job.data.source.name}: not one file of a batch can be read any more; the first is {first}")
    images = augment_batch(batch.images, job.data, job.config.input, rng=np.random.default_rng(seed))
    return job.folder.layout(images), batch.labels


def _record(search: Search, epoch: int) -> dict[str, Any]:
    """What the log keeps of an epoch: the genotype after it, how sure that is, and the tables it came from."""
    tables = {name: getattr(search.model, name).detach().cpu().clone() for name in ARCHITECTURE_NAMES}
    diagnostics = search.model.diagnostics()._asdict()
    genotype = json.dumps(search.model.genotype().to_json())
    return {"epoch": epoch, "genotype": genotype, "diagnostics": diagnostics, "tables": tables}


def _log_pictures(search: Search, history: list[dict[str, Any]], stage: str, folder: Run) -> None:
    from nas_kmix.analysis import live  # matplotlib takes a while to import

    for name, pixels in live.pictures([row["tables"] for row in history], search.model.genotype()).items():
        folder.log_picture(stage, history[-1]["epoch"], name, pixels)


def _write_history(history: list[dict[str, Any]], folder: Run, subfolder: str) -> None:
    """Write `genotypes.jsonl`, a line per epoch, and `alphas.npz`, the four tables stacked over the epochs."""
    lines = [
        json.dumps(
            {
                "epoch": row["epoch"],
                **row["diagnostics"],
                "collapsed": Genotype.from_json(json.loads(row["genotype"])).collapsed,
                "genotype": json.loads(row["genotype"]),
            }
        )
        for row in history
    ]
    files.write_text(folder.path(f"{subfolder}genotypes.jsonl"), "\n".join(lines) + "\n")
    stacked = {name: np.stack([row["tables"][name].numpy() for row in history]) for name in ARCHITECTURE_NAMES}
    files.write_npz(folder.path(f"{subfolder}alphas.npz"), stacked)


def _warn_of_collapse(genotype: Genotype, folder: Run) -> None:
    if genotype.collapsed:
        folder.say(
            f"warning: {genotype.skip_connections()[0]} of the 8 operations of the normal cell are skip connections; "
            f"the search may have collapsed. Fewer epochs, a lower --lr or more data (--ratio) help."
        )


# -- around the stages -------------------------------------------------------------------------------------------------


def _check_flags(config: Config) -> None:
    """Refuse flags that contradict each other."""
    order = ("scorer", "scores", "proxy")
    given = [flag for flag in order if getattr(config, flag) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both start the chain; give the later one only.")
    if config.proxy == ALL_IMAGES and (config.stop_after is not None or config.export_list is not None):
        flag = "--stop-after" if config.stop_after is not None else "--export-list"
        raise ValueError(f"--proxy none makes no proxy, so {flag} means nothing with it; leave one of them out.")
    if given and config.stop_after is not None and order.index(config.stop_after) < order.index(given[0]):
        raise ValueError(f"--{given[0]} starts after --stop-after {config.stop_after}; leave one of them out.")
    if config.selection.method == "random" and given in (["scorer"], ["scores"]):
        raise ValueError(
            f"--method random uses no scores, so --{given[0]} means nothing with it; leave one of them out."
        )
    if config.export_list is not None and config.stop_after in ("scorer", "scores"):
        raise ValueError(f"--export-list needs a proxy, but --stop-after {config.stop_after} ends before there is one.")
    for flag in given:
        path = getattr(config, flag)
        if path != ALL_IMAGES and not path.is_file():
            raise ValueError(f"--{flag} {path}: there is no such file.")
        if config.fresh and path.parent.resolve() == config.out.resolve():
            raise ValueError(
                f"--fresh would remove the file of --{flag}; leave one of them out, or take another --out."
            )
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2**63, not {config.seed}.")


def _without_effect(config: Config) -> list[str]:
    """The selection's flags that were changed although the proxy is given; all images are still divided into halves."""
    preset = PRESETS[config.preset].selection
    used = {"seed", "arch_share"} if config.proxy == ALL_IMAGES else {"seed"}
    names = [f.name for f in fields(preset) if f.name not in used]
    changed = [name for name in names if getattr(config.selection, name) != getattr(preset, name)]
    return [f"--{name.replace('_', '-')}" for name in changed]


def _check_search(config: Config, data: ImageData) -> None:
    """Refuse what the last stage would refuse before the first one has spent hours."""
    scores_anew = _uses_scores(config) and config.scores is None and config.stop_after != "scorer"
    if scores_anew and config.scoring.k > len(data):
        raise ValueError(f"--scoring.k {config.scoring.k} images cannot be mixed: --data has {len(data)}.")
    if config.stop_after is not None:
        return
    check_shape(config.search.channels, config.search.layers, config.search.partial, data.stem)
    multiple = INPUT_MULTIPLES[data.stem]
    if data.image_size % multiple:
        nearest = max(multiple, round(data.image_size / multiple) * multiple)
        raise ValueError(
            f"The supernet halves its images several times, so {data.image_size} px must be a multiple of {multiple}; "
            f"use --image-size {nearest}."
        )
    config.search.bilevel(config.device.amp)  # checks its values


def _report_is_old(folder: Run) -> bool:
    """Whether there is none, or one that was written before the results that it should show."""
    report = folder.path("report.html")
    results = [path for path in map(folder.path, RESULTS) if path.exists() and path.suffix != ".txt"]
    return not report.exists() or any(path.stat().st_mtime > report.stat().st_mtime for path in results)


def _list_bad_images(data: ImageData, folder: Run) -> None:
    if data.bad and folder.world.main:
        path = folder.path("bad_images.txt")
        files.write_text(path, "".join(f"{data.bad[index]}\n" for index in sorted(data.bad)))
        folder.say(f"warning: {len(data.bad)} files cannot be read and are left out; they are listed in {path}")


def _reliability(table: ScoreTable, measure: str) -> str:
    value, draws = table.reliability(measure), table.losses.shape[1]
    if math.isnan(value):
        return f"unknown: {draws} draws of {len(table.index)} images are too few, or their {measure} is all the same"
    name = measure.upper() if measure == "cv" else measure
    return (
        f"{value:.2f} of the {name} ranking over {draws} draws "
        f"({verdict(value)}; new draws would repeat a ranking of 1.00)"
    )


def _summary(config: Config, result: Result, argv: Sequence[str]) -> str:
    """The last lines of a run."""
    lines = []
    folder = result.folder
    if result.genotype is not None:
        lines += [result.genotype.to_text(), f"genotype     {folder / 'genotype.json'}"]
    if result.proxy is not None and config.proxy is None:
        lines.append(f"proxy        {folder / 'proxy.json'}, {len(result.proxy.indices)} of {result.proxy.n} images")
    if result.table is not None:
        lines.append(f"reliability  {_reliability(result.table, config.selection.measure)}")
    costs = files.read_json(folder / "cost.json")
    parts = [f"{name} {duration(cost['wall_s'])}" for name, cost in costs["stages"].items() if cost["wall_s"] > 0]
    lines.append(f"cost         {duration(costs['total']['wall_s'])} ({', '.join(parts)})")
    if result.genotype is not None:
        picture = ["--picture", str(folder / "cells.png")]
        next_command = ["-m", "nas_kmix.analysis.cells", str(folder / "genotype.json"), *picture]
    elif result.proxy is not None:
        proxy = folder / "proxy.json" if config.proxy is None else config.proxy
        next_command = ["search.py", *_rest_of(argv), "--proxy", str(proxy), "--out", f"{folder}-search"]
    else:
        return "\n".join(lines)
    lines.append(f"next         python {shlex.join(next_command)}")
    return "\n".join(lines)


def _rest_of(argv: Sequence[str]) -> list[str]:
    """The flags of a command that ended with its proxy, without those that a search on it replaces."""
    replaced = ("--stop-after", "--export-list", "--out", "--scorer", "--scores", "--proxy")
    rest, skip = [], False
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        flag = flag.replace("_", "-")  # tyro takes both
        if skip:
            skip = False
        elif flag in replaced:
            skip = not equals  # its value follows
        elif argument != "--fresh":
            rest.append(argument)
    return rest


REUSE = {"scoring": ("scorer", "scorer.pt"), "selection": ("scores", "scores.npz"), "search": ("proxy", "proxy.json")}


def _remedy(config: Config, error: StageMismatchError) -> str:
    """How to go on where a file of other settings is in the way, keeping the stages before it."""
    flag, name = REUSE.get(error.stage, ("", ""))
    given = getattr(config, flag, None) if flag else None
    earlier = given or config.out / name
    reuse = f" --{flag} {earlier}" if flag and earlier.exists() else ""
    return (
        f"Start over with --fresh, or keep it: the same command with --out {config.out}-2{reuse}"
        f"{' reuses the stages before it' if reuse else ''}."
    )


def parse(argv: Sequence[str]) -> Config:
    return cli.parse(PRESETS, argv, __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and turn every expected failure into one sentence. Exit codes: 0, 1, 2 (bad usage), 130 and 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    config = None

    def work() -> None:
        nonlocal config
        config = parse(argv)
        result = run(config)
        if is_main():
            print(_summary(config, result, argv))

    return cli.exit_code(work, lambda error: _remedy(config, error))


if __name__ == "__main__":
    sys.exit(main())

"""Train or evaluate the network of a genotype, or a backbone: images in, `last.pt`, `best.pt` and `metrics.csv` out.

    python train_eval.py --genotype runs/digits/genotype.json --out runs/digits-net      # digits, a minute on a laptop
    python train_eval.py --preset cpu --genotype PC_DARTS_cifar --data cifar100 --out runs/net
    python train_eval.py --preset cifar --genotype runs/c100/genotype.json --data cifar100 --out runs/full  # for a GPU
    python train_eval.py --preset imagenet --genotype PC_DARTS_image --data /data/imagenet --max-macs 600M --out runs/in
    python train_eval.py --preset pyramidnet110-cifar100-dcutmix --out runs/cell  # a cell of the paper's tables
    python train_eval.py --eval-only runs/net/best.pt --data cifar100

The same command again resumes. `best.pt` is the epoch with the highest accuracy on the split `val`, or on a held-out
share of the training images where there is none; test images are only reported on. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from darts_space import CifarNetwork, ImageNetNetwork, build_network, cost, parse_macs, read_genotype, widest
from darts_space.checkpoint import FORMAT as NETWORK_FORMAT
from nas_kmix.analysis.classifiers import Classifier, load_classifier
from nas_kmix.analysis.report import write_report_of_run
from nas_kmix.backbones import Drop, build_backbone
from nas_kmix.engine import cli, files
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.data import DataConfig, ImageData, Preparation, load_data, prepared_for_evaluation
from nas_kmix.engine.device import DeviceConfig, environment, pick_device
from nas_kmix.engine.distributed import World, is_main, joined
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.export import export_model
from nas_kmix.engine.learner import Recipe
from nas_kmix.engine.progress import Progress
from nas_kmix.engine.run import Run, stage_key
from nas_kmix.engine.sources import splits_of
from nas_kmix.engine.training import TrainConfig, Trained, Validation, train
from nas_kmix.mixers import MixName, make_mix
from nas_kmix.presets import PAPER
from nas_kmix.proxy import split_halves
from nas_kmix.scorer import FORMAT as BACKBONE_FORMAT

STAGES = ("train", "evaluation")
RESULTS = ("last.pt", "best.pt", "result.json", "bad_images.txt", "report.html")
SMALLEST = {kind.kind: kind.minimum_size for kind in (CifarNetwork, ImageNetNetwork)}  # px that they take
COMPARED_BY = ("train/val_accuracy", "train/test_accuracy")  # runs, in TensorBoard


@dataclass(frozen=True)
class NetworkConfig:
    """What is trained. The defaults are PC-DARTS's on CIFAR (Xu et al. 2020, section 4.2)."""

    genotype: str | None = None
    """A file (JSON or legacy text), the name of a published genotype, or the text itself."""
    backbone: str | None = None
    """Instead of a genotype: a network of `nas_kmix.backbones`, e.g. pyramidnet110."""
    stochastic_depth: float = 0.0
    """Of a backbone: probability that a batch skips the last residual path, linear over the depth (Huang et al.)."""
    drop_block: float = 0.0
    """Of a backbone: probability that a value of the last stage is dropped, in squares (Ghiasi et al.)."""
    block_size: int = 3
    """Side of those squares in pixels, odd."""
    channels: int = 36
    """Width of the first cell's nodes."""
    layers: int = 20
    """Cells."""
    auxiliary: bool = True
    """Train with a second classifier on the cell at two thirds of the depth."""
    max_macs: str | None = None
    """Take the most channels, an even number, that cost at most so many multiply-adds, e.g. 600M."""
    macs_convention: Literal["strict", "published"] = "strict"
    """How --max-macs counts: convolutions and linear layers, or BatchNorms and ReLUs too as in the papers' tables."""


@dataclass(frozen=True)
class TrainingConfig(TrainConfig):
    """SGD, its schedule and the mixing of images."""

    mix: MixName = "none"
    """dmixup, dcutmix and saliency_dcutmix mix K images; mixup, cutmix and manifold_mixup are their rivals of two."""
    mix_k: int = 5
    """Images in a mix, at least 2; the rivals have two."""
    mix_alpha: float = 0.2
    """Concentration of the Dirichlet distribution that the shares are drawn from, of the rivals' Beta distribution."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""


Flat = tyro.conf.arg(name="")  # flags without a prefix: --epochs, not --training.epochs


@dataclass(frozen=True)
class Config:
    """Everything that can be set. `--preset` chooses the values shown here; other flags change single ones."""

    preset: str = "quick"
    """quick: digits in a minute | cpu: small and short | cifar, imagenet: PC-DARTS's, for GPUs | a cell of the paper's
    tables, e.g. pyramidnet110-cifar100-dcutmix; an unknown name lists them all."""
    out: Path = Path("runs/train")
    """The run folder."""
    seed: int = 0
    """Of the weights, the order of the images, their augmentation, and which ones are held out."""
    val_share: float = 0.1
    """Share of each class's training images to hold out where the data has no split `val`; 0 chooses no best epoch."""
    train_images: int | None = None
    """Train on so many images only, drawn by class from those that are not held out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    fresh: bool = False
    """Remove what an earlier run left in --out and start over."""
    skip_bad: bool = False
    """Leave out image files that cannot be read, count and list them; otherwise the first one ends the command."""
    report: bool = True
    """Write the run as a page, report.html, at its end."""
    eval_only: Path | None = None
    """Evaluate this last.pt, best.pt or scorer.pt on the splits val and test of --data, and train nothing."""
    export: Path | None = None
    """Also write the network there as a torch.export program for batches of any size."""
    network: Annotated[NetworkConfig, Flat] = field(default_factory=NetworkConfig)
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    training: Annotated[TrainingConfig, Flat] = field(default_factory=TrainingConfig)
    recipe: Annotated[Recipe, Flat] = field(default_factory=Recipe)
    sync_batchnorm: bool = False
    """Under torchrun, take BatchNorm's statistics over the batches of all processes."""
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)


PRESETS: dict[str, Config] = {
    # The embedded digits, which must not be mirrored.
    "quick": Config(
        network=NetworkConfig(channels=4, layers=5),
        input=DataConfig(data="digits", flip=False, crop_padding=2),
        training=TrainingConfig(epochs=5, batch_size=32, lr=0.1, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(grad_clip=5.0),
        device=DeviceConfig(channels_last=True),
    ),
    # To compare genotypes on a laptop: too short for drop-path and cutout to help.
    "cpu": Config(
        preset="cpu",
        network=NetworkConfig(channels=8, layers=8),
        input=DataConfig(data="cifar100"),
        training=TrainingConfig(epochs=15, batch_size=64, lr=0.1, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(grad_clip=5.0),
        device=DeviceConfig(channels_last=True),
    ),
    # PC-DARTS section 4.2. Expect 2.57 +- 0.07 % test error on CIFAR-10 with PC_DARTS_cifar (its Table 1), which trains
    # on all images: --val-share 0.
    "cifar": Config(
        preset="cifar",
        input=DataConfig(data="cifar10"),
        training=TrainingConfig(epochs=600, batch_size=96, lr=0.025, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(nesterov=False, grad_clip=5.0, cutout=16, drop_path=0.3),
    ),
    # PC-DARTS section 4.3. Expect 24.2 % top-1 error with PC_DARTS_image, 25.1 % with PC_DARTS_cifar (its Table 2).
    "imagenet": Config(
        preset="imagenet",
        network=NetworkConfig(channels=48, layers=14),
        input=DataConfig(data="imagenet", image_size=224, max_resident_gb=0.0),  # crops of whole photographs
        training=TrainingConfig(epochs=250, batch_size=1024, lr=0.5, schedule="linear", weight_decay=3e-5),
        recipe=Recipe(
            nesterov=False, warmup_epochs=5, grad_clip=5.0, label_smoothing=0.1, color_jitter=(0.4, 0.4, 0.4, 0.2)
        ),
    ),
}
PRESETS |= {  # the paper's Tables 1-3; as there, all training images are trained on and no epoch is chosen
    name: Config(
        preset=name,
        val_share=0.0,
        network=NetworkConfig(**cell.network),
        input=DataConfig(**cell.input),
        training=TrainingConfig(**cell.training),
        recipe=Recipe(**cell.recipe),
    )
    for name, cell in PAPER.items()
}


@dataclass(frozen=True)
class Part:
    """Some images of a split."""

    data: ImageData
    indices: np.ndarray


Evaluated = dict[str, Part]  # by the name of the split, val before test


def run(config: Config) -> dict[str, Any]:
    """Train or evaluate, and return what the last line of the output says.

    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, NonFiniteLossError, OSError.
    """
    _check_flags(config)
    device = pick_device(config.device)
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError(f"--sync-batchnorm needs CUDA devices, this is {device.type}; leave it out.")
    with joined(device) as world:
        return _run(config, device, world)


def _run(config: Config, device: torch.device, world: World) -> dict[str, Any]:
    if config.training.mix == "manifold_mixup" and world.size > 1:
        raise ValueError("--mix manifold_mixup mixes a batch within one forward pass; train it with a single process.")
    options = {"amp": config.device.amp, "channels_last": config.device.channels_last}
    folder = Run(
        config.out, stages=STAGES, device=device, checkpoints=".", compared_by=COMPARED_BY, world=world, **options
    )
    if config.eval_only is not None:
        return _evaluate_checkpoint(config, folder)
    data = load_data(config.input, device=device, workers=config.device.workers)
    _refuse_bad(config, data)
    with folder:
        smallest = 0 if config.network.genotype is None else SMALLEST[data.stem]
        if data.image_size < smallest:
            raise ValueError(
                f"The images are of {data.image_size} px, but a genotype's {data.stem} network takes {smallest} or "
                f"more; use --image-size {smallest}."
            )
        training, evaluated = _divide(config, data)
        model = _build(config, data)
        result = {"network": _describe(model, config, data), "seed": config.seed, **cost(model, data.image_size)}
        if config.fresh:
            folder.clear(RESULTS)
        folder.records = {"config.json": asdict(config), "env.json": environment(device)}
        if config.preset in PAPER:
            folder.say(f"the paper's {PAPER[config.preset].doc}")
        folder.say(
            f"{data.source.name}: {len(training.indices)} training images of {data.num_classes} classes, "
            f"{data.image_size} px, {'resident' if data.resident else 'streamed'} on {device}; "
            f"{result['params_without_aux']:,} parameters, {result['macs']:,} multiply-adds"
        )
        if config.sync_batchnorm and world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        bad = BadFiles((training.data, *(part.data for part in evaluated.values())), world)
        trained = _train(config, model, training, evaluated, bad, folder)
        folder.keep_records()
        folder.write_cost()
        result |= {"epochs": config.training.epochs, "train_images": len(training.indices)}
        result |= {"last": trained.last, "best": trained.best, **_speed(folder), "folder": str(config.out)}
        result |= {"bad_images": (count := _list_bad(bad, folder))}
        if count:
            folder.say(f"warning: {count} files cannot be read and were left out; bad_images.txt lists them")
        if world.main:
            files.write_json(folder.path("result.json"), result)
        if config.export is not None and world.main:
            export_model(trained.model, _examples(data, training.indices), config.export)
        if config.report and world.main:
            folder.say(write_report_of_run(folder.folder, data))
        return result


def _train(
    config: Config, model: nn.Module, training: Part, evaluated: Evaluated, bad: BadFiles, folder: Run
) -> Trained:
    """The supervised loop with this command's settings, and checkpoints that describe themselves."""
    data, recipe = training.data, config.recipe
    if config.network.backbone is not None:
        recipe = replace(recipe, drop_path=0.0)  # it has no paths to drop
    network = _describe(model, config, data)
    settings = {
        **asdict(config.training),
        **asdict(recipe),
        "network": network,
        "seed": config.seed,
        **{name: getattr(config, name) for name in ("val_share", "train_images", "eval_every")},
        **{name: getattr(config.input, name) for name in ("flip", "crop_padding")},
        **{name: getattr(config.network, name) for name in ("stochastic_depth", "drop_block", "block_size")},
    }
    photographs = not data.resident and data.stem == "imagenet"
    if photographs:
        settings["crops"] = "photographs"
    fingerprints = {name: part.data.fingerprint for name, part in evaluated.items()}
    content = {
        "format": BACKBONE_FORMAT if config.network.genotype is None else NETWORK_FORMAT,
        "network": network,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
    }

    def measure(model: nn.Module) -> dict[str, float]:
        with folder.stage("evaluation") as cost:
            cost.images_forward += sum(len(part.indices) for part in evaluated.values())
            metrics = _measure(model, evaluated, folder)
            _list_bad(bad, folder)
            return metrics

    return train(
        folder.layout(model.to(folder.device)),
        data,
        replace(config.training, seed=config.seed),
        config.input,
        mix=make_mix(config.training, data.num_classes, model),
        run=folder,
        stage="train",
        key=stage_key("train", settings, {"data": data.fingerprint, **fingerprints}),
        recipe=recipe,
        indices=training.indices,
        validation=Validation(measure, "val_accuracy" if "val" in evaluated else None, config.eval_every),
        checkpoint="last",
        content=content,
        bad=bad,
        photographs=photographs,
    )


# -- images ------------------------------------------------------------------------------------------------------------


def _divide(config: Config, data: ImageData) -> tuple[Part, Evaluated]:
    """The training images, and those of val (a split, or held out here) and test."""
    indices = data.good()
    evaluated = _other_splits(config, data, data.device)
    if "val" not in evaluated and config.val_share > 0.0:
        indices, held_out = split_halves(indices, data.labels[indices], config.val_share, seed=config.seed)
        if len(held_out) == 0:
            raise ValueError("No class has an image to hold out; use --val-share 0, or data with a split val.")
        own = prepared_for_evaluation(data, held_out)
        _refuse_bad(config, own)
        evaluated = {"val": Part(data, held_out) if own is data else Part(own, own.good()), **evaluated}
    if config.train_images is not None:
        if config.train_images > len(indices):
            raise ValueError(f"--train-images {config.train_images} is more than the {len(indices)} that there are.")
        if config.train_images < len(indices):
            share = config.train_images / len(indices)
            _, indices = split_halves(indices, data.labels[indices], share, seed=config.seed)
    return Part(data, indices), evaluated


def _other_splits(config: Config, like: Preparation, device: torch.device) -> Evaluated:
    """The splits val and test, as far as --data has them, prepared `like` the training images."""
    evaluated = {}
    for split in ("val", "test"):
        if split in splits_of(config.input.data):
            options = {"device": device, "workers": config.device.workers, "same_classes": config.eval_only is None}
            part = load_data(config.input, split=split, like=like, **options)
            _refuse_bad(config, part)
            evaluated[split] = Part(part, part.good())
    return evaluated


def _refuse_bad(config: Config, data: ImageData) -> None:
    """A file that cannot be read ends the command, now or when it is met, unless --skip-bad leaves it out."""
    data.strict = not config.skip_bad
    if data.bad and not config.skip_bad:
        raise ValueError(f"{data.bad[min(data.bad)]}; repair or remove it, or go on without it with --skip-bad.")


def _count(bad: Mapping[str, str], part: Part) -> int:
    """How many of the part's images are among these files."""
    paths = part.data.source.paths
    return 0 if paths is None else sum(paths[index] in bad for index in part.indices.tolist())


def _list_bad(bad: BadFiles, folder: Run) -> int:
    """List the files that were left out in bad_images.txt, and count them."""
    sentences = bad.gather().values()
    if sentences and folder.world.main:
        lines = [" ".join(sentence.splitlines()) for sentence in sentences]
        files.write_text(folder.path("bad_images.txt"), "".join(f"{line}\n" for line in lines))
    return len(sentences)


def _examples(data: ImageData, indices: np.ndarray) -> torch.Tensor:
    """Seven normalised images, fewer where there are fewer."""
    return data.normalise(data.fetch(indices[:7]).images)


# -- networks ----------------------------------------------------------------------------------------------------------


def _build(config: Config, data: ImageData) -> nn.Module:
    """The network with the weights that the seed gives it."""
    settings = config.network
    if settings.genotype is None:
        shape = {"num_classes": data.num_classes, "stem": data.stem}
        drop = Drop(settings.stochastic_depth, settings.drop_block, settings.block_size)
        return build_backbone(settings.backbone, **shape, drop=drop, seed=config.seed)
    genotype, channels = read_genotype(settings.genotype), settings.channels
    shape = {"kind": data.stem, "layers": settings.layers, "num_classes": data.num_classes}
    if settings.max_macs is not None:
        budget, convention = parse_macs(settings.max_macs), settings.macs_convention
        channels = widest(genotype, budget, input_size=data.image_size, convention=convention, **shape)
    description = {**shape, "genotype": genotype.to_json(), "channels": channels, "auxiliary": settings.auxiliary}
    return build_network(description, generator=torch.Generator().manual_seed(config.seed))


def _describe(model: nn.Module, config: Config, data: ImageData) -> dict[str, Any]:
    """The network as plain data, from which its file builds it again."""
    if config.network.genotype is not None:
        return model.description()
    return {"backbone": config.network.backbone, "num_classes": data.num_classes, "stem": data.stem}


def _match_classes(part: Part, trained: Classifier) -> Part:
    """The images of those classes that the network knows, labelled by its numbers."""
    source = part.data.source
    number = {name: i for i, name in enumerate(trained.class_names)}
    numbers = np.array([number.get(name, -1) for name in source.class_names])
    if (numbers < 0).all():
        raise ValueError(
            f"{trained.path} knows none of the classes of --data {source.name}, e.g. {source.class_names[0]!r}; "
            f"its own are {', '.join(trained.class_names[:3])}, …"
        )
    labels = numbers[source.labels]
    data = replace(part.data, source=replace(source, labels=labels, class_names=trained.class_names))
    return Part(data, part.indices[labels[part.indices] >= 0])


# -- results -----------------------------------------------------------------------------------------------------------


def _measure(model: nn.Module, evaluated: Evaluated, folder: Run, progress: Progress | None = None) -> dict[str, float]:
    """val_loss, val_accuracy, …, test_accuracy."""
    metrics = {}
    for split, part in evaluated.items():
        found = evaluate(model, part.data, indices=part.indices, run=folder, progress=progress)
        metrics |= {f"{split}_{name}": value for name, value in found.items()}
    return metrics


def _evaluate_checkpoint(config: Config, folder: Run) -> dict[str, Any]:
    """Nothing is written but what --export asks for."""
    trained = load_classifier(config.eval_only)
    sets = _other_splits(config, trained, folder.device)
    if not sets:
        raise ValueError(f"--data {config.input.data} has neither val nor test images to evaluate on.")
    evaluated = {split: _match_classes(part, trained) for split, part in sets.items()}
    for split, part in evaluated.items():
        here = sets[split].data.class_names
        known = len(set(here) & set(trained.class_names))
        folder.say(
            f"{split}: {len(part.indices)} images; {known} of its {len(here)} classes are among the "
            f"{len(trained.class_names)} of the network"
        )
    model = folder.layout(trained.model.to(folder.device))
    own = sum(len(part.indices[folder.world.share(len(part.indices))]) for part in evaluated.values())
    progress = folder.progress("evaluation", own, unit="image")
    metrics = _measure(model, evaluated, folder, progress)
    progress.close()
    bad = BadFiles((part.data for part in evaluated.values()), folder.world).gather()
    if bad:
        first = next(iter(bad.values()))
        folder.say(f"warning: {len(bad)} files cannot be read and were left out; the first is {first}")
    if config.export is not None and folder.world.main:
        part = next(iter(evaluated.values()))
        export_model(model, _examples(part.data, part.indices), config.export)
    images = {split: len(part.indices) - _count(bad, part) for split, part in evaluated.items()}
    return {"checkpoint": str(config.eval_only), "images": images, **metrics, "bad_images": len(bad)}


def _speed(folder: Run) -> dict[str, float]:
    """Seconds of training, without evaluation, over all invocations, and training images per second."""
    spent = folder.costs["train"]
    per_second = spent.images_backward / max(spent.wall_s, 1e-9)
    return {"train_s": round(spent.wall_s, 1), "images_per_second": round(per_second, 1)}


def _check_flags(config: Config) -> None:
    """Refuse flags that contradict each other."""
    if config.preset not in PRESETS:
        raise ValueError(f"there is no --preset {config.preset}; there are {', '.join(PRESETS)}.")
    network = config.network
    if config.eval_only is None and (network.genotype is None) == (network.backbone is None):
        raise ValueError("Give one of --genotype FILE|NAME|TEXT and --backbone NAME: that is what is trained.")
    if config.eval_only is not None and (network.genotype, network.backbone, network.max_macs) != (None, None, None):
        raise ValueError("--eval-only reads the network from its file; leave --genotype, --backbone, --max-macs out.")
    if config.eval_only is not None and config.eval_only.is_dir():
        raise ValueError(f"--eval-only {config.eval_only} is a folder; name a file in it, e.g. last.pt or best.pt.")
    if network.max_macs is not None and network.genotype is None:
        raise ValueError("--max-macs chooses the channels of a genotype's network; a backbone has fixed ones.")
    if network.backbone is None and (network.stochastic_depth or network.drop_block):
        raise ValueError(
            "--stochastic-depth and --drop-block are for a --backbone; a genotype's network has --drop-path."
        )
    if config.training.mix == "manifold_mixup" and (network.backbone is None or config.recipe.accumulate > 1):
        raise ValueError(
            "--mix manifold_mixup mixes within a --backbone, a whole batch at once: leave --accumulate at 1."
        )
    if not 0.0 <= config.val_share < 1.0:
        raise ValueError(f"--val-share must be at least 0 and below 1, not {config.val_share}.")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2**63, not {config.seed}.")
    if config.eval_every < 1 or (config.train_images is not None and config.train_images < 1):
        raise ValueError("--eval-every and --train-images must be at least 1.")


def parse(argv: Sequence[str]) -> Config:
    return cli.parse(PRESETS, argv, __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and turn every expected failure into one sentence. Exit codes: 0, 1, 2 (bad usage), 130 and 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        result = run(parse(argv))
        if is_main():
            print(json.dumps(result))

    return cli.exit_code(work, lambda error: "Start over with --fresh, or choose another --out.")


if __name__ == "__main__":
    sys.exit(main())

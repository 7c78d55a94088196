"""The last stage: train a genotype's network, or a backbone. Images in, `last.pt` and `best.pt` out.

`last.pt` is both the result and the state to resume from: it counts as found once it holds the last epoch. `best.pt`
holds the epoch with the highest val accuracy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from darts_space import Preparation, build_network, parse_macs, read_genotype, widest
from darts_space.checkpoint import FORMAT as NETWORK_FORMAT
from nas_kmix.backbones import Drop, build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.cli import Flat
from nas_kmix.engine.data import ImageData, InputFormat, wider
from nas_kmix.engine.keys import NOT_IN_KEY, check_key, identity, stage_key
from nas_kmix.engine.learner import OptimConfig, Recipe
from nas_kmix.engine.memory import check_fits
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import BEST, Trained, Validation, train
from nas_kmix.mixers import MixConfig, make_mix
from nas_kmix.pipeline.scorer import FORMAT as BACKBONE_FORMAT
from nas_kmix.pipeline.stage import Key
from nas_kmix.splits import Evaluated, Part, evaluate_all

NAME = "train"
FILE = "last.pt"
EVALUATION = "evaluation"  # billed separately
FILES = (FILE, BEST)


@dataclass(frozen=True)
class NetworkConfig:
    """The network to train. The defaults are PC-DARTS's on CIFAR (Xu et al. 2020, section 4.2).

    Most fields are not in the key: the description of the network that they define is.
    """

    genotype: str | None = field(default=None, metadata=NOT_IN_KEY)
    """A file (JSON or legacy text), the name of a published genotype, or the text itself."""
    backbone: str | None = field(default=None, metadata=NOT_IN_KEY)
    """Train this network of `nas_kmix.backbones` instead of a genotype's, e.g. pyramidnet110."""
    stochastic_depth: float = 0.0
    """Backbones: probability that a batch skips the last residual path, growing linearly with depth (Huang et al.)."""
    drop_block: float = 0.0
    """Backbones: probability that DropBlock drops a value of the last stage (Ghiasi et al.)."""
    block_size: int = 3
    """Side of DropBlock's squares in pixels, odd."""
    channels: int = field(default=36, metadata=NOT_IN_KEY)
    """Channels of the first cell's nodes."""
    layers: int = field(default=20, metadata=NOT_IN_KEY)
    """Number of cells."""
    auxiliary: bool = field(default=True, metadata=NOT_IN_KEY)
    """Train with an auxiliary head at two thirds of the depth."""
    max_macs: str | None = field(default=None, metadata=NOT_IN_KEY)
    """Choose the largest even number of channels that costs at most this many multiply-adds, e.g. 600M."""
    macs_convention: Literal["strict", "published"] = field(default="strict", metadata=NOT_IN_KEY)
    """What --max-macs counts: convolutions and linear layers, or BatchNorm and ReLU too, as the papers' tables do."""


@dataclass(frozen=True)
class NetworkTraining:
    """Everything that a trained network depends on."""

    seed: int = 0
    """Seed of the initial weights, the order of the images, their augmentation and the held-out split."""
    val_share: float = 0.1
    """Share of each class's training images to hold out if the data has no val split; 0 selects no best epoch."""
    train_images: int | None = None
    """Train on only this many images, drawn class by class from those that are not held out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    network: Annotated[NetworkConfig, Flat] = field(default_factory=NetworkConfig)
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
    recipe: Annotated[Recipe, Flat] = field(default_factory=Recipe)
    mix: Annotated[MixConfig, Flat] = field(default_factory=MixConfig)
    augmentation: Annotated[Augmentation, Flat] = field(default_factory=Augmentation)
    sync_batchnorm: bool = False
    """Under torchrun, compute BatchNorm's statistics over the batches of all processes."""


# -- networks ----------------------------------------------------------------------------------------------------------


def build(config: NetworkConfig, data: ImageData, *, seed: int) -> nn.Module:
    """Build the network, with initial weights from the seed."""
    if config.genotype is None:
        shape = {"num_classes": data.num_classes, "stem": data.stem}
        drop = Drop(config.stochastic_depth, config.drop_block, config.block_size)
        return build_backbone(config.backbone, **shape, drop=drop, seed=seed)
    genotype, channels = read_genotype(config.genotype), config.channels
    shape = {"kind": data.stem, "layers": config.layers, "num_classes": data.num_classes}
    if config.max_macs is not None:
        budget, convention = parse_macs(config.max_macs), config.macs_convention
        channels = widest(genotype, budget, input_size=data.image_size, convention=convention, **shape)
    description = {**shape, "genotype": genotype.to_json(), "channels": channels, "auxiliary": config.auxiliary}
    return build_network(description, generator=torch.Generator().manual_seed(seed))


def describe(model: nn.Module, config: NetworkConfig, data: ImageData) -> dict[str, Any]:
    """The network as plain data, from which a checkpoint rebuilds it."""
    if config.genotype is not None:
        return model.description()
    return {"backbone": config.backbone, "num_classes": data.num_classes, "stem": data.stem}


def check_memory(config: NetworkTraining, model: nn.Module, training: Part, run: Run) -> None:
    """Refuse a batch that cannot fit into memory."""
    model = run.compute.layout(copy.deepcopy(model).to(run.compute.device))
    options = {"flag": "--batch-size", "world": run.world, "parts": config.recipe.accumulate}
    size, side = config.optim.batch_size, training.data.image_size
    check_fits(model, size, side, run.compute, images=len(training.indices), **options)


def preparation_of(like: InputFormat) -> Preparation:
    """How evaluation prepares images for a network that was trained `like` this."""
    size = like.image_size
    return Preparation(like.class_names, size, wider(size) or size, like.mean, like.std)


# -- the stage ---------------------------------------------------------------------------------------------------------


def key(config: NetworkTraining, model: nn.Module, training: Part, evaluated: Evaluated, bad: BadFileList) -> Key:
    """What the trained network depends on: settings that take effect, the network, and the images of every split."""
    settings = identity(_resolved(config)) | {"network": describe(model, config.network, training.data)}
    if _photographs(training):
        settings["crops"] = "cut before decoding"
    fingerprints = {name: part.data.fingerprint for name, part in evaluated.items()}
    return stage_key(NAME, settings, {"data": training.data.fingerprint, **fingerprints})


def load(
    path: Path,
    config: NetworkTraining,
    model: nn.Module,
    training: Part,
    evaluated: Evaluated,
    bad: BadFileList,
    *,
    run: Run,
    key: Key | None,
) -> Trained | None:
    """The network of a finished training, with the weights that were evaluated; None for an unfinished one."""
    state = files.load_tensors(path, remedy=files.REMOVE_OURS)
    check_key(path, state.get("key"), key)
    with files.damage_named(path, files.REMOVE_OURS):
        if int(state["epoch"]) < config.optim.epochs:
            return None
        model.load_state_dict(state["model"])
        bad.load_state_dict(state)
        return Trained(run.compute.layout(model.to(run.compute.device)), state.get("last"), state.get("best"))


def make(
    path: Path,
    config: NetworkTraining,
    model: nn.Module,
    training: Part,
    evaluated: Evaluated,
    bad: BadFileList,
    *,
    run: Run,
    key: Key,
) -> Trained:
    """Train from scratch or resume from `path`, and evaluate every `eval_every` epochs."""
    data = training.data
    content = {
        "format": BACKBONE_FORMAT if config.network.genotype is None else NETWORK_FORMAT,
        "network": describe(model, config.network, data),
        **preparation_of(data).to_json(),
    }

    def measure(model: nn.Module) -> dict[str, float]:
        with run.stage(EVALUATION) as cost:
            cost.images_forward += sum(len(part.indices) for part in evaluated.values())
            metrics = evaluate_all(model, evaluated, run.compute, run.world)
            bad.write(run.folder)
            return metrics

    return train(
        run.compute.layout(model.to(run.compute.device)),
        data,
        config.optim,
        config.augmentation,
        mix=make_mix(config.mix, data.num_classes, model),
        seed=config.seed,
        run=run,
        stage=NAME,
        key=key,
        recipe=_resolved(config).recipe,
        indices=training.indices,
        validation=Validation(measure, "val_accuracy" if "val" in evaluated else None, config.eval_every),
        checkpoint=path.name,
        content=content,
        bad=bad,
        photographs=_photographs(training),
        joint_norms=config.sync_batchnorm,
    )


def _resolved(config: NetworkTraining) -> NetworkTraining:
    """The settings that take effect, without those of the command; a backbone has no drop-path."""
    settings = {field.name: getattr(config, field.name) for field in fields(NetworkTraining)}
    if config.network.backbone is not None:
        settings["recipe"] = replace(config.recipe, drop_path=0.0)
    return NetworkTraining(**settings)


def _photographs(training: Part) -> bool:
    """Whether training crops come from whole photographs instead of their centre squares."""
    return not training.data.resident and training.data.stem == "imagenet"

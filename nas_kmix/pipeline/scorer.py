"""Stage one: train the classifier whose losses will score the images. Images in, `scorer.pt` out.

The paper trains PyramidNet-110 with DCutMix (Table 1); a laptop can afford a small network for a few
epochs. Its cost is billed like that of every other stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones import build_backbone, last_linear
from nas_kmix.baselines import forgetting_counts, note_forgetting
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.cli import Flat
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.folders import composed
from nas_kmix.engine.keys import check_key, identity, stage_key
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import Validation, train
from nas_kmix.mixers import MixConfig, make_mix
from nas_kmix.pipeline.stage import Key
from nas_kmix.pretrained import is_published, published_scorer, scorer_of_file
from nas_kmix.splits import Evaluated, Part, divide, evaluate_all

NAME = "scorer"
FILE = "scorer.pt"
FORMAT = "nas_kmix/classifier"


class Scorer(NamedTuple):
    """The network, the images with the normalisation of its training, and its forgetting counts.

    forgetting: int64 (N,), or None where they were not counted.
    """

    model: nn.Module
    data: ImageData
    forgetting: Tensor | None


@dataclass(frozen=True)
class ScorerConfig:
    """The classifier that scores images, and its training (in the paper's Table 1, PyramidNet-110 with DCutMix)."""

    backbone: str = "pyramidnet110"
    """Name of a network in `nas_kmix.backbones.BACKBONES`; of a state dict given as --scorer also torchvision:NAME or
    timm:NAME."""
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
    mix: Annotated[MixConfig, Flat] = field(default_factory=lambda: MixConfig(mix="dcutmix"))
    val_share: float = 0.0
    """Share of each class's images to test it on instead of training it on them; 0, as in the paper and with
    `forgetting`, tests on none. They are scored like all others."""
    dropout: float = 0.0
    """Before the last layer, while it trains; BALD and variation ratio were published with .5."""
    forgetting: bool = False
    """Count how often it forgets each image, by one pass over all of them after each epoch (--measure forgetting)."""
    augmentation: Annotated[Augmentation, tyro.conf.Suppress] = field(default_factory=Augmentation)
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the initial weights, the order of the batches, the augmentation and the mixing."""

    def __post_init__(self):
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--scorer.dropout is a probability below 1, not {self.dropout}.")
        if not 0.0 <= self.val_share < 1.0:
            raise ValueError(f"--scorer.val-share must be at least 0 and below 1, not {self.val_share}.")


def key(config: ScorerConfig, data: ImageData) -> Key:
    """What a scorer depends on: its settings and the images."""
    return stage_key(NAME, identity(config), {"data": data.fingerprint})


def load(path: Path, config: ScorerConfig, data: ImageData, *, run: Run, key: Key | None) -> Scorer:
    """The scorer in `path`, and `data` with its normalisation."""
    return load_scorer(path, data, compute=run.compute, key=key)


def build(config: ScorerConfig, data: ImageData, compute: Compute) -> nn.Module:
    """The network, with initial weights from the seed."""
    shape = {"num_classes": data.num_classes, "stem": data.stem}
    return compute.layout(build_backbone(config.backbone, **shape, seed=config.seed).to(compute.device))


def divided(config: ScorerConfig, data: ImageData) -> tuple[Part, Evaluated]:
    """The images to train on, and those held out to test the network on, if any."""
    # Forgetting is counted of images that are trained on; of single images none can be held out.
    tests = not config.forgetting and np.bincount(data.labels[data.good()]).max() > 1
    return divide(data, {}, val_share=config.val_share if tests else 0.0, train_images=None, seed=config.seed)


def make(path: Path, config: ScorerConfig, data: ImageData, *, run: Run, key: Key) -> Scorer:
    """Train on `data`, but for what is held out of it to test the network on, and write `path`."""
    model = build(config, data, run.compute)
    if config.dropout:
        drop_before(last_linear(model), config.dropout)
    mix = make_mix(config.mix, data.num_classes, model)
    memory: dict[str, Tensor] = {}

    training, held_out = divided(config, data)

    def watch(network: nn.Module) -> dict[str, float]:
        cost, metrics = run.ledger.costs[NAME], {}
        if config.forgetting:
            cost.images_forward += len(data.good())
            metrics["train_accuracy"] = note_forgetting(memory, network, data, compute=run.compute)
        cost.images_forward += sum(len(part.indices) for part in held_out.values())
        return metrics | evaluate_all(network, held_out, run.compute, run.world)

    validation = Validation(watch, select=None, memory=memory) if config.forgetting or held_out else None
    options = {"mix": mix, "seed": config.seed, "run": run, "stage": NAME, "key": key, "validation": validation}
    trained = train(model, data, config.optim, config.augmentation, indices=training.indices, **options)
    run.world.align_buffers(model)  # all processes must score with the same network
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise NonFiniteLossError(
            "scorer: the weights are not finite after the last step. Start again with --fresh and a lower --scorer.lr."
        )
    state = {
        "format": FORMAT,
        "network": {"backbone": config.backbone, "num_classes": data.num_classes, "stem": data.stem},
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "model": model.state_dict(),
    }
    counts = forgetting_counts(memory, config.optim.epochs) if config.forgetting else None
    if counts is not None:
        state["forgetting"] = counts
    if run.world.main:
        files.save_tensors(path, {"key": dict(key), **state})
    if held_out:
        accuracy, count = trained.last["val_accuracy"], len(held_out["val"].indices)
        run.say(f"{NAME}: names the class of {100 * accuracy:.1f} % of {count:,} images that it was not trained on")
    else:
        run.say(f"{NAME}: trained on all {len(training.indices):,} images, so none is left to test it on")
    return Scorer(model, data, counts)


def from_elsewhere(given: Path | None, config: ScorerConfig, data: ImageData, *, run: Run) -> Scorer | None:
    """The scorer that `--scorer` names, if no run of ours has trained it: a library's, or a state dict. Its training is
    billed nowhere.

    Raises ValueError for one that does not fit the images, and OSError for weights that cannot be had.
    """
    if given is None:
        return None
    state: Any = None
    if not is_published(given):
        with suppress(Exception):  # `load_scorer` says what is wrong with the file
            state = torch.load(given, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping) or "format" in state:
            return None
    if not run.world.main:
        run.world.barrier()  # rank 0 downloads the weights, and the others find them
    if state is None:
        model, view = published_scorer(str(given), data)
    else:
        model, view = scorer_of_file(given, state, config.backbone, data)
    if run.world.main:
        run.world.barrier()
    run.say(f"scorer: {given}, which comes from elsewhere; what its training cost is not billed")
    return Scorer(run.compute.layout(model), view, None)


def drop_before(layer: nn.Module, probability: float) -> None:
    """Drop values of the layer's input while it trains. The names of the weights stay as they are."""
    layer.register_forward_pre_hook(lambda layer, inputs: F.dropout(inputs[0], probability, layer.training))


def load_scorer(path: Path, data: ImageData, *, compute: Compute | None = None, key: Key | None = None) -> Scorer:
    """Load `scorer.pt` for `data`: the model, and the data with the scorer's normalisation.

    Raises ValueError if the file is damaged or its network does not fit the data, and StageMismatchError if it was not
    made with `key`.
    """
    compute = compute or Compute()
    remedy = files.GIVE_ANOTHER if key is None else files.REMOVE_OURS  # given, or found in the run folder
    state = files.load_tensors(path, compute.device, remedy=remedy)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a scorer of nas_kmix; give the scorer.pt of a search, or the last.pt of "
            "a training with --backbone."
        )
    check_key(path, state.get("key"), key)
    with files.damage_named(path, "train the scorer again"):
        network, constants = state["network"], constants_of(state)
        classes = tuple(composed(str(name)) for name in state["class_names"])
        shape = {"num_classes": int(network["num_classes"]), "stem": network["stem"]}
    for name, wanted in (("num_classes", data.num_classes), ("stem", data.stem)):
        if shape[name] != wanted:
            raise ValueError(
                f"{path} was trained with {name}={shape[name]}, but --data needs {wanted}; "
                f"leave out --scorer to train a new one."
            )
    if classes != data.class_names:
        raise ValueError(f"{path} was trained on other classes than those of --data; leave out --scorer.")
    with files.damage_named(path, "train the scorer again"):
        model = build_backbone(network["backbone"], **shape, seed=0).to(compute.device)
        model.load_state_dict(state["model"])
        counts = state.get("forgetting")
        if counts is not None and state["key"]["inputs"]["data"] != data.fingerprint:
            counts = None  # of other images
        if counts is not None and (counts.shape != data.labels.shape or counts.dtype != torch.int64):
            raise ValueError("its forgetting counts are not one number per image")
    return Scorer(compute.layout(model), replace(data, **constants), None if counts is None else counts.cpu())


def constants_of(state: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The normalisation that a checkpoint holds, as `mean` and `std`. Raises KeyError, TypeError and ValueError."""
    mean, std = (tuple(map(float, state[name])) for name in ("mean", "std"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)):
        raise ValueError(f"mean and std of the images cannot be {mean} and {std}")
    return {"mean": mean, "std": std}

"""Stage one: train the classifier whose losses will score the images. Images in, `scorer.pt` out.

The paper trains PyramidNet-110 with DCutMix (Table 1); a small network for few epochs gives a scorer that a laptop
can afford. What it costs is billed like every other stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, identity, stage_key
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import train
from nas_kmix.mixers import MixConfig, make_mix
from nas_kmix.pipeline.stage import Key

NAME = "scorer"
FILE = "scorer.pt"
FORMAT = "nas_kmix/classifier"

Scorer = tuple[nn.Module, ImageData]
"""The network, and the images normalised as it was trained with."""


@dataclass(frozen=True)
class ScorerConfig:
    """The classifier that scores, and how it is trained (the paper's Table 1: PyramidNet-110 with DCutMix)."""

    backbone: str = "pyramidnet110"
    """A name of `nas_kmix.backbones.BACKBONES`."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    mix: Annotated[MixConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: MixConfig(mix="dcutmix"))
    augmentation: Annotated[Augmentation, tyro.conf.Suppress] = field(default_factory=Augmentation)
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the initial weights, the order of the batches, the augmentation and the mixing."""


def key(config: ScorerConfig, data: ImageData) -> Key:
    """What a scorer depends on: its settings and the images."""
    return stage_key(NAME, identity(config), {"data": data.fingerprint})


def load(path: Path, config: ScorerConfig, data: ImageData, *, run: Run, key: Key | None) -> Scorer:
    """The scorer in `path`, and `data` with its normalisation."""
    return load_scorer(path, data, compute=run.compute, key=key)


def make(path: Path, config: ScorerConfig, data: ImageData, *, run: Run, key: Key) -> Scorer:
    """Train on all of `data` and write `path`."""
    shape = {"num_classes": data.num_classes, "stem": data.stem}
    model = build_backbone(config.backbone, **shape, seed=config.seed).to(run.compute.device)
    model = run.compute.layout(model)
    mix = make_mix(config.mix, data.num_classes, model)
    options = {"mix": mix, "seed": config.seed, "run": run, "stage": NAME, "key": key}
    train(model, data, config.optim, config.augmentation, **options)
    run.world.align_buffers(model)  # so that all processes score with one network
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise NonFiniteLossError(
            "scorer: the weights are not finite after the last step. Start again with --fresh and a lower --scorer.lr."
        )
    state = {
        "format": FORMAT,
        "network": {"backbone": config.backbone, **shape},
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "model": model.state_dict(),
    }
    if run.world.main:
        files.save_tensors(path, {"key": dict(key), **state})
    return model, data


def load_scorer(path: Path, data: ImageData, *, compute: Compute | None = None, key: Key | None = None) -> Scorer:
    """Load `scorer.pt` for `data`: the model, and the data with the scorer's normalisation.

    Raises ValueError if the file is damaged or its network does not fit the data, and StageMismatchError if it was not
    made with `key`.
    """
    compute = compute or Compute()
    remedy = files.GIVE_ANOTHER if key is None else files.REMOVE_OURS  # given, or found in the run folder
    state = files.load_tensors(path, compute.device, remedy=remedy)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a scorer of nas_kmix; make one with search.py --stop-after scorer.")
    check_key(path, state.get("key"), key)
    with files.damage_named(path, "train the scorer anew"):
        network, classes, constants = state["network"], tuple(state["class_names"]), constants_of(state)
        shape = {"num_classes": int(network["num_classes"]), "stem": network["stem"]}
    for name, wanted in (("num_classes", data.num_classes), ("stem", data.stem)):
        if shape[name] != wanted:
            raise ValueError(
                f"{path} was trained with {name}={shape[name]}, but --data needs {wanted}; "
                f"leave out --scorer to train a new one."
            )
    if classes != data.class_names:
        raise ValueError(f"{path} was trained on other classes than those of --data; leave out --scorer.")
    with files.damage_named(path, "train the scorer anew"):
        model = build_backbone(network["backbone"], **shape, seed=0).to(compute.device)
        model.load_state_dict(state["model"])
    return compute.layout(model), replace(data, **constants)


def constants_of(state: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The normalisation that a checkpoint tells, as `mean` and `std`. Raises KeyError, TypeError and ValueError."""
    mean, std = (tuple(map(float, state[name])) for name in ("mean", "std"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)):
        raise ValueError(f"mean and std of the images cannot be {mean} and {std}")
    return {"mean": mean, "std": std}

"""Stage one: train the classifier whose losses will score the images. Images in, `scorer.pt` out.

The paper trains PyramidNet-110 with DCutMix (Table 1); a small network for few epochs gives a scorer that a laptop
can afford. What it costs is billed like every other stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import DataConfig, ImageData
from nas_kmix.engine.keys import check_key, stage_key
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import TrainConfig, train
from nas_kmix.mixers import make_mix

NAME = "scorer"
FILE = "scorer.pt"
FORMAT = "nas_kmix/classifier"

Scorer = tuple[nn.Module, ImageData]
"""The network, and the images normalised as it was trained with."""


@dataclass(frozen=True)
class ScorerConfig(TrainConfig):
    """The classifier that scores, and how it is trained (the paper's Table 1: PyramidNet-110 with DCutMix)."""

    backbone: str = "pyramidnet110"
    """A name of `nas_kmix.backbones.BACKBONES`."""
    mix: Literal["none", "dmixup", "dcutmix"] = "dcutmix"
    mix_k: int = 5
    """Images in a mix, at least 2."""
    mix_alpha: float = 0.2
    """Concentration of the Dirichlet distribution that phi is drawn from."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""


def key(config: ScorerConfig, data: ImageData, data_config: DataConfig) -> dict[str, Any]:
    """What a scorer depends on: its settings, the augmentation and the images."""
    augmentation = {"flip": data_config.flip, "crop_padding": data_config.crop_padding}
    return stage_key(NAME, {**asdict(config), **augmentation}, {"data": data.fingerprint})


def load(
    path: Path,
    config: ScorerConfig,
    data: ImageData,
    data_config: DataConfig,
    *,
    run: Run,
    key: Mapping[str, Any] | None,
) -> Scorer:
    """The scorer in `path`, and `data` with its normalisation."""
    return load_scorer(path, data, compute=run.compute, key=key)


def make(
    path: Path, config: ScorerConfig, data: ImageData, data_config: DataConfig, *, run: Run, key: Mapping[str, Any]
) -> Scorer:
    """Train on all of `data` and write `path`."""
    shape = {"num_classes": data.num_classes, "stem": data.stem}
    model = build_backbone(config.backbone, **shape, seed=config.seed).to(run.compute.device)
    model = run.compute.layout(model)
    mix = make_mix(config, data.num_classes, model)
    train(model, data, config, data_config, mix=mix, run=run, stage=NAME, key=key)
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


def load_scorer(
    path: Path, data: ImageData, *, compute: Compute | None = None, key: Mapping[str, Any] | None = None
) -> Scorer:
    """Load `scorer.pt` for `data`: the model, and the data with the scorer's normalisation.

    Raises ValueError if the file is damaged or its network does not fit the data, and StageMismatchError if it was not
    made with `key`.
    """
    compute = compute or Compute()
    state = files.load_tensors(path, compute.device)
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

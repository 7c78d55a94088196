"""Stage one: train the classifier whose losses will score the images. Images in, `scorer.pt` out.

The paper trains PyramidNet-110 with DCutMix (Table 1); a small network for few epochs gives a scorer that a laptop
can afford. What it costs is billed like every other stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, ImageData
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import Run, check_key
from nas_kmix.engine.training import TrainConfig, train
from nas_kmix.mixers import make_mix

FORMAT = "nas_kmix/classifier"


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


def train_scorer(
    data: ImageData, config: ScorerConfig, data_config: DataConfig, *, run: Run, key: Mapping[str, Any], path: Path
) -> nn.Module:
    """Train on all of `data` and write `path`; resumes from the run's checkpoint."""
    model = run.layout(_build(config.backbone, data.num_classes, data.stem, config.seed).to(run.device))
    mix = make_mix(config, data.num_classes, model)
    train(model, data, config, data_config, mix=mix, run=run, stage="scorer", key=key)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise NonFiniteLossError(
            "scorer: the weights are not finite after the last step. Start again with --fresh and a lower --scorer.lr."
        )
    network = {"backbone": config.backbone, "num_classes": data.num_classes, "stem": data.stem}
    state = {
        "format": FORMAT,
        "network": network,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "model": model.state_dict(),
    }
    files.save_tensors(path, {"key": dict(key), **state})
    run.remove_checkpoint("scorer")
    return model


def load_scorer(
    path: Path, data: ImageData, *, run: Run, key: Mapping[str, Any] | None = None
) -> tuple[nn.Module, ImageData]:
    """Load `scorer.pt` for `data`: the model, and the data with the scorer's normalisation.

    Raises ValueError if the file is damaged or its network does not fit the data, and StageMismatchError if it was not
    made with `key`.
    """
    state = files.load_tensors(path, run.device)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a scorer of nas_kmix; make one with search.py --stop-after scorer.")
    if key is not None:
        check_key(path, state.get("key"), key)
    try:
        network, classes = state["network"], tuple(state["class_names"])
        model = _build(network["backbone"], network["num_classes"], network["stem"], seed=0).to(run.device)
        model.load_state_dict(state["model"])
        view = replace(data, mean=tuple(state["mean"]), std=tuple(state["std"]))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); train the scorer anew.") from error
    for name, wanted in (("num_classes", data.num_classes), ("stem", data.stem)):
        if network[name] != wanted:
            raise ValueError(
                f"{path} was trained with {name}={network[name]}, but --data needs {wanted}; "
                f"leave out --scorer to train a new one."
            )
    if classes != data.class_names:
        raise ValueError(f"{path} was trained on other classes than those of --data; leave out --scorer.")
    return run.layout(model), view


def _build(backbone: str, num_classes: int, stem: str, seed: int) -> nn.Module:
    return build_backbone(backbone, num_classes=num_classes, stem=stem, seed=seed)

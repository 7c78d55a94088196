"""Turn checkpoints of the published code into ours, for `--eval-only`, `--scorer`, attacks and landscapes.

    python -m nas_kmix.analysis.convert cifar10_model.pt --genotype DARTS_V2 --data cifar10 --out darts.pt
    python -m nas_kmix.analysis.convert model_best.pth.tar --data cifar100 --out scorer.pt

The first form reads networks of a genotype in DARTS's layout, for CIFAR or ImageNet, as PC-DARTS and many others write
them; the second the PyramidNet-110 and -200 of the CutMix and DCutMix repositories. A file holds a state dict, alone or
under "state_dict", with or without `module.` before the names and `num_batches_tracked` beside BatchNorm's statistics.
It cannot run code. --data names the images that the network was trained on, for its classes and their normalisation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from darts_space import Genotype, Preparation, build_network, read_genotype
from darts_space.checkpoint import FORMAT as NETWORK_FORMAT
from nas_kmix.backbones import build_backbone
from nas_kmix.engine import cli, files
from nas_kmix.engine.cli import Flat, parse_flags
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.pipeline.network import preparation_of
from nas_kmix.pipeline.scorer import FORMAT as BACKBONE_FORMAT

State = Mapping[str, Tensor]
PYRAMIDNETS = {12: "pyramidnet110", 22: "pyramidnet200"}  # by the blocks of a stage
# With which both repositories normalise CIFAR-10 and CIFAR-100.
PYRAMIDNET_CONSTANTS = {
    "mean": tuple(value / 255 for value in (125.3, 123.0, 113.9)),
    "std": tuple(value / 255 for value in (63.0, 62.1, 66.7)),
}

# A name in DARTS's layout, and ours. Its operations keep their layers under `op`; its auxiliary head begins with a
# ReLU and a pool, which are not among our layers.
DARTS_NAMES = (
    (r"^stem\.", "stem0."),
    (r"\.op\.", "."),
    (r"\._ops\.", ".operations."),
    (r"\.conv_1\.", ".conv_even."),
    (r"\.conv_2\.", ".conv_odd."),
    (r"auxiliary_head\.features\.(\d+)", lambda found: f"auxiliary.features.{int(found[1]) - 2}"),
    (r"auxiliary_head\.", "auxiliary."),
)
PYRAMIDNET_NAMES = (
    (r"^conv1\.", "stem.0."),
    (r"^bn1\.", "stem.1."),
    (r"^bn_final\.", "final_norm."),
    (r"^fc\.", "classifier."),
    *((rf"\.bn{i}\.", f".residual.{layer}.") for i, layer in enumerate((0, 2, 5, 8), start=1)),
    *((rf"\.conv{i}\.", f".residual.{layer}.") for i, layer in enumerate((1, 4, 7), start=1)),
)


@dataclass(frozen=True)
class Config:
    """Which checkpoint to convert, and where to."""

    checkpoint: tyro.conf.Positional[Path]
    """A file of torch.save."""
    out: Path
    """The converted checkpoint."""
    genotype: str | None = None
    """The genotype of the network: a file, a published name or the text. Leave it out for a PyramidNet."""
    mean: tuple[float, float, float] | None = None
    """Per channel, in [0, 1], with which it was normalised. Default: the data set's; for a PyramidNet, CutMix's."""
    std: tuple[float, float, float] | None = None
    """As --mean, the standard deviation."""
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)


def run(config: Config) -> str:
    """Convert, write, and return a sentence on it. Raises ValueError naming the file, and OSError."""
    genotype = None if config.genotype is None else read_genotype(config.genotype)
    state = read_state(config.checkpoint)
    try:
        if genotype is None:
            model, description = pyramidnet_from(state)
            kind, constants = BACKBONE_FORMAT, PYRAMIDNET_CONSTANTS
        else:
            model = network_from(state, genotype)
            description, kind, constants = model.description(), NETWORK_FORMAT, {}
    except ValueError as error:
        raise ValueError(f"{config.checkpoint}: {error}") from error
    like = preparation_of(load_data(config.input))
    given = {name: getattr(config, name) for name in ("mean", "std") if getattr(config, name) is not None}
    preparation = Preparation(**{**vars(like), **constants, **given})
    if len(preparation.class_names) != description["num_classes"]:
        raise ValueError(
            f"{config.checkpoint} is a network of {description['num_classes']} classes, but --data {config.input.data} "
            f"has {len(preparation.class_names)}; name the images that it was trained on."
        )
    head = {"format": kind, "network": description, **preparation.to_json()}
    files.save_tensors(config.out, {**head, "model": model.state_dict()})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{config.out}: {parameters:,} parameters, {description['num_classes']} classes"


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without `module.` before its names."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is cut short ({type(error).__name__}); where you "
            "trust it, save its state_dict alone and convert that."
        ) from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict, alone or under 'state_dict'.")
    return {name.removeprefix("module."): value for name, value in found.items()}


def network_from(state: State, genotype: Genotype) -> nn.Module:
    """The network of a genotype, with weights in DARTS's layout; its shape follows from theirs.

    Raises ValueError if they do not fit the genotype.
    """
    kind = "cifar" if "stem.0.weight" in state else "imagenet"
    width = state.get("stem.0.weight" if kind == "cifar" else "stem0.3.weight")
    classifier = state.get("classifier.weight")
    cells = {int(found[1]) for name in state if (found := re.match(r"cells\.(\d+)\.", name))}
    if width is None or classifier is None or not cells:
        raise ValueError("it is no network in DARTS's layout; for a PyramidNet leave out --genotype.")
    description: dict[str, Any] = {
        "kind": kind,
        "genotype": genotype.to_json(),
        "channels": len(width) // (3 if kind == "cifar" else 1),
        "layers": max(cells) + 1,
        "num_classes": len(classifier),
        "auxiliary": any(name.startswith("auxiliary_head.") for name in state),
    }
    model = build_network(description, generator=torch.Generator())
    return _filled(model, _renamed(state, DARTS_NAMES), "the genotype that --genotype names")


def pyramidnet_from(state: State) -> tuple[nn.Module, dict[str, Any]]:
    """The authors' bottleneck PyramidNet for CIFAR as ours, and its description.

    Raises ValueError for any other network.
    """
    blocks = {int(found[1]) for name in state if (found := re.match(r"layer1\.(\d+)\.", name))}
    backbone, classifier = PYRAMIDNETS.get(len(blocks)), state.get("fc.weight")
    if backbone is None or classifier is None:
        raise ValueError("it is no PyramidNet-110 or -200 for CIFAR; for the network of a genotype give --genotype.")
    description = {"backbone": backbone, "num_classes": len(classifier), "stem": "cifar"}
    model = build_backbone(backbone, num_classes=len(classifier))

    def numbered(found: re.Match[str]) -> str:
        return f"blocks.{(int(found[1]) - 1) * len(blocks) + int(found[2])}"

    names = _renamed(state, (*PYRAMIDNET_NAMES, (r"^layer([123])\.(\d+)", numbered)))
    return _filled(model, names, f"{backbone}, as the number of its blocks says"), description


def _renamed(state: State, rules: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


def _filled(model: nn.Module, state: State, meant: str) -> nn.Module:
    """The model with these weights, in evaluation mode; a file may lack BatchNorm's counts, which have no effect."""
    wanted = model.state_dict()
    counts = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    state = {**counts, **state}
    odd = [name for name in wanted if name not in state] + [name for name in state if name not in wanted]
    odd += [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if odd:
        raise ValueError(f"its weights are not those of {meant}: {odd[0]} is missing, unexpected or of another shape.")
    model.load_state_dict(state)
    return model.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`."""
    return cli.exit_code(lambda: print(run(parse_flags(Config, argv, __doc__))))


if __name__ == "__main__":
    sys.exit(main())

"""Classifiers that others have trained, as scorers: torchvision's and timm's by name, and files of weights.

In:  `torchvision:NAME[:WEIGHTS]`, `timm:NAME`, or a state dict and the name of its network; the images to score.
Out: a network of images (N, 3, S, S) to the logits of the images' classes alone, and the images prepared for it.

Images are normalised as the published weights want it. Above 64 px their shorter side is resized before the centre is
cropped, in the weights' own ratio; a network that wants another side than the images have resizes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones import BACKBONES, build_backbone, last_linear
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.decoding import decode_all

LIBRARIES = ("torchvision", "timm")
WNIDS = tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="utf-8").split())
"""The WordNet ids of ImageNet's 1,000 classes, in the order of all published classifiers' outputs."""


class WantedInput(NamedTuple):
    """How a network wants its images: side in pixels, the shorter side before the centre is cropped, normalisation."""

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """A network of a library. `build(outputs)` makes it without weights; without `outputs`, with the published ones."""

    name: str
    wanted: WantedInput
    classes: tuple[str, ...]
    build: Callable[..., nn.Module]


def is_published(name: str | Path) -> bool:
    """Whether the name is one of a library's networks, rather than a file."""
    return str(name).partition(":")[0] in LIBRARIES and ":" in str(name)


def published_scorer(name: str, data: ImageData) -> tuple[nn.Module, ImageData]:
    """The network of a library with its published weights, and `data` prepared for it.

    Raises ValueError for an unknown name, a library that is not installed, and a class that the network does not know;
    OSError where the weights are neither in the cache nor can be downloaded.
    """
    found = _published(name)
    outputs = class_outputs(data.class_names, found.classes, name)
    return _prepared(found.build(), outputs, found.wanted, data, name)


def scorer_of_file(path: Path, state: Mapping[str, Any], backbone: str, data: ImageData) -> tuple[nn.Module, ImageData]:
    """The network `backbone`, one of ours or a library's, with the weights of a state dict, and `data` prepared for it.

    Its outputs are ImageNet's classes if they are 1,000 and the images' classes are among those; otherwise the images'
    classes in their order. Raises ValueError for weights of another network or number of classes.
    """
    weights = _weights_of(path, state)
    if is_published(backbone):
        found = _published(backbone)
        build, wanted = found.build, found.wanted
    else:
        wanted = WantedInput(data.image_size, data.resize or data.image_size, data.mean, data.std)

        def build(count: int) -> nn.Module:
            return build_backbone(backbone, num_classes=count, stem=data.stem)

    try:
        with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
            count = len(weights[_head_of(build(len(WNIDS)), backbone)])
            network = build(count)
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:  # TypeError: a number has no length
        first = next(line.strip() for line in [*str(error).splitlines()[1:], str(error)])
        reason = f"it has no {first}" if isinstance(error, KeyError) else first[:200]
        names = f"{', '.join(BACKBONES)}, torchvision:NAME or timm:NAME"
        raise ValueError(
            f"--scorer {path} holds the weights of another network than --scorer.backbone {backbone} ({reason}); "
            f"choose one of {names}."
        ) from error
    if count == len(WNIDS) and (count != data.num_classes or all(map(_wnid, data.class_names))):
        outputs = class_outputs(data.class_names, imagenet_classes(), str(path))
    elif count == data.num_classes:
        outputs = list(range(count))
    else:
        raise ValueError(
            f"--scorer {path} tells {count} classes apart, but --data has {data.num_classes}; give weights that were "
            "trained on these classes or on ImageNet's 1,000."
        )
    return _prepared(network, outputs, wanted, data, str(path))


def _head_of(network: nn.Module, name: str) -> str:
    """The name of the weights that turn features into logits. Raises ValueError if there are none."""
    head = _last_layer(network, name)
    return next(f"{name}.weight" for name, module in network.named_modules() if module is head)


def _last_layer(network: nn.Module, name: str) -> nn.Linear:
    try:
        return last_linear(network)
    except IndexError:
        raise ValueError(f"The network of {name} does not end in a linear layer; choose another.") from None


def class_outputs(names: Sequence[str], classes: Sequence[str], scorer: str) -> list[int]:
    """Which output of a network of `classes` is each of the images' classes.

    A class is known by its WordNet id (`n01440764`, also with more behind it) where the network's are ImageNet's 1,000,
    or by its name, whatever its case, hyphens and underscores. Raises ValueError naming a class that is not known, or
    whose name is that of several.
    """
    known: dict[str, list[int]] = {}
    for output, name in enumerate(classes):
        known.setdefault(_simple(name), []).append(output)
    outputs = []
    for name in names:
        wnid = _wnid(name) if len(classes) == len(WNIDS) else None
        found = [WNIDS.index(wnid)] if wnid in WNIDS else known.get(_simple(name), [])
        if len(found) > 1:
            ids = f"; call its folder {' or '.join(WNIDS[i] for i in found)}" if len(classes) == len(WNIDS) else ""
            raise ValueError(f"{scorer} knows {len(found)} classes called {name!r}{ids}.")
        if not found:
            near = get_close_matches(_simple(name), known, n=1)
            hint = f" (the nearest is {classes[known[near[0]][0]]!r})" if near else ""
            raise ValueError(
                f"{scorer} does not know the class {name!r} of --data{hint}; classes are recognised by WordNet id or "
                "name. Take another --scorer, or leave it out to train one."
            )
        if found[0] in outputs:
            other = names[outputs.index(found[0])]
            raise ValueError(f"The classes {other!r} and {name!r} of --data are one class to {scorer}.")
        outputs += found
    return outputs


class Resized(nn.Module):
    """A network behind a resize of its images to the side that it wants."""

    def __init__(self, network: nn.Module, wanted: WantedInput):
        super().__init__()
        self.network = network
        # In the state dict, so that the scores' key tells different preparations apart.
        self.register_buffer("sides", torch.tensor([wanted.size, wanted.resize]))
        self._size = wanted.size

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, S, S) to logits."""
        if images.shape[-1] != self._size:
            images = F.interpolate(images, (self._size, self._size), mode="bilinear", antialias=True)
        return self.network(images)


def _prepared(
    network: nn.Module, outputs: list[int], wanted: WantedInput, data: ImageData, name: str
) -> tuple[nn.Module, ImageData]:
    _keep_outputs(network, outputs, name)
    model = Resized(network, wanted).eval()
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, 3, wanted.size, wanted.size)).shape)
    except RuntimeError as error:
        raise ValueError(f"The network of {name} cannot score: {str(error).splitlines()[0]}") from error
    if shape != (1, len(outputs)):
        raise ValueError(f"The network of {name} gives {shape} for an image instead of one logit per class.")
    view = replace(data, mean=wanted.mean, std=wanted.std)
    resize = round(data.image_size * wanted.resize / wanted.size)
    if data.stem == "imagenet" and resize != (data.resize or data.image_size):
        view = replace(view, resize=resize)
        if data.resident:
            images = decode_all(data.source, data.image_size, resize, threads=data.workers, bad=data.bad)
            view = replace(view, images=images.to(data.device))
    return model.to(data.device), view


def _keep_outputs(network: nn.Module, outputs: list[int], name: str) -> None:
    """Leave only these outputs of the last layer, in this order."""
    head = _last_layer(network, name)
    head.weight = nn.Parameter(head.weight.detach()[outputs].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[outputs].clone())
    head.out_features = len(outputs)


def _weights_of(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, plain or as training scripts save it."""
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    weights = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"--scorer {path} is neither the scorer.pt of a search nor a state dict, names and tensors.")
    return weights


TRANSFORMING = ("googlenet", "inception_v3")
"""Networks of torchvision whose weights want inputs that the network itself normalises once more."""


# -- the libraries -----------------------------------------------------------------------------------------------------


def _published(name: str) -> Published:
    library, _, rest = name.partition(":")
    return _torchvision(name, *rest.partition(":")[::2]) if library == "torchvision" else _timm(name, rest)


def _torchvision(name: str, network: str, weights_name: str) -> Published:
    from torchvision import models  # here: seconds to import

    names = models.list_models(module=models)
    if network not in names:
        near = get_close_matches(network, names, n=3) or names[:3]
        raise ValueError(
            f"torchvision has no classifier {network!r} (--scorer {name}); the nearest: {', '.join(near)}."
        )
    every = models.get_model_weights(network)
    if weights_name and weights_name not in every.__members__:
        raise ValueError(
            f"torchvision's {network} has no weights {weights_name!r} (--scorer {name}); it has "
            f"{', '.join(every.__members__)}."
        )
    weights = every[weights_name or "DEFAULT"]
    wants = weights.transforms()
    wanted = WantedInput(wants.crop_size[0], wants.resize_size[0], tuple(wants.mean), tuple(wants.std))

    def build(outputs: int | None = None) -> nn.Module:
        if outputs is not None:
            options = {"transform_input": True} if network in TRANSFORMING else {}
            return models.get_model(network, weights=None, num_classes=outputs, **options)
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        try:
            return models.get_model(network, weights=weights)
        except (OSError, RuntimeError) as error:  # RuntimeError: another checksum than the file's name says
            raise OSError(
                f"The weights of {name} cannot be had from {weights.url} ({error}); download that file where there is "
                f"a network, and put it at {file}."
            ) from error

    return Published(name, wanted, tuple(weights.meta["categories"]), build)


def _timm(name: str, network: str) -> Published:
    try:
        import timm
    except ImportError:
        raise ValueError(f"--scorer {name} needs the package timm: pip install timm.") from None
    if not timm.is_model(network.partition(".")[0]):
        near = get_close_matches(network, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no network {network!r} (--scorer {name}){'; the nearest: ' if near else ''}{', '.join(near)}."
        )
    try:
        config = timm.get_pretrained_cfg(network)
    except RuntimeError as error:
        raise ValueError(
            f"timm's {network.partition('.')[0]} has no weights of that name (--scorer {name}); it has "
            f"{', '.join(timm.list_pretrained(network.partition('.')[0] + '.*')) or 'none'}."
        ) from error
    if config is None or config.num_classes != len(WNIDS):
        raise ValueError(f"timm's {network} has no weights for ImageNet's 1,000 classes (--scorer {name}).")
    size = config.input_size[-1]
    resize = round(size / (config.crop_pct or 1.0))
    wanted = WantedInput(size, resize, tuple(config.mean), tuple(config.std))

    def build(outputs: int | None = None) -> nn.Module:
        if outputs is not None:
            return timm.create_model(network, pretrained=False, num_classes=outputs)
        try:
            return timm.create_model(network, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"The weights of {name} cannot be had ({str(error).splitlines()[0]}); fill timm's cache where there is "
                f"a network, or give them as a file: --scorer FILE --scorer.backbone {name}."
            ) from error

    return Published(name, wanted, imagenet_classes(), build)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes."""
    from torchvision.models import ResNet18_Weights  # here: seconds to import

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _wnid(name: str) -> str | None:
    found = re.match(r"n\d{8}(?!\d)", name)
    return found[0] if found else None


def _simple(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()

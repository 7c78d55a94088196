"""Trained networks as files that PyTorch alone can open.

In:  a network; or the path of a checkpoint, a `torch.save`d dict of plain values and tensors with at least

         "format":  "darts_space/network"
         "network": what `Network.description()` gives: kind, genotype, channels, layers, num_classes, auxiliary
         "model":   the state dict

     and, where they are known, the fields of its `Preparation`: class_names, image_size, resize, mean, std.

Out: that dict; or the network with its weights, ready to evaluate. It classifies a photograph in five lines:

    from PIL import Image
    from darts_space import load_network
    network = load_network("best.pt")
    image = network.transforms()(Image.open("photo.jpg"))  # (3, S, S)
    print(network.class_names[network(image[None]).argmax()])

A trainer may add keys of its own (optimiser, epoch, ...), which are ignored here. A file from elsewhere cannot run
code, and its description is checked before any memory is allocated for it.
"""

from __future__ import annotations

import os
import reprlib
import zipfile
from typing import Any

import torch
from torch import Tensor

from darts_space.genotype import Genotype
from darts_space.network import NETWORKS, Network
from darts_space.preparation import Preparation

FORMAT = "darts_space/network"
# Far beyond any network of this kind; more is a damaged description.
RANGES = {"channels": (1, 1 << 16), "layers": (3, 1000), "num_classes": (1, 1 << 24)}


def network_checkpoint(model: Network) -> dict[str, Any]:
    """The dict that `load_network` reads, for a trainer of your own: `torch.save(network_checkpoint(model), path)`.

    Its tensors are the model's own, not copies. (train_eval.py writes the same keys and more.)
    """
    known = {} if model.preparation is None else model.preparation.to_json()
    return {"format": FORMAT, "network": model.description(), **known, "model": model.state_dict()}


def build_network(description: Any, *, generator: torch.Generator | None = None) -> Network:
    """The network of a `Network.description()`, with new weights as its constructor draws them."""
    keys = {"kind", "genotype", "auxiliary", *RANGES}
    if not isinstance(description, dict) or set(description) != keys:
        found = list(description) if isinstance(description, dict) else description
        raise ValueError(f"A network is described by the keys {', '.join(sorted(keys))}, not {reprlib.repr(found)}.")
    kind, auxiliary = description["kind"], description["auxiliary"]
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ValueError(f"There is no network of the kind {reprlib.repr(kind)}; use {' or '.join(NETWORKS)}.")
    if not isinstance(auxiliary, bool):
        raise ValueError(f"auxiliary is {reprlib.repr(auxiliary)}; it must be true or false.")
    shape = {name: description[name] for name in RANGES}
    for name, (low, high) in RANGES.items():
        if type(shape[name]) is not int or not low <= shape[name] <= high:
            raise ValueError(f"{name} is {reprlib.repr(shape[name])}; it must be an integer from {low} to {high}.")
    genotype = Genotype.from_json(description["genotype"])
    return NETWORKS[kind](genotype, **shape, auxiliary=auxiliary, generator=generator)


def load_network(path: str | os.PathLike[str]) -> Network:
    """The network of a checkpoint, on the CPU and in evaluation mode, with its `class_names` and `transforms()`.

    ValueErrors name the file.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums that torch.save writes
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{damaged} has another checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"Cannot read the checkpoint {path}: {reason}. Check its path.") from error
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(
            f"{path} is cut short, or holds more than tensors and plain values, so it is not loaded "
            f"({type(error).__name__}); copy or write it again."
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of the format {FORMAT!r}, such as network_checkpoint makes.")
    try:
        with torch.device("meta"):  # without memory: the checkpoint's tensors become the weights
            model = build_network(checkpoint.get("network"), generator=torch.Generator("cpu"))
        _check_state(checkpoint.get("model"), model)
        model.preparation = Preparation.of_checkpoint(checkpoint)
        if model.preparation is not None and len(model.class_names) != model.num_classes:
            raise ValueError(f"it names {len(model.class_names)} classes of {model.num_classes}.")
    except ValueError as error:
        raise ValueError(f"Cannot use the checkpoint {path}: {error}") from error
    model.load_state_dict(checkpoint["model"], assign=True)
    return model.eval()


def _check_state(state: Any, model: Network) -> None:
    """Raise a ValueError unless `state` has exactly the model's names, each with a tensor of its shape."""
    wanted = model.state_dict()
    if not isinstance(state, dict) or state.keys() != wanted.keys():
        found = state if isinstance(state, dict) else {}
        odd = [name for name in wanted if name not in found] or [name for name in found if name not in wanted]
        raise ValueError(
            f"its weights are not those of the network it describes; {reprlib.repr(odd[0])} is missing or unexpected."
        )
    for name, tensor in wanted.items():
        found = state[name]
        if (
            not isinstance(found, Tensor)
            or found.shape != tensor.shape
            or found.is_floating_point() != tensor.is_floating_point()
            or (found.layout, found.device.type) != (torch.strided, "cpu")
        ):
            raise ValueError(f"{name} is not the tensor {tuple(tensor.shape)} that the network it describes needs.")

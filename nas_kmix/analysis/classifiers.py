"""Trained classifiers as analyses need them: a run folder or a checkpoint in, network, preparation and images out.

Genotypes' networks and backbones alike: `last.pt` and `best.pt` of train_eval.py, `scorer.pt` of search.py. Files are
only read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from darts_space import load_network
from darts_space.checkpoint import FORMAT as NETWORK_FORMAT
from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.folders import composed
from nas_kmix.pipeline.scorer import FORMAT as BACKBONE_FORMAT
from nas_kmix.pipeline.scorer import constants_of


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode, on the CPU, and how the images that it was trained on were prepared."""

    path: Path
    model: nn.Module
    network: dict[str, Any]
    """The network's description as plain data."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    fingerprint: str | None = None
    """That of its training images, None in a checkpoint that does not tell."""

    def prepare(self, data: ImageData) -> ImageData:
        """The same images, normalised as this network expects. Raises ValueError where they have other classes."""
        if self.class_names != data.class_names:
            raise ValueError(f"{self.path} was trained on other classes than those of --data {data.source.name}.")
        return replace(data, mean=self.mean, std=self.std)

    def same_architecture(self, other: Classifier) -> bool:
        """Whether the networks differ in their weights only; the auxiliary head, a part of training, is ignored."""
        first, second = ({**each.network, "auxiliary": None} for each in (self, other))
        return first == second


def load_classifier(path: Path) -> Classifier:
    """Read a checkpoint. Raises ValueError naming the file if it is damaged or of another kind."""
    state = files.load_tensors(path)
    kind = state.get("format")
    if kind not in (NETWORK_FORMAT, BACKBONE_FORMAT):
        raise ValueError(f"{path} is neither the checkpoint of a training nor the scorer.pt of a search.")
    with files.damage_named(path, "train it again"):
        network, size = dict(state["network"]), int(state["image_size"])
        names = tuple(composed(str(name)) for name in state["class_names"])
        inputs = (state.get("key") or {}).get("inputs") or {}
        described = {**constants_of(state), "image_size": size, "fingerprint": inputs.get("data")}
        if network["num_classes"] != len(names):  # before memory is spent on that many
            raise ValueError(f"it has {len(names)} class names, and a network of {network['num_classes']} classes")
    if kind == NETWORK_FORMAT:
        return Classifier(path, load_network(path), network, names, **described)
    with files.damage_named(path, "train it again"):
        model = build_backbone(network["backbone"], num_classes=len(names), stem=network["stem"])
        model.load_state_dict(state["model"])
    return Classifier(path, model.eval(), network, names, **described)

"""What the analyses cost: a Hessian product against a gradient, a step of PGD against a bare forward and backward pass.

    python -m benchmarks.analysis --network tiny --threads 1
    python -m benchmarks.analysis --network PC_DARTS_cifar --batch-size 32 --threads 1

The two of a pair run in turn in one process on the same generated images; a figure is the median over the pairs. A
Hessian product by double backward differentiates each of a gradient's three products once more, by both factors: it
would cost three gradients if there were only convolutions. A step of the attack needs no gradient of the weights, and
neither does the bare pass that it is compared with: 1.00 would mean that signs, projections and normalisation are free.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import command_line, generated_images, in_turn, report
from darts_space import GENOTYPES, CifarNetwork
from nas_kmix.analysis.attacks import PixelClassifier, pgd
from nas_kmix.analysis.objective import cross_entropy_objective
from nas_kmix.backbones import build_backbone
from nas_kmix.engine.compute import Compute, DeviceConfig, pick_device


@dataclass(frozen=True)
class Config:
    """What to time."""

    network: str = "tiny"
    """A backbone, or a published genotype as a network of `channels` and `layers`."""
    channels: int = 8
    layers: int = 8
    classes: int = 100
    image_size: int = 32
    batch_size: int = 128
    """Images in a gradient, a Hessian product or a step of the attack."""
    steps: int = 10
    """Steps of the attack."""
    pairs: int = 9
    channels_last: bool = False
    device: str = "cpu"
    threads: int = 0
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def main(config: Config) -> dict[str, float]:
    device = pick_device(DeviceConfig(device=config.device, threads=config.threads))
    layout = Compute(device, channels_last=config.channels_last).layout
    model = layout(_network(config).to(device).eval())
    rng = np.random.default_rng(0)
    data = generated_images(config.batch_size, config.image_size, config.classes, device, rng=rng)
    objective = cross_entropy_objective(model, data, np.arange(len(data)), chunk_size=config.batch_size)
    centre = objective.centre
    vector = torch.randn(len(centre), generator=torch.Generator().manual_seed(0)).to(device)
    works = (lambda: objective.gradient(centre), lambda: objective.hessian_product(centre, vector))
    pairs = in_turn(works, config.pairs, device)
    figures = {
        "gradient_s": statistics.median(plain for plain, _ in pairs),
        "hessian_product_s": statistics.median(full for _, full in pairs),
        "product_over_gradient": statistics.median(full / plain for plain, full in pairs),
    }

    pixels, labels = data.images.float() / 255.0, torch.as_tensor(data.labels, device=device)
    classifier = PixelClassifier(model, data.mean, data.std).to(device).eval()
    inputs = layout(data.normalise(data.images))

    def bare() -> None:
        for _ in range(config.steps):
            images = inputs.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(images), labels), images)

    def attack() -> None:
        pgd(classifier, pixels, labels, eps=8 / 255, step=2 / 255, steps=config.steps)

    pairs = in_turn((bare, attack), config.pairs, device)
    figures["attack_steps_per_s"] = statistics.median(config.steps / full for _, full in pairs)
    figures["attack_steps_over_bare"] = statistics.median(plain / full for plain, full in pairs)
    report(figures, config.json, device)
    return figures


def _network(config: Config) -> nn.Module:
    if config.network not in GENOTYPES:
        return build_backbone(config.network, num_classes=config.classes)
    generator = torch.Generator().manual_seed(0)
    return CifarNetwork(GENOTYPES[config.network], config.channels, config.layers, config.classes, generator=generator)


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))

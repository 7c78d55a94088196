"""What the memory format, contiguous gradients and depthwise kernels are worth to a genotype's network.

    python -m benchmarks.network --threads 1
    python -m benchmarks.network --genotype studies/cpu_run/genotype.json --channels 8 --batch-size 64 --threads 1
    python -m benchmarks.network --kind imagenet --input-size 224 --batch-size 4 --threads 1

The layouts run in turn in one process on the same images; a speed-up is the median over the pairs of (time in NCHW /
time in channels_last), for a training step without its optimiser and for evaluation. In channels_last, the gain of
contiguous gradients (`darts_space.fast.kernels.concatenate`) is that of (time with torch.cat / time with it), and the
gain of `darts_space.primitives.DepthwiseConv2d` that of (time with nn.Conv2d / time with it). 1.00 would mean that it
makes no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import command_line, in_turn, report
from darts_space import network, read_genotype
from darts_space.network import NETWORKS, Network
from darts_space.primitives import DepthwiseConv2d
from nas_kmix.engine.compute import DeviceConfig, pick_device


@dataclass(frozen=True)
class Config:
    """What to time."""

    genotype: str = "PC_DARTS_cifar"
    kind: Literal["cifar", "imagenet"] = "cifar"
    channels: int = 16
    layers: int = 8
    input_size: int = 32
    batch_size: int = 32
    pairs: int = 9
    device: str = "cpu"
    threads: int = 0
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def main(config: Config) -> dict[str, float]:
    device = pick_device(DeviceConfig(device=config.device, threads=config.threads))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, 3, config.input_size, config.input_size, generator=generator)
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = NETWORKS[config.kind](read_genotype(config.genotype), config.channels, config.layers)
        runs.append([each.to(device, memory_format=layout) for each in (model, images)])
    figures = {}
    for mode, step in (("training", train_step), ("evaluation", evaluate)):
        pairs = in_turn([partial(step, *run) for run in runs], config.pairs, device)
        figures[f"{mode}_images_per_second"] = config.batch_size / statistics.median(pair[1] for pair in pairs)
        figures[f"{mode}_speedup"] = statistics.median(plain / last for plain, last in pairs)
    without = {
        "gaps": mock.patch.object(network, "concatenate", partial(torch.cat, dim=1)),
        "slow_filters": mock.patch.object(DepthwiseConv2d, "forward", nn.Conv2d.forward),
    }
    for name, replaced in without.items():
        after = partial(train_step, *runs[1])
        pairs = in_turn((partial(_within, replaced, after), after), config.pairs, device)
        figures[f"training_gain_without_{name}"] = statistics.median(slow / fast for slow, fast in pairs)
    report(figures, config.json, device)
    return figures


def train_step(model: Network, images: torch.Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    logits, auxiliary = model.train()(images)
    (F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)).backward()
    model.zero_grad()


@torch.no_grad()
def evaluate(model: Network, images: torch.Tensor) -> None:
    model.eval()(images)


def _within(context: AbstractContextManager[object], work: Callable[[], object]) -> None:
    with context:
        work()


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))

"""What mixing costs: microseconds per image of every mixer, and its share of a training step.

    python -m benchmarks.mixing --threads 1
    python -m benchmarks.mixing --threads 1 --steps-only --backbones small preactresnet18 --json mixing.json

The table has K = 2, 3, 5 and 9 at 32 and 224 px, beside the same DCutMix as a Python loop over the images and beside
torchvision's CutMix and MixUp, which draw once per batch. A step's ratio is 1 + median(time of the mix) / median(time
of the step without it) in one process, since mixing is far below the noise of whole steps: 1.01 means that training
takes 1 % longer. `loop_over_vectorised` is how many times slower the loop is; `torchvision_ratio` is the time of a
DCutMix with K = 2, a box per image, over that of torchvision's CutMix, a box per batch.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/mixing.py`

from benchmarks.measure import command_line, report, seconds
from nas_kmix.backbones import build_backbone
from nas_kmix.boxes import draw_phi, nested_boxes, stick_lengths
from nas_kmix.engine.compute import DeviceConfig, pick_device
from nas_kmix.mixing import DCutMix, DMixup, SaliencyDCutMix
from nas_kmix.rivals import CutMix, Cutout, Mixup

CLASSES = 100
SOURCES = (2, 3, 5, 9)
ALPHA = 0.2
# What the paper trains with: K of Table 1 and, for Saliency-DCutMix, of Table 3.
STEP_MIXERS = {
    "dcutmix": DCutMix(k=5, alpha=0.2, num_classes=CLASSES),
    "dmixup": DMixup(k=3, alpha=1 / 3, num_classes=CLASSES),
    "saliency_dcutmix": SaliencyDCutMix(k=3, alpha=1 / 3, num_classes=CLASSES),
}
Work = Callable[[], object]


@dataclass(frozen=True)
class Config:
    """What to time."""

    batch_size: int = 128
    """Batch of 32 px images; of 224 px an eighth."""
    repeats: int = 200
    """Mixes of a 32 px batch of which the median is taken; of 224 px an eighth."""
    steps: int = 15
    """Training steps of which the median is taken."""
    backbones: tuple[str, ...] = ("small",)
    """Networks of nas_kmix.backbones whose training steps are timed; the first has no prefix in the JSON."""
    steps_only: bool = False
    """Leave the table out."""
    channels_last: bool = False
    device: str = "cpu"
    threads: int = 0
    json: Path | None = None
    """Write the figures to this file as JSON; `-` is the standard output."""


class LoopDCutMix:
    """DCutMix as one would first write it: image by image and box by box, with slices."""

    def __init__(self, k: int, alpha: float):
        self.k, self.alpha = k, alpha
        self.rng = np.random.default_rng(0)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = tuple(images.shape[2:])
        mixed, soft = images.clone(), torch.zeros(len(images), CLASSES)
        for n in range(len(images)):
            phi = draw_phi(1, self.k, self.alpha, rng=self.rng)
            boxes = nested_boxes(stick_lengths(phi), size, rng=self.rng)[0].tolist()
            area, label = size[0] * size[1], labels[n]
            for y, x, h, w in boxes:
                partner = int(self.rng.integers(len(images)))
                mixed[n, :, y : y + h, x : x + w] = images[partner, :, y : y + h, x : x + w]
                soft[n, label] += (area - h * w) / (size[0] * size[1])
                area, label = h * w, labels[partner]
            soft[n, label] += area / (size[0] * size[1])
        return mixed, soft


def mixers(device: torch.device) -> dict[str, Work]:
    """The mixers by name, ours and torchvision's, with the same call. The loop is for the CPU."""
    settings = {"alpha": ALPHA, "num_classes": CLASSES}
    table: dict[str, Work] = {}
    for k in SOURCES:
        table[f"DCutMix K={k}"] = DCutMix(k=k, **settings)
        table[f"SaliencyDCutMix K={k}"] = SaliencyDCutMix(k=k, **settings)
        table[f"DMixup K={k}"] = DMixup(k=k, **settings)
        if device.type == "cpu":
            table[f"loop DCutMix K={k}"] = LoopDCutMix(k, ALPHA)
    table |= {"CutMix": CutMix(**settings), "Mixup": Mixup(**settings), "Cutout": Cutout(num_classes=CLASSES)}
    table |= {"torchvision CutMix": v2.CutMix(**settings), "torchvision MixUp": v2.MixUp(**settings)}
    return table


def interleaved(works: dict[str, Work], rounds: int, device: torch.device, *, often: int = 1) -> dict[str, float]:
    """Median seconds of each, run in turn, all but the first `often` times, so that all meet the same disturbances."""
    times: dict[str, list[float]] = {name: [] for name in works}
    first = next(iter(works))
    for turn in range(-1, rounds):  # one turn to warm up
        for name, work in works.items():
            for _ in range(1 if name == first else often):
                taken = seconds(work, device)
                if turn >= 0:
                    times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def batch_of(size: int, n: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    images = torch.randn(n, 3, size, size, generator=generator).to(config.device, memory_format=layout)
    return images, (torch.arange(n) % CLASSES).to(config.device)


def per_image(size: int, config: Config) -> dict[str, float]:
    """Microseconds per image of every mixer; the loop, slower, is repeated less often."""
    parts = 1 if size == 32 else 8
    n, repeats = config.batch_size // parts, max(1, config.repeats // parts)
    images, labels = batch_of(size, n, config)
    works = {name: lambda mix=mix: mix(images, labels) for name, mix in mixers(images.device).items()}
    slow = {name: work for name, work in works.items() if name.startswith("loop")}
    seconds = interleaved({name: work for name, work in works.items() if name not in slow}, repeats, images.device)
    seconds |= interleaved(slow, max(5, repeats // 10), images.device)
    return {name: 1e6 * value / n for name, value in seconds.items()}


def step_ratios(backbone: str, config: Config) -> dict[str, float]:
    """1 + time of the mix / time of a training step at 32 px, for the mixers and K of the paper."""
    images, labels = batch_of(32, config.batch_size, config)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = build_backbone(backbone, num_classes=CLASSES).to(images.device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    soft_labels = F.one_hot(labels, CLASSES).float()

    def step() -> None:
        F.cross_entropy(model(images), soft_labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    works = {name: lambda mix=mix: mix(images, labels) for name, mix in STEP_MIXERS.items()}
    often = -(-config.repeats // config.steps)
    medians = interleaved({"step": step, **works}, config.steps, images.device, often=often)
    figures = {f"{name}_step_ratio": 1.0 + medians[name] / medians["step"] for name in works}
    return figures | {"step_us_per_image": 1e6 * medians["step"] / config.batch_size}


def main(config: Config) -> dict[str, float]:
    config = replace(config, device=str(pick_device(DeviceConfig(device=config.device, threads=config.threads))))
    figures: dict[str, float] = {}
    for index, backbone in enumerate(config.backbones):
        prefix = "" if index == 0 else f"{backbone}_"
        figures |= {prefix + name: value for name, value in step_ratios(backbone, config).items()}
    table: dict[int, dict[str, float]] = {}
    if not config.steps_only:
        table = {size: per_image(size, config) for size in (32, 224)}
        small = table[32]
        if config.device == "cpu":
            slower = {k: small[f"loop DCutMix K={k}"] / small[f"DCutMix K={k}"] for k in (3, 5)}
            figures |= {f"loop_over_vectorised_k{k}": value for k, value in slower.items()}
        figures["torchvision_ratio"] = small["DCutMix K=2"] / small["torchvision CutMix"]
    if config.json != Path("-"):
        for name in table.get(32, {}):
            print(f"{name:<24}" + "".join(f"{times[name]:10.1f} us at {size} px" for size, times in table.items()))
    report(figures, config.json, config.device)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))

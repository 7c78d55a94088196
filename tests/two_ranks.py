"""What each process runs in test_distributed.py; alone, it is the single process to compare with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import draw_pixels
from torch import nn
from torch.nn import functional as F

from darts_space import GENOTYPES, CifarNetwork
from darts_space.fast.norm import join_norms
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.distributed import joined
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.keys import stage_key
from nas_kmix.engine.learner import OptimConfig, Recipe
from nas_kmix.engine.log import Log
from nas_kmix.engine.run import Run
from nas_kmix.engine.sources import Source
from nas_kmix.engine.training import train

CLASSES, SIZES = 3, (1, 2, 7, 20)
CPU = torch.device("cpu")


class RecordedLog(Log):
    """Logs values with all digits."""

    def add(self, stage, epoch, **values):
        self.curve = [*getattr(self, "curve", []), values]
        super().add(stage, epoch, **values)


def make_data(n):
    pixels, labels = draw_pixels(n, 32, 32, 3), np.arange(n) % CLASSES
    source = Source("generated", "train", labels, tuple("abc"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageData(source, 32, (0.5,) * 3, (0.3,) * 3, CPU, images)


def make_network():
    return CifarNetwork(GENOTYPES["PC_DARTS_cifar"], 2, 3, CLASSES, generator=torch.Generator().manual_seed(0))


def frozen_double(network):
    """In float64, with BatchNorm in eval mode."""
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    return network


def mix(images, labels, rng):
    """Blends across the whole batch, in float64."""
    partner, weight = torch.as_tensor(rng.permutation(len(images))), float(rng.uniform(0.5, 1.0))
    images, one_hot = images.double(), F.one_hot(labels, CLASSES).double()
    return torch.lerp(images[partner], images, weight), torch.lerp(one_hot[partner], one_hot, weight)


def trained(network, run, stage, recipe, epochs=3, **options):
    """The states of a network and of its average after a training."""
    config = OptimConfig(epochs=epochs, batch_size=8, lr=0.1)  # 17 images: 8, 8 and 1, which leaves a process without
    options |= {"mix": mix, "seed": 0, "run": run, "stage": stage, "key": stage_key(stage, {}, {}), "recipe": recipe}
    average = train(network, make_data(17), config, Augmentation(cutout=8), **options).model
    return {"model": network.state_dict(), "average": average.state_dict()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with joined(CPU) as world, Run(out, stages=("train", "joint"), world=world) as run:
        run.log = RecordedLog(out, writes=world.main)
        evaluations = [evaluate(make_network(), make_data(n), world=world, batch_size=3) for n in SIZES]
        recipe = Recipe(grad_clip=1.0, label_smoothing=0.1, drop_path=0.3, ema=0.8, accumulate=2)
        state = trained(frozen_double(make_network()), run, "train", recipe) | {"curve": run.log.curve}
        network, recipe = make_network().double(), replace(recipe, accumulate=1)  # BatchNorm sees each part alone
        if world.size > 1:
            join_norms(network)
        state["joint"] = trained(network, run, "joint", recipe, epochs=1, joint_norms=world.size > 1)
        files.save_tensors(out / f"rank{world.rank}.pt", {**state, "evaluations": evaluations})

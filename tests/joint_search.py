"""What each process runs in test_joint_search.py; alone, it is the single process to compare with."""

from pathlib import Path

import numpy as np
import torch
from two_ranks import CPU, make_data

from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.distributed import joined
from nas_kmix.engine.run import Run
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.one_search import SearchConfig, search_once

IMAGES = 30
FIRST_ORDER = {"batch_size": 8, "rest_steps": 2, "arch_steps": 8, "sync_batchnorm": True}
CASES = {
    "first-order": FIRST_ORDER,
    "small-halves": {**FIRST_ORDER, "arch_steps": 1, "batch_size": 64, "edges_by": "removal"},  # of 19 and 11 images
    "second-order": {**FIRST_ORDER, "rest_steps": 0, "arch_steps": 2, "unrolled": True},
    "apart": {**FIRST_ORDER, "rest_steps": 0, "arch_steps": 1, "sync_batchnorm": False},
}


def config_of(case: str) -> SearchConfig:
    shape = {"search_size": 4, "channels": 4, "partial": 2, "layers": 3}
    return SearchConfig(
        **CASES[case], **shape, record_every=3, arch_lr=0.05, lr=0.1, augmentation=Augmentation(cutout=8)
    )


class Double(Compute):
    """Networks and images in float64."""

    def layout(self, tensor_or_model):
        return super().layout(tensor_or_model).double()


class Recorded(Run):
    """Saves the states of all processes, not only rank 0's."""

    def save_checkpoint(self, name, key, state):
        super().save_checkpoint(name, key, state)
        files.save_tensors(self.path(f"rank{self.world.rank}.pt"), state["search"])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    data, compute = make_data(IMAGES), Double(CPU)
    halves = Halves(np.arange(19), np.arange(19, IMAGES), identity="test")
    with joined(CPU) as world:
        for case in CASES:
            with Recorded(out / case, stages=("search",), compute=compute, world=world) as run:
                genotype = search_once("search", out / case, config_of(case), halves, data, run=run, key={})
                if world.main:
                    genotype.save(out / case / "genotype.json")

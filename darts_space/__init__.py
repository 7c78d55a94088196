"""The DARTS search space and its search, standing alone: PyTorch and nothing else.

`SuperNet` holds every candidate cell, `Search` trains it on two streams of batches, `SuperNet.genotype()` reads
the result, a `Genotype` that saves to and loads from JSON:

    search = Search(SuperNet(num_classes=100), BilevelConfig())
    for epoch in range(search.config.epochs):
        search.start_epoch(epoch)
        for train_batch, val_batch in batches(epoch):
            search.step(train_batch, val_batch)
    search.model.genotype().save("genotype.json")
"""

from darts_space.bilevel import BilevelConfig, Search, StepResult, cosine_lr, scaled_lr
from darts_space.derivation import Diagnostics, derive, diagnose
from darts_space.genotype import GENOTYPES, PRIMITIVES, Genotype, random_genotype, read_genotype
from darts_space.primitives import build_operation
from darts_space.supernet import ARCHITECTURE_NAMES, SuperNet

__all__ = [
    "ARCHITECTURE_NAMES",
    "GENOTYPES",
    "PRIMITIVES",
    "BilevelConfig",
    "Diagnostics",
    "Genotype",
    "Search",
    "StepResult",
    "SuperNet",
    "build_operation",
    "cosine_lr",
    "derive",
    "diagnose",
    "random_genotype",
    "read_genotype",
    "scaled_lr",
]

"""The DARTS search space and its search, which need nothing but PyTorch.

`SuperNet` holds every candidate cell, `Search` trains it on two streams of batches, and `SuperNet.genotype()` reads
off the result, a `Genotype` that is saved to and loaded from JSON:

    search = Search(SuperNet(num_classes=100), BilevelConfig())
    for train_batch, val_batch in batches:  # search.config.steps of them
        search.step(train_batch, val_batch)
    search.model.genotype().save("genotype.json")

A genotype becomes a `CifarNetwork` or an `ImageNetNetwork`, with a `cost` and, once trained, a checkpoint that
`load_network` opens, with the names of its classes and the transforms of its images.
"""

from darts_space.bilevel import Search, StepResult
from darts_space.budget import cost, parse_macs, widest
from darts_space.checkpoint import build_network, load_network, network_checkpoint
from darts_space.derivation import Diagnostics, derive, diagnose
from darts_space.fast.conversion import from_plain, to_plain
from darts_space.fast.supernet import SuperNet
from darts_space.genotype import GENOTYPES, PRIMITIVES, Genotype, random_genotype, read_genotype
from darts_space.network import CifarNetwork, ImageNetNetwork, Network
from darts_space.plain import PlainSuperNet
from darts_space.preparation import Preparation
from darts_space.primitives import build_operation
from darts_space.search_network import ARCHITECTURE_NAMES
from darts_space.settings import BilevelConfig, learning_rate, scaled_lr

__all__ = [
    "ARCHITECTURE_NAMES",
    "GENOTYPES",
    "PRIMITIVES",
    "BilevelConfig",
    "CifarNetwork",
    "Diagnostics",
    "Genotype",
    "ImageNetNetwork",
    "Network",
    "PlainSuperNet",
    "Preparation",
    "Search",
    "StepResult",
    "SuperNet",
    "build_network",
    "build_operation",
    "cost",
    "derive",
    "diagnose",
    "from_plain",
    "learning_rate",
    "load_network",
    "network_checkpoint",
    "parse_macs",
    "random_genotype",
    "read_genotype",
    "scaled_lr",
    "to_plain",
    "widest",
]

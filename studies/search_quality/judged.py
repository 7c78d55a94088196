"""What the independent judge says of a genotype, and the genotypes of a line of results.jsonl.

The judge is NAS-Bench-301's surrogate in a folder of its own, which the environment variable NAS_KMIX_JUDGE names: a
module `judge` with `session()` and `judge(session, genotype)`. It takes onnxruntime, which nothing else here needs.
"""

from __future__ import annotations

import base64
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from darts_space import ARCHITECTURE_NAMES, Genotype, derive
from darts_space.derivation import EdgesBy

NAMES = ("percentile", "percentile_equal_params", "z")  # what the tables give of a verdict
ALPHA = ((14, 8), (14, 8), (14,), (14,))  # alphas_normal, alphas_reduce, betas_normal, betas_reduce
REMOVAL = ((14,), (14,))  # of the normal and of the reduction cell


def unpacked(text: str, shapes: tuple[tuple[int, ...], ...] = ALPHA) -> list[torch.Tensor]:
    """The tables of `training.packed`, small enough that softmax is linear in them."""
    flat = torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)) * 1e-3
    parts = flat.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def genotypes(reading: Mapping[str, Any]) -> dict[EdgesBy, Genotype]:
    """The genotype of a reading or record, by what chooses its edges."""
    tables = unpacked(reading["alpha"] if "alpha" in reading else reading["t"])
    rules: dict[EdgesBy, Any] = {"alpha": None, "alpha-beta": None, "inputs": None}
    if "removal" in reading:
        rules["removal"] = tuple(unpacked(reading["removal"], REMOVAL))
    named = dict(zip(ARCHITECTURE_NAMES, tables, strict=True))
    return {rule: derive(**named, edges_by=rule, removal=removal) for rule, removal in rules.items()}


@functools.cache
def _judge():
    folder = os.environ.get("NAS_KMIX_JUDGE")
    if not folder:
        raise ValueError("NAS_KMIX_JUDGE names no folder: the judge's, with judge.py and its model, is needed here.")
    sys.path.insert(0, folder)
    module = importlib.import_module("judge")
    return module, module.session()


@functools.cache
def verdict(found: Genotype) -> dict[str, Any]:
    """z, percentile, percentile_equal_params, pools_normal, skips_normal, ..."""
    module, session = _judge()
    return module.judge(session, {"normal": found.normal, "reduce": found.reduce})

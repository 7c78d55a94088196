"""Controls by the judge alone: what a wiring is worth without a search, and a search without its edges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from darts_space import ARCHITECTURE_NAMES, derive
from darts_space.cell import PRIMITIVES
from studies.cells import mean_and_error
from studies.search_quality.judged import NAMES, genotypes, unpacked, verdict

DRAWS, EDGE_DRAWS = 1000, 10  # of random operations, and of random edges for every run
CONVOLUTIONS = tuple(name for name in PRIMITIVES if "conv" in name)
Line = Mapping[str, Any]


def wiring(normal: Sequence[str] = PRIMITIVES, reduce: Sequence[str] = PRIMITIVES) -> dict[str, Any]:
    """Random ones of each cell's operations on the wiring that `--edges-by inputs` prescribes."""
    rng = np.random.default_rng(0)
    tables = {name: torch.zeros(14, 8) if name.startswith("alpha") else torch.zeros(14) for name in ARCHITECTURE_NAMES}
    allowed = {"alphas_normal": np.isin(PRIMITIVES, normal), "alphas_reduce": np.isin(PRIMITIVES, reduce)}
    said = []
    for _ in range(DRAWS):
        for name, those in allowed.items():
            tables[name] = torch.from_numpy(rng.random((14, 8)) * those)
        said.append(verdict(derive(**tables, edges_by="inputs")))
    # Few random architectures are as large as some of them, so that they have no percentile among those.
    return {name: mean_and_error([one[name] for one in said if one[name] is not None], 3) for name in NAMES}


def edges(runs: list[Line]) -> dict[str, Any]:
    """What other choices of edges would have made of the last records; alpha chooses the operations in all of them.

    less_random: the difference from edges drawn at random, paired by run.
    """
    rng = np.random.default_rng(0)
    z: dict[str, list[float]] = defaultdict(list)
    for line in runs:
        last = line["records"][-1]
        for rule, found in genotypes(last).items():
            z[rule].append(verdict(found)["z"])
        tables = dict(zip(ARCHITECTURE_NAMES, unpacked(last["alpha"]), strict=True))
        draws = [(torch.from_numpy(rng.random(14)), torch.from_numpy(rng.random(14))) for _ in range(EDGE_DRAWS)]
        random = [verdict(derive(**tables, edges_by="removal", removal=edges))["z"] for edges in draws]
        z["random"].append(float(np.mean(random)))
    table: dict[str, Any] = {rule: mean_and_error(values, 3) for rule, values in z.items()}
    for rule in z.keys() - {"random"}:
        if len(z[rule]) == len(z["random"]):
            table[rule]["less_random"] = mean_and_error(np.subtract(z[rule], z["random"]).tolist(), 3)
    return table

"""Search for an architecture on a proxy dataset: images in, `genotype.json` and `result.json` out.

    python search.py --out runs/digits                                # handwritten digits, a minute on two cores
    python search.py --preset cpu --data cifar100 --out runs/c100     # a small scorer and supernet
    python search.py --preset paper --data cifar100 --out runs/paper  # the paper's settings, for a GPU
    python search.py --preset paper --data cifar100 --stop-after proxy --export-list proxy.tsv

Each stage writes a file that the next one reads: scorer.pt, scores.npz, proxy.json, candidates.json, genotype.json. The
last one, the finals, trains the candidates beside random architectures and says whether the search was worth it. Run
the same command again to resume; finished stages are skipped. --scorer, --scores and --proxy start from the results of
another run. Under torchrun all processes share every stage: images, batches of the search, candidates of the finals.
"""

from __future__ import annotations

import sys
from functools import partial

from nas_kmix.commands.search import PRESETS, Config, Result, parse, run
from nas_kmix.commands.search import main as _main

__all__ = ["PRESETS", "Config", "Result", "main", "parse", "run"]

main = partial(_main, description=__doc__)

if __name__ == "__main__":
    sys.exit(main())

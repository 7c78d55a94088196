"""Train or evaluate the network of a genotype, or a backbone: images in, `last.pt`, `best.pt` and `metrics.csv` out.

    python train_eval.py --genotype runs/digits/genotype.json --out runs/digits-net      # digits, a minute on a laptop
    python train_eval.py --preset cpu --genotype PC_DARTS_cifar --data cifar100 --out runs/net
    python train_eval.py --preset cifar --genotype runs/c100/genotype.json --data cifar100 --out runs/full  # for a GPU
    python train_eval.py --preset imagenet --genotype PC_DARTS_image --data /data/imagenet --max-macs 600M --out runs/in
    python train_eval.py --preset pyramidnet110-cifar100-dcutmix --out runs/cell  # a cell of the paper's tables
    python train_eval.py --eval-only runs/net/best.pt --data cifar100

The same command again resumes. `best.pt` is the epoch with the highest accuracy on the split `val`, or on a held-out
share of the training images where there is none; test images are only reported on. The last line is JSON.
"""

from __future__ import annotations

import sys
from functools import partial

from nas_kmix.commands.train import PRESETS, Config, parse, run
from nas_kmix.commands.train import main as _main

__all__ = ["PRESETS", "Config", "main", "parse", "run"]

main = partial(_main, description=__doc__)

if __name__ == "__main__":
    sys.exit(main())

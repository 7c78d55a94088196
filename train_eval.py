"""Train or evaluate a backbone or the network of a genotype: images in, `last.pt`, `best.pt` and `metrics.csv` out.

    python train_eval.py --genotype runs/digits/genotype.json --out runs/digits-net      # digits, a minute on a laptop
    python train_eval.py --preset cpu --genotype PC_DARTS_cifar --data cifar100 --out runs/net
    python train_eval.py --preset cifar --genotype runs/c100/genotype.json --data cifar100 --out runs/full  # for a GPU
    python train_eval.py --preset imagenet --genotype PC_DARTS_image --data /data/imagenet --max-macs 600M --out runs/in
    python train_eval.py --preset pyramidnet110-cifar100-dcutmix --out runs/cell  # a row of the paper's tables
    python train_eval.py --eval-only runs/net/best.pt --data cifar100

Run the same command again to resume. `best.pt` holds the epoch with the highest accuracy on the val split or, without
one, on held-out training images; test accuracy is only reported. The last line of the output is JSON.
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

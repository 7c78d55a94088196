"""What each process of `torchrun` runs in test_distributed.py: search.py with small shards and a save after each."""

import sys

import search
from nas_kmix import scoring
from nas_kmix.engine import run

IMAGES_PER_SHARD = 4


def main(argv: list[str]) -> int:
    scoring.IMAGES_PER_SHARD = IMAGES_PER_SHARD
    run.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    return search.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

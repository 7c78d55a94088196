"""What each process of `torchrun` runs in test_distributed.py: one of them is killed in every attempt but the last."""

import os
import signal
import sys

import torch

from nas_kmix.engine.distributed import joined


def main(victim: int) -> None:
    left = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) - int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with joined(torch.device("cpu")) as world:
        world.barrier()
        if left and world.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        assert world.total(world.rank) == [1.0]


if __name__ == "__main__":
    main(int(sys.argv[1]))

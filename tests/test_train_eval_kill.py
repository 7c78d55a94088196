"""train_eval.py killed at random moments and run again: the weights and the log of a run left alone."""

import random
import shlex
import signal
import time

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from processes import ended, start, wait_for

import train_eval
from nas_kmix.engine import files

FLAGS = shlex.split(
    "--genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 6 --batch-size 8 --val-share .2 "
    "--drop-path .2 --ema .9 --mix dcutmix --mix-k 2 --threads 1 --device cpu -j 0"
)


def outcome(folder):
    states = [torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt")]
    hashes = [files.hash_tensors(state[kind]) for state in states for kind in ("model", "unaveraged")]
    return hashes, (folder / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_it_ends_the_same(server, tmp_path, seed):
    np.savez(tmp_path / "x.npz", train_images=draw_pixels(60, 32, 32, 3), train_labels=np.arange(60) % 3)
    argv = [*FLAGS, "--data", str(tmp_path / "x.npz"), "--out"]
    log, alone, folder = tmp_path / "log", tmp_path / "alone", tmp_path / "run"
    start_time = time.monotonic()
    assert ended(start(server, [*argv, str(alone)], log, main=train_eval.main)) == 0, log.read_text()
    rng, span = random.Random(seed), (time.monotonic() - start_time) / 6
    for _ in range(5):
        process = start(server, [*argv, str(folder)], log, main=train_eval.main)
        wait_for(process, lambda: log.exists() and "\ntrain: " in log.read_text())
        time.sleep(rng.uniform(0.0, span))
        process.kill()
        assert ended(process) == -signal.SIGKILL, "it was to be killed at work"
        for path in folder.glob("*.pt"):
            assert torch.load(path, weights_only=True)["key"]
    assert ended(start(server, [*argv, str(folder)], log, main=train_eval.main)) == 0, log.read_text()
    assert "resumed after" in log.read_text()
    assert outcome(folder) == outcome(alone)

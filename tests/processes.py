"""Programs in their own processes, for tests that kill them: start, wait, and compare what a run leaves.

They are forked from a server that has imported everything already, so that a kill falls into the work and not into
seconds of imports. They save after every step, which an ordinary run does once a minute.
"""

import csv
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import search
from nas_kmix import scoring
from nas_kmix.engine import run as run_module

ROOT = Path(search.__file__).parent
IMAGES = 96
TINY = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --scorer.epochs 2 --scorer.batch-size 8 --scoring.draws 4 --ratio .4 "
    "--channels 2 --partial 2 --layers 3 --rest-steps 2 --arch-steps 2 --record-every 2 --batch-size 8 --no-finals"
)
STAGES = ("scorer", "scoring", "selection", "search")
PATIENCE = 120  # seconds until a process that hangs fails its test


def draw_images() -> tuple[np.ndarray, np.ndarray]:
    """Noise with one brighter channel, which gives the class away."""
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % 3
    images = rng.integers(0, 130, (IMAGES, 16, 16, 3))
    images[np.arange(IMAGES), :, :, labels] += 100
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    images, labels = draw_images()
    np.savez(path, train_images=images, train_labels=labels)
    return path


def command(data: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--out", str(out), *TINY]


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """Where processes are forked from: it has imported search.py and holds no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search", "train_eval", "torch.utils.tensorboard"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for its modules here, and starts with the first one
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        process = context.Process(target=int)
        process.start()
        process.join()
    return context


def _child(argv: list[str], log: Path, largest_file: int | None, main) -> None:
    """The command line, in its own process and process group, with both streams in `log`."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the command line's own, for the workers of a DataLoader
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore, which a killed process would leave in the system
    run_module.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    scoring.IMAGES_PER_SHARD = 16
    if largest_file is not None:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(argv))


def start(server, argv: list[str], log: Path, largest_file: int | None = None, main=search.main):
    log.unlink(missing_ok=True)
    process = server.Process(target=_child, args=(argv, log, largest_file, main))
    process.start()
    return process


def ended(process) -> int:
    """Its exit code; minus the signal that killed it."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


def completed(server, argv: list[str], log: Path) -> None:
    assert ended(start(server, argv, log)) == 0, log.read_text()


def wait_for(process, reached) -> None:
    """Wait until `reached()` holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.exitcode is None and not reached() and time.monotonic() < deadline:
        time.sleep(0.001)


def has_reached(stage: str, log: Path, folder: Path) -> bool:
    """Whether a stage has begun. Selection prints nothing before its work: it begins where scoring has ended."""
    if stage == "selection":
        return (folder / "scores.npz").exists() and has_reached("scoring", log, folder)
    return log.exists() and f"\n{stage}: " in log.read_text()


# -- what they leave ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(server, npz, tmp_path_factory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    completed(server, command(npz, folder), folder.parent / "log")
    return folder


def assert_equal(folder: Path, alone: Path) -> None:
    """The same results to the bit, the same rows of the log, and nothing left over."""
    for name in ("proxy.json", "genotype.json", "genotypes.jsonl", "metrics.csv"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    for name in ("scores.npz", "alphas.npz"):
        with np.load(folder / name) as one, np.load(alone / name) as two:
            assert one.files == two.files
            assert all(np.array_equal(one[key], two[key]) for key in one.files), name
    assert not list(folder.rglob("*.part")) and not (folder / "checkpoints").exists()
    bill, expected = (json.loads((path / "cost.json").read_text())["stages"] for path in (folder, alone))
    for stage in STAGES:  # what was killed has been paid for
        assert bill[stage]["images_forward"] >= expected[stage]["images_forward"], stage


def assert_whole(folder: Path) -> None:
    """In a run that was killed, every file with a final name can be read."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                assert [archive[name] for name in archive.files]
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["key"]
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                assert all(None not in row and None not in row.values() for row in csv.DictReader(file))

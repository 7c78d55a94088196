"""search.py in processes of its own: killed at random moments, interrupted, out of disk space, and run again.

The processes are forked from a server that has imported everything already, so that a kill falls into the work and
not into seconds of imports. They save after every step, which an ordinary run does once a minute. One test takes the
plain command line.
"""

import csv
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import search
from nas_kmix import scoring
from nas_kmix.engine import run as run_module

resource = pytest.importorskip("resource", reason="Windows has no such signals and limits")
ROOT = Path(search.__file__).parent
IMAGES = 96
TINY = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --scorer.epochs 2 --scorer.batch-size 8 --scoring.draws 4 --ratio .4 "
    "--channels 2 --partial 2 --layers 3 --epochs 2 --batch-size 8"
)
STAGES = ("scorer", "scoring", "selection", "search")
PATIENCE = 120  # seconds until a process that hangs fails its test


def draw_images() -> tuple[np.ndarray, np.ndarray]:
    """Noise with one brighter channel, which tells the class."""
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
    """Until `reached()` holds or the process is gone."""
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
    """A run that nobody disturbed."""
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
    """Every file that has its final name can be read, in the midst of a run that was killed."""
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


def kill_and_rerun(server, npz: Path, alone: Path, folder: Path, stages: list[str], seed: int) -> None:
    """Kill one process per entry of `stages`, at a random moment after that stage has begun; then run to the end."""
    rng = random.Random(seed)
    wall = {stage: cost["wall_s"] for stage, cost in json.loads((alone / "cost.json").read_text())["stages"].items()}
    log = folder.parent / "log"
    killed = 0
    for attempt in range(3 * len(stages)):
        if killed == len(stages):
            break
        stage = stages[killed]
        process = start(server, command(npz, folder), log)
        wait_for(process, lambda stage=stage: has_reached(stage, log, folder))
        time.sleep(rng.uniform(0.0, wall[stage] / stages.count(stage)))
        process.kill()
        code = ended(process)
        print(f"attempt {attempt}, {stage}: {code}, {sorted(path.name for path in folder.glob('checkpoints/*'))}")
        assert code in (0, -signal.SIGKILL), log.read_text()
        assert_whole(folder)
        killed += code != 0
        if code == 0:  # faster than the kill: that counts as a run, and the next kills get a new one
            assert_equal(folder, alone)
            shutil.rmtree(folder)
    assert killed == len(stages)
    completed(server, command(npz, folder), log)
    assert_equal(folder, alone)


def test_killed_once_in_each_long_stage(server, npz, alone, tmp_path):
    kill_and_rerun(server, npz, alone, tmp_path / "run", ["scorer", "scoring", "search"], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_over_all_stages(seed, server, npz, alone, tmp_path):
    stages = ["scorer"] * 3 + ["scoring"] * 2 + ["selection"] * 2 + ["search"] * 3
    kill_and_rerun(server, npz, alone, tmp_path / "run", stages, seed)


@pytest.mark.parametrize(("signum", "stage"), [(signal.SIGINT, "scorer"), (signal.SIGTERM, "search")])
def test_a_signal_from_outside_saves_and_ends(signum, stage, server, npz, tmp_path):
    """How the rerun ends is tested in test_pipeline.py, with signals at given steps."""
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(server, command(npz, folder), log)
    wait_for(process, lambda: has_reached(stage, log, folder))
    os.kill(process.pid, signum)
    assert ended(process) == 128 + signum
    said = log.read_text()
    assert f"stopped by {signum.name}; the same command goes on from here" in said and "Traceback" not in said
    assert (folder / "checkpoints" / f"{stage}.pt").exists()
    assert_whole(folder)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_left_to_the_main_process(signum, server, tmp_path):
    """Ctrl-C and job schedulers signal the processes that decode images, too."""
    for i, (image, label) in enumerate(zip(*draw_images(), strict=True)):
        path = tmp_path / "images" / "train" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = [*command(tmp_path / "images", folder), "--max-resident-gb", "0", "-j", "2", "--scorer.epochs", "200"]
    process = start(server, argv, log)
    wait_for(process, lambda: "judging by the first steps" in log.read_text() if log.exists() else False)
    os.killpg(process.pid, signum)
    assert ended(process) == 128 + signum, log.read_text()
    assert log.read_text().count("finishing the step") == 1 and "Traceback" not in log.read_text()
    assert (folder / "checkpoints" / "scorer.pt").exists()


def test_a_full_disk_is_one_sentence_and_nothing_half_written(server, npz, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert ended(start(server, command(npz, folder), log, largest_file=100_000)) == 1  # smaller than any checkpoint
    said = log.read_text()
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and "scorer.pt could not be written" in last and "Traceback" not in said
    names = {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("events.out.")}
    assert names == {".lock", "config.json", "env.json", "cost.json"}
    assert_whole(folder)


def test_the_command_line_ends_with_its_exit_code(npz, tmp_path):
    """The one test of `python search.py` itself."""
    argv = [sys.executable, str(ROOT / "search.py"), *command(npz, tmp_path), "--ratio", "2"]
    process = subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert "--ratio" in process.stderr and "Traceback" not in process.stderr and not list(tmp_path.iterdir())

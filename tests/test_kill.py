"""search.py in processes of its own: killed at random moments, interrupted, out of disk space, and run again.

One test takes the plain command line.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import (
    ROOT,
    assert_equal,
    assert_whole,
    command,
    completed,
    draw_images,
    ended,
    has_reached,
    start,
    wait_for,
)

pytest.importorskip("resource", reason="Windows has no such signals and limits")


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
    assert f"stopped by {signum.name}; run the same command again to resume" in said and "Traceback" not in said
    assert (folder / "checkpoints" / f"{stage}.pt").exists()
    assert_whole(folder)


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
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

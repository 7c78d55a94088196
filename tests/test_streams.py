"""Streams and environments that are not as usual, with the plain command line."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import draw_pixels
from processes import ROOT, TINY


@pytest.fixture
def command(tmp_path):
    """A search whose class names and folder no ASCII terminal can show."""
    names = np.array(["añil", "朱", "vert"])
    arrays = {"train_images": draw_pixels(24, 16, 16, 3), "train_labels": np.arange(24) % 3, "class_names": names}
    np.savez(tmp_path / "set.npz", **arrays)
    out = tmp_path / "läuft"
    return out, [sys.executable, str(ROOT / "search.py"), "--data", str(tmp_path / "set.npz"), "--out", str(out), *TINY]


def run(argv, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(argv, env=env, capture_output=True, text=True)


def test_characters_that_stdout_lacks_do_not_fail_a_run(command):
    out, argv = command
    ended = run(argv, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert ended.returncode == 0, ended.stderr
    assert "genotype     " in ended.stdout and "l\\xe4uft" in ended.stdout and (out / "genotype.json").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_fail_a_run(closed, command):
    out, argv = command
    ended = run(["sh", "-c", f"{shlex.join(argv)} {closed}"])
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert (out / "genotype.json").exists()


@pytest.mark.parametrize(("size", "said"), [("2", "but no RANK, MASTER_ADDR, MASTER_PORT; start"), ("x", "unset it")])
def test_an_environment_that_torchrun_does_not_make_is_a_sentence(size, said, command):
    out, argv = command
    ended = run(argv, WORLD_SIZE=size)
    assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert not out.exists()

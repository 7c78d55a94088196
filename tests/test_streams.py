"""Streams and environments that are not as usual, with the plain command line."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from processes import ROOT, TINY

from darts_space import GENOTYPES
from nas_kmix.engine.distributed import is_main, joined


@pytest.fixture
def command(tmp_path):
    """A search whose class names and folder no ASCII terminal can show."""
    names = np.array(["añil", "朱", "vert"])
    arrays = {"train_images": draw_pixels(24, 16, 16, 3), "train_labels": np.arange(24) % 3, "class_names": names}
    np.savez(tmp_path / "set.npz", **arrays)
    out = tmp_path / "läuft"
    return out, [sys.executable, str(ROOT / "search.py"), "--data", str(tmp_path / "set.npz"), "--out", str(out), *TINY]


def run(argv, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(argv, env=env, capture_output=True, text=True)


def test_characters_that_stdout_lacks_do_not_fail_a_run(command):
    out, argv = command
    ended = run(argv, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert ended.returncode == 0, ended.stderr
    assert "genotype     " in ended.stdout and "l\\xe4uft" in ended.stdout and (out / "genotype.json").exists()


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-")), ">&- 2>&-"]
)
def test_closed_streams_do_not_fail_a_run(closed, command):
    out, argv = command
    ended = run(["sh", "-c", f"{shlex.join(argv)} {closed}"])
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert (out / "genotype.json").exists()


@pytest.mark.slow
def test_characters_that_stdout_lacks_do_not_fail_an_analysis(tmp_path):
    path = tmp_path / "läuft.json"
    GENOTYPES["DARTS_V1"].save(path)
    ended = run([sys.executable, "-m", "nas_kmix.analysis.cells", "niemand.jsön"], PYTHONIOENCODING="ascii")
    assert ended.returncode == 2 and "nas_kmix" not in ended.stderr and "niemand.js\\xf6n" in ended.stderr
    ended = run([sys.executable, "-m", "nas_kmix.analysis.cells", path], PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and "normal" in ended.stdout, ended.stderr


def read_one_line(argv):
    """Exit code, what was read, and what was said to stderr, where standard output ends after its first line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(120), line, said


@pytest.mark.slow
def test_a_search_whose_output_nobody_reads_stops_and_resumes(command):
    """As in `| head -1`, and under -u, where nothing stays in a buffer."""
    out, argv = command
    for python in ([sys.executable, "-u"], [sys.executable]):
        code, line, said = read_one_line([*python, *argv[1:]])
        assert code == 141 and line.startswith("set.npz: 24 training images"), said
        resume = "run the same command again to resume from the last checkpoint"
        assert said == f"stopped, since nobody reads the output any more; {resume}\n"
    assert run(argv).returncode == 0 and (out / "genotype.json").exists()


@pytest.mark.parametrize("argv", [["cells", "DARTS_V1"], ["robustness", "--help"]])
def test_an_analysis_whose_output_nobody_reads_is_silent(argv):
    """Whether the error comes up in print or when the buffer is flushed at the end."""
    module = f"nas_kmix.analysis.{argv[0]}"
    late = f"import sys, time; from {module} import main; sys.argv[1:] = {argv[1:]}"
    shut = f"{late}; print('begins', flush=True); time.sleep(1); sys.exit(main())"
    assert read_one_line([sys.executable, "-c", shut]) == (141, "begins\n", "")


def test_a_full_disk_under_the_output_is_a_sentence():
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "nas_kmix.analysis.cells", "DARTS_V1"]
        ended = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device\.?\n", ended.stderr), "one line, buffered or not"


RENDEZVOUS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "but no RANK, MASTER_ADDR, MASTER_PORT; start"),
        ({"WORLD_SIZE": "2", "RANK": "", **RENDEZVOUS}, "but no RANK; start"),
        ({"WORLD_SIZE": "x"}, "unset it"),
        ({"WORLD_SIZE": "2", "RANK": "2", **RENDEZVOUS}, "RANK=2 and WORLD_SIZE=2; RANK must be a number below 2"),
        ({"WORLD_SIZE": "2", "RANK": "one", **RENDEZVOUS}, "RANK=one"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "tcp://1"}, "MASTER_PORT=tcp://1"),
    ],
)
def test_an_environment_that_torchrun_does_not_make_is_a_sentence(environment, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(said)), joined(torch.device("cpu")):
        pass


def test_such_an_environment_ends_a_command(command):
    out, argv = command
    ended = run(argv, WORLD_SIZE="2")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "unset WORLD_SIZE" in ended.stderr
    assert not out.exists()


def test_a_left_over_rank_silences_nobody(monkeypatch):
    """A single process says what it does, whatever the shell was used for before."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_main()

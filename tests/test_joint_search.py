"""The bilevel search under torchrun with gloo: several processes take the steps of one."""

import json
import os
import shlex
import signal

import joint_search
import numpy as np
import pytest
import torch
from conftest import draw_pixels
from ranks import ROOT, ended, needs_proc, ranks_of, run_ranks, torchrun, wait_for

import search
from darts_space import Genotype
from darts_space.search_network import ARCHITECTURE_NAMES

pytestmark = [needs_proc, pytest.mark.slow]
RESULTS = ("genotype.json", "genotypes.jsonl", "alphas.npz")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    joint_search.main(folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, server, tmp_path_factory):
    """The folder of two and of three processes, and their number."""
    folder = tmp_path_factory.mktemp("together")
    run_ranks(server, request.param, joint_search.main, folder)
    return folder, request.param


def states_of(folder, count):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize("case", [case for case in joint_search.CASES if case != "apart"])
def test_with_joint_norms_they_end_with_the_weights_and_alphas_of_one_process(case, alone, together):
    folder, count = together
    (one,) = states_of(alone / case, 1)
    for state in states_of(folder / case, count):
        assert state["steps_done"] == one["steps_done"] > 0
        for name, value in one["model"].items():
            torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-10, msg=name)
    genotypes = [Genotype.load(path / case / "genotype.json") for path in (alone, folder)]
    assert genotypes[0] == genotypes[1]
    assert (alone / case / "genotypes.jsonl").read_text().count("\n") > 0
    start = joint_search.config_of(case).supernet(joint_search.make_data(joint_search.IMAGES))
    assert all((one["model"][name] - getattr(start, name)).abs().max() > 1e-3 for name in ARCHITECTURE_NAMES)


def test_the_log_has_the_means_of_all_processes(alone, together):
    logs = [(path / "first-order" / "metrics.csv").read_text() for path in (alone, together[0])]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5 and "val_loss" in logs[0]


def test_with_norms_apart_all_end_with_the_same_weights_but_not_those_of_one_process(alone, together):
    folder, count = together
    (one,), (first, *others) = states_of(alone / "apart", 1), states_of(folder / "apart", count)
    trained = [name for name in first["model"] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first["model"][name], other["model"][name]) for name in trained for other in others)
    assert not torch.allclose(first["model"]["classifier.weight"], one["model"]["classifier.weight"])


# -- search.py ---------------------------------------------------------------------------------------------------------

SEARCH = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --method random --ratio 1 --channels 2 --partial 2 --layers 3 "
    "--batch-size 8 --search-size 4 --rest-steps 4 --record-every 4 --edges-by alpha --no-finals"
)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, train_images=draw_pixels(27, 8, 8, 3), train_labels=np.arange(27) % 3)
    return path


def records_in(folder):
    path = folder / "genotypes.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_killed_process_ends_all_and_restarted_they_end_with_the_same_bytes(npz, tmp_path):
    for name, kill in (("left-alone", False), ("killed", True)):
        folder, log = tmp_path / name, tmp_path / f"{name}.log"
        command = [ROOT / "search.py", *SEARCH, "--data", npz, "--out", folder, "--arch-steps", 60]
        process = torchrun(log, *command, restarts=3)
        if kill:
            wait_for(process, lambda folder=folder: records_in(folder) >= 3)
            os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert ended(process, log) == 0, log.read_text()
        said = log.read_text()
        assert ("resumed after" in said) == kill and "shared by 2 processes" in said and "Traceback" not in said
    for name in (*RESULTS, "proxy.json", "metrics.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "left-alone" / name).read_bytes(), name


def test_whole_searches_are_dealt_out_to_ranks_or_child_processes(npz, tmp_path):
    """With the same bytes wherever they run."""
    command = [*SEARCH, "--data", npz, "--seeds", 2, "--arch-steps", 2, "--out"]
    process = torchrun(tmp_path / "log", ROOT / "search.py", *command, tmp_path / "ranks")
    for jobs in (1, 2):
        assert search.main([*map(str, command), str(tmp_path / f"jobs-{jobs}"), "--jobs", str(jobs)]) == 0
    assert ended(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    files = [
        "candidates.json",
        "genotype.json",
        "metrics.csv",
        *(f"seed-{i}/{name}" for i in (0, 1) for name in RESULTS),
    ]
    for name in files:
        contents = {(tmp_path / run / name).read_bytes() for run in ("ranks", "jobs-1", "jobs-2")}
        assert len(contents) == 1, name
    bills = [json.loads((tmp_path / run / "cost.json").read_text())["stages"] for run in ("ranks", "jobs-1", "jobs-2")]
    assert len({bill["search"]["images_forward"] for bill in bills}) == 1 and bills[0]["search"]["images_forward"] > 0


def test_fewer_images_than_processes_are_refused(npz, tmp_path):
    command = [ROOT / "search.py", *SEARCH, "--data", npz, "--out", tmp_path / "run", "--arch-steps", 1]
    process = torchrun(tmp_path / "log", *command, "--batch-size", 1)
    assert ended(process, tmp_path / "log") != 0
    assert "A batch of the search has 1 images, fewer than the 2 processes" in (tmp_path / "log").read_text()

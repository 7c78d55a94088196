"""Finals under torchrun with gloo: turns dealt out to all ranks, with the bytes of one process, also after kills."""

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import ROOT, ended, needs_proc, ranks_of, torchrun, wait_for

import search

pytestmark = [needs_proc, pytest.mark.slow]
FLAGS = shlex.split(
    "--data digits --no-report --threads 1 --device cpu -j 0 --method random --ratio .2 --channels 2 --partial 2 "
    "--layers 3 --rest-steps 1 --arch-steps 6 --record-every 2 --arch-lr .1 --batch-size 8 --search-size 4 "
    "--candidates PC_DARTS_cifar --finals.channels 2 --finals.layers 3 --finals.batch-size 8 --finals.epochs 1 "
    "--finals.rungs 2"
)
PROVED = ("candidates.json", "finals.jsonl", "genotype.json", "result.json")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of one process, to which finals may be added."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    flags = FLAGS[: FLAGS.index("--candidates")]
    assert search.main([*flags, "--no-finals", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(searched, tmp_path_factory):
    """The same with the finals of one process, read-only."""
    folder = shutil.copytree(searched, tmp_path_factory.mktemp("alone") / "run")
    assert search.main([*FLAGS, "--out", str(folder), "--jobs", "1"]) == 0
    return folder


@pytest.fixture
def begin(searched, tmp_path):
    """Adds finals to a copy of the search, in several processes; says what runs, its log and its folder."""
    folder, log = shutil.copytree(searched, tmp_path / "run"), tmp_path / "log"

    def torchrun_with(jobs, **options):
        return torchrun(log, ROOT / "search.py", *FLAGS, "--out", folder, "--jobs", jobs, **options), log, folder

    return torchrun_with


def assert_same(folder, alone):
    for name in PROVED:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    assert not (folder / "checkpoints").exists() and not list(folder.rglob("*.part"))


def children_of(pid):
    """The processes that train candidates; Python's resource tracker is none of them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def at_work(process, folder):
    """Process ids by rank, once the first turn has ended and every rank has children."""
    wait_for(process, (folder / "checkpoints" / "finals.pt").exists)
    ranks = ranks_of(process)
    assert all(children_of(pid) for pid in ranks.values())
    return ranks


@pytest.mark.parametrize(("processes", "jobs"), [(2, 1), (3, 2)])
def test_the_same_bytes_whatever_the_number_of_ranks(processes, jobs, begin, alone):
    process, log, folder = begin(jobs, processes=processes)
    at_work(process, folder)
    assert ended(process, log) == 0, log.read_text()
    assert_same(folder, alone)
    said = log.read_text()
    assert said.count("finals: done in") == 1 and "Traceback" not in said
    bills = [json.loads((run / "cost.json").read_text())["stages"]["finals"] for run in (folder, alone)]
    assert bills[0]["images_forward"] == bills[1]["images_forward"] > 0
    assert bills[0]["images_backward"] == bills[1]["images_backward"] > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_restarted_they_end_with_the_same_bytes(victim, begin, alone):
    process, log, folder = begin(1, restarts=3)
    ranks = at_work(process, folder)
    children = [child for pid in ranks.values() for child in children_of(pid)]
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in (*ranks.values(), *children)):
        assert time.monotonic() - killed < 30
        time.sleep(0.05)
    assert ended(process, log) == 0, log.read_text()
    assert_same(folder, alone)


def test_a_signal_to_one_rank_stops_all_and_a_single_process_goes_on(begin, alone):
    process, log, folder = begin(1)
    os.kill(at_work(process, folder)[1], signal.SIGTERM)
    asked = time.monotonic()
    assert ended(process, log) != 0 and time.monotonic() - asked < 30
    assert "stopped by SIGTERM; run the same command again to resume\n" in log.read_text()
    assert (folder / "checkpoints" / "finals.pt").exists()
    assert search.main([*FLAGS, "--out", str(folder), "--jobs", "2"]) == 0
    assert_same(folder, alone)


def test_an_error_in_one_rank_is_one_sentence(begin):
    process, log, folder = begin(1)
    os.kill(children_of(at_work(process, folder)[1])[0], signal.SIGKILL)
    assert ended(process, log) != 0
    said = log.read_text()
    assert "error: A child process has ended before its work was done" in said
    assert "another process" not in said.lower() and "nas_kmix/" not in said.replace(str(ROOT), "")

"""Several processes under torchrun with gloo: the same training as one process, and one end for all of them."""

import csv
import json
import os
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import two_ranks
import two_scorers
from conftest import draw_pixels
from ranks import ROOT, ended, needs_proc, ranks_of, run_ranks, torchrun, wait_for

import search
from nas_kmix import scoring
from nas_kmix.engine import run as run_module
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.distributed import World, joined, unused_part
from nas_kmix.engine.evaluation import evaluate

SMALL = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary "
    "--batch-size 8"
)

pytestmark = needs_proc


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """27 training and 5 test images."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {"train_images": draw_pixels(27, 32, 32, 3), "test_images": draw_pixels(5, 32, 32, 3, seed=1)}
    np.savez(path, **arrays, train_labels=np.arange(27) % 3, test_labels=np.arange(5) % 3)
    return path


def epochs_in(folder):
    if not (folder / "metrics.csv").exists():
        return 0
    with open(folder / "metrics.csv", newline="") as file:
        return len(list(csv.DictReader(file)))


# -- the same as one process -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(server, tmp_path_factory):
    """The result of a single process, and those of each of two."""
    folder = tmp_path_factory.mktemp("two_ranks")
    two_ranks.main(folder / "one")
    run_ranks(server, 2, two_ranks.main, folder / "two")
    load = [folder / "one" / "rank0.pt", folder / "two" / "rank0.pt", folder / "two" / "rank1.pt"]
    return [torch.load(path, weights_only=True) for path in load]


def test_two_processes_have_the_loss_curve_of_one(both):
    one, first, _ = both
    for alone, together in zip(one["curve"], first["curve"], strict=True):
        assert alone["lr"] == together["lr"] and together["loss"] == pytest.approx(alone["loss"], rel=1e-8)
    assert len({row["loss"] for row in one["curve"]}) == 3  # a training that goes on


@pytest.mark.parametrize("kind", ["model", "average"])
def test_two_processes_end_with_the_weights_of_one(both, kind):
    one, *two = both
    for state in two:
        for name, value in one[kind].items():
            torch.testing.assert_close(state[kind][name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["model", "average"])
def test_with_joint_norms_they_end_with_the_weights_and_statistics_of_one(both, kind):
    """BatchNorm trains, and the last batch of an epoch, a single image, leaves a process without any."""
    one, *two = both
    for state in two:
        for name, value in one["joint"][kind].items():
            torch.testing.assert_close(state["joint"][kind][name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("at", range(len(two_ranks.SIZES)))
def test_evaluation_counts_every_image_once(both, at):
    one, *two = both
    for state in two:
        assert state["evaluations"][at] == pytest.approx(one["evaluations"][at], rel=1e-6)


@pytest.mark.parametrize("n", [*range(9), 100, 1_281_167])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_a_division_into_equal_parts(n, size):
    parts = [range(n)[World(rank, size).share(n)] for rank in range(size)]
    assert [part.start for part in parts] + [n] == [0] + [part.stop for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_shows_every_image_once(tmp_path, monkeypatch):
    """Each rank in turn, in one process: which images its network sees."""
    data, seen, batches = two_ranks.make_data(11), [], ImageData.batches

    def fetched(self, index_batches, **options):
        for indices in index_batches:
            seen.extend(indices)
            yield from batches(self, [indices], **options)

    monkeypatch.setattr(ImageData, "batches", fetched)
    monkeypatch.setattr(World, "total", lambda world, *values: list(values))
    for rank in range(3):
        evaluate(two_ranks.make_network(), data, world=World(rank, 3), batch_size=2)
    assert sorted(seen) == list(range(11))


# -- search.py ---------------------------------------------------------------------------------------------------------

SEARCH = shlex.split(
    "--threads 1 --device cpu -j 0 --scorer.epochs 1 --scorer.batch-size 16 --scorer.val-share 0 --scoring.draws 3 "
    "--ratio .5 --channels 2 --partial 2 --layers 3 --rest-steps 1 --arch-steps 1 --batch-size 16 --max-resident-gb 0 "
    "--scoring.pool-size 8 --no-report --no-finals"
)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", scoring.IMAGES_PER_SHARD)
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_CHECKPOINTS", 60.0)


def test_two_processes_score_as_one_and_search_together(image_folder, tmp_path, small_shards, capsys):
    """A streamed set with an unreadable file: every image is scored once, with the same bytes at the end."""
    folder = image_folder(per_class=17, sizes=((16, 16),), truncated=("train/bee/3.png",))
    command = [*SEARCH, "--scoring.baselines", "--data", folder, "--out"]
    assert two_scorers.main([*map(str, command), str(tmp_path / "one")]) == 0
    scorer = ["--scorer", tmp_path / "one" / "scorer.pt"]
    process = torchrun(tmp_path / "log", ROOT / "tests" / "two_scorers.py", *command, tmp_path / "two", *scorer)
    assert ended(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("scores.npz", "proxy.json", "bad_images.txt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    bills = [json.loads((run / "cost.json").read_text())["stages"] for run in (one, two)]
    assert bills[0]["scoring"]["images_forward"] == bills[1]["scoring"]["images_forward"] == 33 * (3 + 1 + 1)
    assert bills[0]["search"]["images_forward"] == bills[1]["search"]["images_forward"] > 0
    said = (tmp_path / "log").read_text()
    assert said.count("selection: done") == 1 and said.count("genotype  ") == 1 and "Traceback" not in said
    assert not (two / "checkpoints").exists()


def test_two_processes_train_the_scorer_and_agree_on_it(npz, tmp_path):
    """Their scores come from one network: the key of scores.npz is that of scorer.pt."""
    folder = tmp_path / "run"
    command = [ROOT / "search.py", *SEARCH, "--data", npz, "--out", folder, "--stop-after", "scores"]
    assert ended(torchrun(tmp_path / "log", *command), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert search.main([*map(str, command[1:])]) == 0  # a single process finds that all of it fits
    bill = json.loads((folder / "cost.json").read_text())["stages"]
    assert bill["scorer"]["images_backward"] == 27 and bill["scoring"]["skipped"]


@pytest.mark.slow
def test_more_processes_than_seeds_share_each_search(npz, tmp_path):
    flags = [*SEARCH, "--data", npz, "--method", "random", "--seeds", 2, "--out", tmp_path / "run"]
    process = torchrun(tmp_path / "log", ROOT / "search.py", *flags, processes=3)
    assert ended(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert sorted(path.name for path in (tmp_path / "run").glob("seed-*")) == ["seed-0", "seed-1"]


# -- train_eval.py -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_that_any_process_cannot_read_are_counted_once(image_folder, tmp_path):
    broken = ("train/ant/0.jpg", "train/bee/3.jpg", "val/ant/0.jpg", "val/bee/3.jpg")
    folder = image_folder(sizes=((140, 150),), suffix=".jpg", splits=("train", "val"), truncated=broken)
    flags = shlex.split("--preset imagenet --image-size 128 --epochs 1 --skip-bad --max-bad-share .3 --warmup-epochs 0")
    command = [ROOT / "train_eval.py", *flags, *SMALL, "--data", folder, "--out", tmp_path / "run"]
    assert ended(torchrun(tmp_path / "log", *command), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_images"] == 4
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert all(path in line for path, line in zip(broken, listed, strict=True))


# -- one end for all ---------------------------------------------------------------------------------------------------


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    def fail(url, timeout):
        raise RuntimeError("Gloo connectFullMesh failed\nwith a stack below")

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "rendezvous", fail)
    with pytest.raises(OSError, match=r"do not find each other \(Gloo connectFullMesh failed\)"), joined(two_ranks.CPU):
        pass


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on_from_its_checkpoint(npz, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [ROOT / "train_eval.py", *SMALL, "--data", npz, "--out", folder, "--epochs", 1000]
    process = torchrun(log, *command)
    wait_for(process, lambda: epochs_in(folder) >= 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert ended(process, log) != 0
    said = log.read_text()
    assert "SIGKILL" in said and "rank      : 1" in said
    state = torch.load(folder / "last.pt", weights_only=True)
    process = torchrun(log, *command)
    wait_for(process, lambda: epochs_in(folder) >= state["epoch"] + 2)
    assert f"resumed after {3 * state['epoch']}" in log.read_text()
    process.terminate()  # as a job scheduler ends a job
    assert ended(process, log) != 0
    said = log.read_text()
    assert said.count("finishing the step") == 1 and "stopped by SIGTERM; run the same command again to resume" in said
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] > state["epoch"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_every_restart_is_for_a_killed_process(victim, tmp_path):
    """As many restarts as kills are enough: none goes to processes that look for each other at old addresses."""
    process = torchrun(tmp_path / "log", ROOT / "tests" / "killed_ranks.py", victim, restarts=1)
    assert ended(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_a_start_shares_no_part_of_the_store_with_an_earlier_one():
    """Also where an earlier process asked and never came."""
    store = torch.distributed.HashStore()
    store.set("nas_kmix/asks/2", "word of a process that was killed")
    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: unused_part(store, rank, 3), range(3)))
        assert not found[0].check(["address"])
        found[1].set("address", str(start))
        assert [part.get("address") for part in found] == [str(start).encode()] * 3


@pytest.mark.slow
def test_restarted_by_torchrun_it_ends_the_same(npz, tmp_path):
    """torchrun --max-restarts: a killed process costs its last minute at most."""
    states = []
    for kill in (False, True):
        folder, log = tmp_path / f"run-{kill}", tmp_path / "log"
        process = torchrun(
            log, ROOT / "train_eval.py", *SMALL, "--data", npz, "--out", folder, "--epochs", 30, restarts=2
        )
        if kill:
            wait_for(process, lambda folder=folder: epochs_in(folder) >= 5)
            os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert ended(process, log) == 0, log.read_text()
        assert ("resumed after" in log.read_text()) == kill
        states.append(
            (torch.load(folder / "last.pt", weights_only=True)["model"], (folder / "metrics.csv").read_text())
        )
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())

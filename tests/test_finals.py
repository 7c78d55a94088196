"""Finals on tiny images: what they leave, the same bytes whatever --jobs, after kills and without a search between.

Halving and verdict have their own tests; here real networks are trained, in child processes.
"""

import html
import json
import math
import os
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import completed as run_to_the_end
from processes import ended, has_reached, start, wait_for
from test_candidates import POOLS
from test_pipeline import completed, costs_of, draw_images, files_of, main, refused, write_npz

from darts_space import GENOTYPES, Genotype, random_genotype
from nas_kmix.analysis.report.page import document
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.children import run_in_children
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.pipeline import finals
from nas_kmix.pipeline.candidates import Candidate, Shape
from nas_kmix.pipeline.finals import divide
from nas_kmix.pipeline.halving import Halving
from nas_kmix.pipeline.trial import DIVERGED, FinalsConfig, Roles, Task, Trainer, train_rung
from nas_kmix.pipeline.verdict import in_words, judge

FLAGS = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --method random --ratio .4 --channels 2 --partial 2 --layers 3 "
    "--rest-steps 1 --arch-steps 6 --record-every 2 --arch-lr .1 --batch-size 8 --finals.channels 2 --finals.layers 3 "
    "--finals.batch-size 8 --finals.epochs 1 --finals.rungs 2"
)
PROVED = ("candidates.json", "finals.jsonl", "genotype.json", "result.json")


def command(data: Path, out: Path, *more: object) -> list[str]:
    return ["--data", str(data), "--out", str(out), *FLAGS, *map(str, more)]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "tiny.npz", *draw_images(size=8))


@pytest.fixture(scope="module")
def alone(npz, tmp_path_factory):
    """An undisturbed run with one child, read-only, and how it ended."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, completed(command(npz, folder, "--candidates", "PC_DARTS_cifar", "--jobs", 1))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "finals.jsonl").read_text().splitlines()]


def test_what_the_finals_leave(alone):
    folder, ended = alone
    listed = json.loads((folder / "candidates.json").read_text())["candidates"]
    origins = [one["origin"] for one in listed]
    assert origins == sorted(origins, key=["bilevel", "given", "random"].index) and origins[-2:] == ["random"] * 2
    assert listed[0]["arch_step"] == 6 and listed[origins.index("given")]["text"] == "PC_DARTS_cifar"

    rows = rows_of(folder)
    names = ["candidate", "origin", "genotype", "rung", "epochs", "channels", "macs", "accuracy", "se", "kept"]
    assert all(list(row) == names for row in rows)
    order = [(row["rung"], row["candidate"]) for row in rows]
    assert order == sorted(set(order)) and {row["epochs"] for row in rows if row["rung"] == 1} == {2}
    assert all(row["genotype"] == listed[row["candidate"]]["genotype"] for row in rows)
    last = [row for row in rows if row["rung"] == 1]
    assert {0, *(i for i, origin in enumerate(origins) if origin == "random")} <= {row["candidate"] for row in last}
    (winner,) = [row for row in last if row["kept"]]
    assert winner["origin"] != "random"
    assert winner["accuracy"] == max(row["accuracy"] for row in last if row["origin"] != "random")

    saved = json.loads((folder / "genotype.json").read_text())
    assert Genotype.load(folder / "genotype.json") == Genotype.from_json(winner["genotype"])
    assert saved["provenance"]["stage"] == "finals" and saved["provenance"]["search"]["stage"] == "search"
    assert (saved["provenance"]["origin"], saved["provenance"]["accuracy"]) == (winner["origin"], winner["accuracy"])

    result = json.loads((folder / "result.json").read_text())
    assert result["kind"] == "search" and result["random"]["n"] == result["entry_minus_random"]["n"] == 2
    assert result["winner"]["genotype"] == winner["genotype"] and result["entry"]["genotype"] == listed[0]["genotype"]
    mean = result["entry"]["accuracy"] - result["random"]["mean"]
    assert result["entry_minus_random"]["mean"] == pytest.approx(mean)
    assert result["verdict"] in ended.out and "demonstration" in ended.out
    assert costs_of(folder)["finals"]["images_backward"] > 0 and costs_of(folder)["finals"]["wall_s"] > 0
    assert not (folder / "checkpoints").exists()


def test_two_children_give_the_same_bytes_and_the_same_command_skips(alone, npz, tmp_path):
    folder = tmp_path / "run"
    completed(command(npz, folder, "--candidates", "PC_DARTS_cifar", "--jobs", 2))
    for name in PROVED:
        assert (folder / name).read_bytes() == (alone[0] / name).read_bytes(), name
    assert costs_of(folder)["finals"]["images_forward"] == costs_of(alone[0])["finals"]["images_forward"]
    before = files_of(folder)
    again = completed(command(npz, folder, "--candidates", "PC_DARTS_cifar"))
    assert f"finals: {folder / 'genotype.json'} is up to date, skipped" in again.out and "random ones" in again.out
    assert {name for name, content in files_of(folder).items() if content != before[name]} <= {"cost.json"}


def test_a_search_without_finals_is_unproved_until_they_are_added(alone, npz, tmp_path):
    ended = completed(command(npz, tmp_path, "--no-finals"))
    assert "nothing was proved" in ended.out and not (tmp_path / "finals.jsonl").exists()
    listed = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert {one["origin"] for one in listed} == {"bilevel"}
    assert Genotype.load(tmp_path / "genotype.json") == Genotype.from_json(listed[0]["genotype"])
    ended = completed(command(npz, tmp_path, "--candidates", "PC_DARTS_cifar", "--jobs", 2))
    assert "\nsearch: 7 steps\n" not in ended.out
    for name in PROVED:
        assert (tmp_path / name).read_bytes() == (alone[0] / name).read_bytes(), name
    refused(command(npz, tmp_path, "--no-finals"), "is the winner of finals", "add --finals")
    before = files_of(tmp_path)
    refused(command(npz, tmp_path, "--finals.lr", ".2"), "lr was 0.1, now 0.2", "Remove that file")
    assert {name for name, content in files_of(tmp_path).items() if content != before[name]} <= {"cost.json"}


def test_where_all_diverge_nothing_is_called_a_winner(npz, tmp_path):
    ended = main(command(npz, tmp_path, "--finals.lr", "1e30", "--jobs", 1))
    assert ended.code == 2 and "lower --finals.lr, or use --no-finals" in ended.err
    assert "has diverged and counts as accuracy 0" in ended.out
    assert not (tmp_path / "genotype.json").exists() and not (tmp_path / "result.json").exists()
    completed(command(npz, tmp_path, "--finals.lr", "1e30", "--no-finals"))


def test_a_candidate_that_diverges_loses_and_a_control_that_does_is_no_comparison():
    rng = np.random.default_rng(0)
    found = [Candidate(random_genotype(rng), origin) for origin in ("bilevel", "bilevel", *["random"] * 4)]
    accuracies = [0.0, 0.5, 0.4, 0.0, 0.3, 0.35]  # the entry and a control diverged
    halving = Halving([0, 1], [2, 3, 4, 5], 1)
    for number, accuracy in enumerate(accuracies):
        halving.record((number, 0), accuracy)
    verdicts = {number: accuracy for number, accuracy in enumerate(accuracies) if accuracy > 0}
    turns = SimpleNamespace(entrants=SimpleNamespace(candidates=found), halving=halving, verdicts=verdicts)
    result = finals.result_of(turns, images=100)
    assert result["winner"]["accuracy"] == 0.5 and result["entry"]["accuracy"] == 0.0
    assert result["random"]["n"] == 3 and result["random"]["mean"] == pytest.approx(0.35)
    assert result["verdict"] == "worse than random"
    for lost in (2, 4):
        del verdicts[lost]
    with pytest.raises(ValueError, match=r"4 of the finals' candidates have diverged"):
        finals.result_of(turns, images=100)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finals.controls", 1], "--finals.controls must be at least 2"),
        (["--finals.channels", 3], "--finals.channels must be even"),
        (["--finals.weight-decay", -1], "--finals.weight-decay must be 0 or more"),
        (["--finals.images", 70], "--finals.images 70 is more than"),
        (["--ratio", 1], "none is left for the verdict"),
        (["--candidates", "nowhere.json"], "nowhere.json"),
        (["--candidates", "DARTS_V1", "--no-finals"], "--candidates compete in the finals"),
        (["--jobs", 0], "--jobs"),
    ],
)
def test_finals_that_cannot_be_are_refused_before_the_search(flags, words, npz, tmp_path):
    ended = main(command(npz, tmp_path / "run", *flags))
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "run" / "genotypes.jsonl").exists()


def test_more_images_than_can_train_are_refused_before_the_scorer(npz, tmp_path):
    ended = main(command(npz, tmp_path / "run", "--finals.images", 1000))
    assert ended.code == 2 and "--finals.images 1000 is more than" in ended.err
    assert not (tmp_path / "run").exists()


def test_the_report_shows_who_came_from_where_and_the_verdicts_of_several_runs(alone, npz, tmp_path):
    folder, _ = alone
    page = document([Record(folder)])
    result = json.loads((folder / "result.json").read_text())
    assert all(html.escape(line) in page for line in in_words(result))
    assert "given: PC_DARTS_cifar" in page and "bilevel search, seed 0, architecture step 6" in page
    assert page.count("Best random one, ") >= 2 and not Record(folder).trains
    shutil.copytree(folder, tmp_path / "other")
    several = document([Record(folder), Record(tmp_path / "other")])
    assert "Pooled over 2 runs" in several and several.count(result["verdict"]) >= 4
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace(str(npz), "elsewhere.npz"))
    assert "Pooled over" not in document([Record(folder), Record(tmp_path / "other")])
    (tmp_path / "other" / "finals.jsonl").unlink()
    assert "nothing was proved" in document([Record(tmp_path / "other")])


# -- kills -------------------------------------------------------------------------------------------------------------


def kill_and_rerun(server, npz, alone, folder, stages, jobs, seed):
    """Kill one process per entry of `stages`, at a random moment after that stage has begun; then run to the end."""
    rng, log = np.random.default_rng(seed), folder.parent / "log"
    argv = command(npz, folder, "--candidates", "PC_DARTS_cifar", "--jobs", jobs)
    wall = {stage: cost["wall_s"] for stage, cost in costs_of(alone[0]).items()}
    for stage in stages:
        process = start(server, argv, log)
        wait_for(process, lambda stage=stage: has_reached(stage, log, folder))
        until = time.monotonic() + rng.uniform(0, wall[stage] / stages.count(stage))
        wait_for(process, lambda until=until: time.monotonic() > until)
        process.kill()
        if ended(process) == 0:  # faster than the kill: the next kills get a new run
            shutil.rmtree(folder)
    run_to_the_end(server, argv, log)
    for name in PROVED:
        assert (folder / name).read_bytes() == (alone[0] / name).read_bytes(), name
    assert not (folder / "checkpoints").exists() and not list(folder.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2])
def test_killed_in_the_finals(jobs, server, npz, alone, tmp_path):
    kill_and_rerun(server, npz, alone, tmp_path / "run", ["finals"], jobs, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_ten_times_in_search_and_finals(jobs, server, npz, alone, tmp_path):
    kill_and_rerun(server, npz, alone, tmp_path / "run", ["search"] * 4 + ["finals"] * 6, jobs, seed=jobs)


# -- images and training -----------------------------------------------------------------------------------------------


def test_the_parts_of_the_images_are_disjoint_and_stratified():
    data = load_data(DataConfig())
    halves = np.array_split(np.random.default_rng(0).permutation(len(data))[:300], 2)
    weights, arch = map(np.sort, halves)
    for images in (None, 100):
        roles = divide(data, weights, arch, FinalsConfig(images=images, seed=3))
        parts = [roles.train, roles.judge, roles.verdict]
        assert sum(map(len, parts)) == len(np.unique(np.concatenate(parts))) == sum(len(set(part)) for part in parts)
        assert np.array_equal(roles.judge, arch) and len(roles.train) == (images or 150)
        assert len(roles.verdict) == len(data) - 300  # fewer than 2,500
    everything = np.arange(len(data))
    with pytest.raises(ValueError, match="none is left for the verdict"):
        divide(data, everything[::2], everything[1::2], FinalsConfig())


def test_the_verdict_takes_2500_images_class_by_class(tmp_path):
    labels = np.repeat(np.arange(4), [400, 800, 1600, 3200])
    path = write_npz(tmp_path / "large.npz", np.zeros((6000, 4, 4, 3), np.uint8), labels)
    data = load_data(DataConfig(data=str(path)))
    roles = divide(data, np.arange(0, 6000, 20), np.arange(1, 6000, 20), FinalsConfig())
    counts = np.bincount(data.labels[roles.verdict])
    assert abs(len(roles.verdict) - 2500) <= 1 and np.allclose(
        counts / 2500, [1 / 15, 2 / 15, 4 / 15, 8 / 15], atol=1e-3
    )


@pytest.fixture(scope="module")
def digits():
    data = load_data(DataConfig())
    return data, Roles(np.arange(0, 400), np.arange(400, 600), np.arange(600, 800))


def test_a_rung_is_a_function_of_its_arguments_and_its_rate_restarts(digits, monkeypatch):
    data, roles = digits
    config = FinalsConfig(channels=2, layers=3, batch_size=16, augmentation=Augmentation(flip=False))
    shape = Shape("cifar", 3, 10, data.image_size)
    rates, losses = [], []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda o, *a: rates.append(o.param_groups[0]["lr"]) or step(o, *a))
    for _ in range(2):
        network = shape.network(GENOTYPES["PC_DARTS_cifar"], 2, torch.Generator().manual_seed(0))
        torch.rand(3)  # what others draw has no part in it
        losses.append(train_rung(network, data, roles.train[:40], config, rung=0))
    steps = config.steps(40, 0)
    assert losses[0] == losses[1] and steps == 6 == len(rates) / 2
    expected = [0.05 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    assert np.allclose(rates, expected * 2)
    assert config.steps(40, 2) == 4 * steps


def test_a_trainer_carries_weights_from_rung_to_rung(digits):
    data, roles = digits
    config = FinalsConfig(channels=2, layers=3, batch_size=32, epochs=1, rungs=2)
    trainer = Trainer.of(data, replace(roles, train=roles.train[:64]), config, Compute())
    first = trainer(Task(GENOTYPES["DARTS_V2"], 2, 0, None, False))
    assert first.verdict_accuracy is None and 0 <= first.accuracy <= 1 and first.loss > 0
    last = trainer(Task(GENOTYPES["DARTS_V2"], 2, 1, first.state, True))
    assert last.state is None and 0 <= last.verdict_accuracy <= 1
    assert int(first.state["cells.0.preprocess1.2.num_batches_tracked"]) == 2
    fresh = trainer(Task(GENOTYPES["DARTS_V2"], 2, 1, None, True))
    assert fresh.loss != last.loss
    broken = {name: array * np.nan if array.dtype == np.float32 else array for name, array in first.state.items()}
    assert trainer(Task(GENOTYPES["DARTS_V2"], 2, 1, broken, True)) == DIVERGED


def test_large_images_are_judged_as_in_training_networks(image_folder):
    """The ImageNet stem, from files that are read one by one: 96 px."""
    folder = image_folder(per_class=12, sizes=((100, 120), (96, 96)))
    data = load_data(DataConfig(data=str(folder), image_size=96, max_resident_gb=0.0))
    config = FinalsConfig(channels=2, layers=3, batch_size=4)
    roles = Roles(np.arange(0, 24, 3), np.arange(1, 24, 3), np.arange(2, 24, 3))
    streamed = Trainer.of(data, roles, config, Compute())(Task(GENOTYPES["DARTS_V1"], 2, 0, None, True))
    data = load_data(DataConfig(data=str(folder), image_size=96))
    resident = Trainer.of(data, roles, config, Compute())(Task(GENOTYPES["DARTS_V1"], 2, 0, None, True))
    assert streamed == resident


@pytest.mark.slow
def test_an_entry_of_nothing_but_pools_is_worse_than_random(digits):
    """On real networks of one width, although the pools' is a sixth as large."""
    data, _ = digits
    rng = np.random.default_rng(0)
    config = FinalsConfig(channels=4, layers=5, batch_size=32, epochs=6, rungs=1, augmentation=Augmentation(flip=False))
    roles = Roles(np.arange(0, 600), np.arange(600, 700), np.arange(700, len(data)))
    genotypes = [POOLS, *(random_genotype(rng) for _ in range(6))]
    tasks = [Task(genotype, 4, 0, None, True) for genotype in genotypes]
    entry, *controls = (
        outcome.verdict_accuracy
        for outcome in run_in_children(Trainer.of(data, roles, config, Compute()), tasks, jobs=os.cpu_count())
    )
    assert judge(entry, controls, len(roles.verdict)).word == "worse than random"


def test_the_searched_half_of_proxy_none_leaves_a_tenth(npz, tmp_path):
    completed(command(npz, tmp_path, "--proxy", "none", "--no-finals"))
    seen = json.loads((tmp_path / "candidates.json").read_text())["provenance"]["inputs"]["proxy"]
    assert seen == "all images but 10%, arch_share 0.5"

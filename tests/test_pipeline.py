"""search.py from images to genotype, on 72 tiny images and one thread: stages, reuse, refusals, signals, bad input.

Everything runs in this process through `search.main`, which prints into two strings here. What needs a process of its
own, SIGKILL above all, is in test_kill.py.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import search
import train_eval
from darts_space import ARCHITECTURE_NAMES, Genotype, Search, SuperNet, derive
from nas_kmix.commands.summary import RETRAINED_WITH, _training_flags, rest_of
from nas_kmix.engine import data as engine_data
from nas_kmix.engine.data import DataConfig
from nas_kmix.engine.distributed import World
from nas_kmix.engine.progress import Progress
from nas_kmix.engine.run import Run
from nas_kmix.pipeline.checks import without_effect
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.one_search import SearchConfig, say_how_long
from nas_kmix.proxy import ProxyManifest
from nas_kmix.scores import ScoreTable

TINY = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --scorer.epochs 2 --scorer.batch-size 24 --scoring.draws 4 --ratio .4 "
    "--channels 2 --partial 2 --layers 3 --rest-steps 2 --arch-steps 4 --record-every 2 --batch-size 8 --no-finals "
    "--edges-by removal"
)
ONE_STEP = ["--rest-steps", "0", "--arch-steps", "1", "--edges-by", "alpha"]  # the shortest search
TO_PROXY = ["--stop-after", "proxy"]
IMAGES, CLASSES = 72, 3
TRAINED = 65  # by the scorer, which a tenth of the images tests
STAGES = ("scorer", "scoring", "selection", "search")
SEARCHED = {"candidates.json", "genotype.json", "genotypes.jsonl", "alphas.npz"}
RESULTS = {"scorer.pt", "scores.npz", "proxy.json", *SEARCHED}


# -- data, commands and what they leave --------------------------------------------------------------------------------


def draw_images(seed: int = 0, n: int = IMAGES, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one brighter channel, which gives the class away: uint8 (n, size, size, 3) and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    images = rng.integers(0, 130, (n, size, size, 3))
    images[np.arange(n), :, :, labels] += 100
    return images.astype(np.uint8), labels


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, train_images=images, train_labels=labels, **more)
    return path


def write_folder(folder: Path, images, labels, suffix: str = ".png") -> Path:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "train" / str(label) / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@dataclass
class Ended:
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def command(data: Path | str, out: Path, *more: object) -> list[str]:
    return ["--data", str(data), "--out", str(out), *TINY, *map(str, more)]


def main(argv: list[str]) -> Ended:
    """search.py in this process. An exception that it does not catch fails the test: it would be a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = search.main(argv)
    return Ended(code, out.getvalue(), err.getvalue())


def completed(argv: list[str]) -> Ended:
    ended = main(argv)
    assert ended.code == 0, ended.err
    return ended


def refused(argv: list[str], *words: object, code: int = 2) -> str:
    """The sentence on standard error with which the command ended."""
    ended = main(argv)
    assert ended.code == code, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.err.endswith(".\n"), ended.err
    for word in words:
        assert str(word) in ended.err
    return ended.err


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the lock, by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def results_of(folder: Path) -> set[str]:
    """The results that exist; nothing half-written may lie beside them."""
    names = set(files_of(folder))
    assert not [name for name in names if name.endswith(".part")]
    return names & RESULTS


def costs_of(folder: Path) -> dict:
    return json.loads((folder / "cost.json").read_text())["stages"]


def read_rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_bytes(folder: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def same_results(folder: Path, other: Path) -> None:
    """Bit-identical results, and nothing left over."""
    same_bytes(folder, other, "scores.npz", "proxy.json", "metrics.csv", "genotypes.jsonl", "alphas.npz")
    same_bytes(folder, other, "candidates.json", "genotype.json")
    assert results_of(folder) == RESULTS and not (folder / "checkpoints").exists()


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "tiny.npz", *draw_images())


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory) -> tuple[Path, Ended]:
    """An undisturbed run, read-only, and how it ended."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, completed(command(npz, folder))


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "copy")


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_every_stage_leaves_a_file_that_describes_itself(finished, npz):
    folder, _ = finished
    scorer = torch.load(folder / "scorer.pt", weights_only=True)
    assert scorer["key"]["stage"] == "scorer" and scorer["key"]["config"]["epochs"] == 2
    assert scorer["network"] == {"backbone": "tiny", "num_classes": CLASSES, "stem": "cifar"}

    table = ScoreTable.load(folder / "scores.npz")
    assert table.losses.shape == (IMAGES, 4) and table.key["config"]["draws"] == 4
    with np.load(folder / "scores.npz", allow_pickle=False) as scores:
        assert set(scores.files) == {"index", "label", "mean", "std", "cv", "residual", "el2n", "losses", "meta"}
        assert np.allclose(scores["cv"], table.losses.std(1, ddof=1) / table.losses.mean(1), rtol=1e-4)

    proxy = json.loads((folder / "proxy.json").read_text())
    assert proxy["scores"] == table.hash() and proxy["fingerprint"] == scorer["key"]["inputs"]["data"]
    assert (proxy["n"], proxy["data"], proxy["split"]) == (IMAGES, npz.name, "train")
    assert proxy["class_counts"] == [10, 10, 10] and len(proxy["indices"]) == len(set(proxy["content"])) == 30
    assert sorted(proxy["halves"]["weights"] + proxy["halves"]["arch"]) == proxy["indices"]

    origin = json.loads((folder / "genotype.json").read_text())["provenance"]
    assert origin["inputs"]["proxy"] == ProxyManifest.load(folder / "proxy.json").hash()
    assert origin["config"]["channels"] == 2
    assert json.loads((folder / "config.json").read_text())["search"]["arch_steps"] == 4
    assert "torch" in json.loads((folder / "env.json").read_text())["packages"]


def test_the_log_of_the_search_leads_to_its_genotype(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["arch_step"]) for line in lines] == [(2, 0), (4, 2), (6, 4)]
    assert {"margin_normal", "entropy_normal", "skips_normal", "pools_normal"} <= lines[0].keys()
    with np.load(folder / "alphas.npz") as archive:
        tables = {name: archive[name] for name in archive.files}
    names = (*ARCHITECTURE_NAMES, "removal_normal", "removal_reduce")
    shapes = {name: (3, 14, 8) if name.startswith("alphas") else (3, 14) for name in names}
    assert {name: table.shape for name, table in tables.items()} == shapes
    assert not np.array_equal(tables["alphas_normal"][0], tables["alphas_normal"][1])
    genotype = Genotype.load(folder / "genotype.json")
    last = {name: torch.from_numpy(table[-1]) for name, table in tables.items()}
    removal = last.pop("removal_normal"), last.pop("removal_reduce")
    assert genotype == derive(**last, edges_by="removal", removal=removal)
    assert lines[-1]["genotype"] == genotype.to_json()
    rows = [(row["stage"], row["epoch"]) for row in read_rows(folder)]
    assert rows == [("scorer", "0"), ("scorer", "1"), ("search", "0"), ("search", "1"), ("search", "2")]
    assert list(folder.glob("events.out.tfevents.*"))


def test_every_stage_is_billed(finished):
    bill = json.loads((finished[0] / "cost.json").read_text())
    assert tuple(bill["stages"]) == (*STAGES, "finals") and set(bill) == {"stages", "total"}
    assert bill["stages"]["finals"]["wall_s"] == 0 and bill["stages"]["finals"]["skipped"]
    for cost in (bill["stages"][stage] for stage in STAGES):
        assert set(cost) == {"wall_s", "images_forward", "images_backward", "peak_rss_bytes", "skipped"}
        assert cost["wall_s"] > 0 and cost["peak_rss_bytes"] > 1e8 and cost["skipped"] is False
    # Six steps of the weights and four of the architecture, eight images each. At each of three records, the half of
    # the architecture passes once through the whole supernet and once without each of 24 edges.
    search = (80 + 3 * 25 * len(ProxyManifest.load(finished[0] / "proxy.json").arch), 80)
    # The scorer is trained on nine tenths of the images and tested on the others, both twice.
    passes = {"scorer": (2 * IMAGES, 2 * TRAINED), "scoring": (5 * IMAGES, 0), "selection": (0, 0), "search": search}
    for stage, expected in passes.items():
        cost = bill["stages"][stage]
        assert (cost["images_forward"], cost["images_backward"]) == expected
    for name in ("wall_s", "images_forward", "images_backward"):
        assert bill["total"][name] == pytest.approx(sum(cost[name] for cost in bill["stages"].values()))
    assert bill["total"]["peak_rss_bytes"] == max(cost["peak_rss_bytes"] for cost in bill["stages"].values())


def test_the_last_lines_name_genotype_reliability_cost_and_next_command(finished):
    folder, ended = finished
    genotype, *others = ended.out.splitlines()[-7:]
    assert Genotype.from_text(genotype) == Genotype.load(folder / "genotype.json") and ended.err == ""
    expected = (
        "genotype.json",
        "nothing was proved",
        "proxy.json",
        "1 of 1: this scorer ranks by EL2N",
        "search",
        "next         ",
    )
    for line, words in zip(others, expected, strict=True):
        assert words in line


@pytest.mark.parametrize(("size", "auxiliary"), [(12, False), (13, True)])
def test_the_next_command_does_without_an_auxiliary_head_that_the_images_are_too_small_for(size, auxiliary):
    found = train_eval.parse(_training_flags(search.parse([]), Path("run"), size))
    assert found.network.auxiliary is auxiliary


def test_the_next_command_trains_the_genotype_on_the_same_images(finished, npz):
    config = train_eval.parse(shlex.split(finished[1].out.splitlines()[-1].partition("-m nas_kmix train ")[2]))
    assert config.input == DataConfig(data=str(npz))
    assert Genotype.load(Path(config.network.genotype)) == Genotype.load(finished[0] / "genotype.json")
    assert config.out == finished[0].with_name(f"{finished[0].name}-net") and not config.out.exists()


@pytest.mark.parametrize("preset", list(search.PRESETS))
def test_every_preset_has_a_preset_to_train_with(preset):
    config = search.parse(["--preset", preset, "--data", "images", "--image-size", "96"])
    found = train_eval.parse(_training_flags(config, Path("run"), 32))
    assert (found.preset, found.input.data, found.input.image_size) == (RETRAINED_WITH[preset], "images", 96)


def test_every_stage_says_when_it_ends_and_what_came_of_it(finished):
    folder, ended = finished
    for stage, file in {"scorer": "scorer.pt", "scoring": "scores.npz", "selection": "proxy.json"}.items():
        assert re.search(rf"^{stage}: done in \d+ s, {folder / file}$", ended.out, re.MULTILINE)
    rows = [row for row in read_rows(folder) if row["stage"] == "scorer"]
    share = f"{100 * float(rows[-1]['val_accuracy']):.1f} %"
    assert f"scorer: names the class of {share} of {IMAGES - TRAINED} images that it was not trained on" in ended.out
    assert f"scorer: epoch 2/2, loss {float(rows[-1]['loss']):.3f}, accuracy" in ended.out
    assert re.search(
        r"^search: step 6/6, loss .*, validation loss .*, accuracy .* %, .* images/s$", ended.out, re.MULTILINE
    )


def test_a_scorer_that_tests_itself_on_no_image_is_trained_on_all(npz, tmp_path):
    ended = completed(command(npz, tmp_path, "--scorer.val-share", 0, "--stop-after", "scorer"))
    assert f"trained on all {IMAGES} images" in ended.out and "val_accuracy" not in read_rows(tmp_path)[0]
    assert costs_of(tmp_path)["scorer"]["images_backward"] == 2 * IMAGES


def test_a_quiet_run_says_what_it_found_and_its_warnings(finished, npz, tmp_path):
    ended = completed(command(npz, tmp_path, "--quiet"))
    loud = finished[1].out.splitlines()
    assert len(ended.out.splitlines()) < 10 < len(loud)
    assert [line for line in ended.out.splitlines() if line.startswith("warning")] == [
        line for line in loud if line.startswith("warning")
    ]
    assert ended.out.splitlines()[-7] == loud[-7], "the genotype"


def test_a_listener_hears_what_the_log_holds(npz, tmp_path):
    heard = []
    search.run(search.parse(command(npz, tmp_path)), on_log=lambda *row: heard.append(row))
    assert [(stage, step) for stage, step, _ in heard] == [
        ("scorer", 0), ("scorer", 1), ("search", 2), ("search", 4), ("search", 6)
    ]  # fmt: skip
    for row, (_, _, values) in zip(read_rows(tmp_path), heard, strict=True):
        written = {name: float(value) for name, value in row.items() if name not in ("stage", "epoch") and value}
        assert written == pytest.approx({name: value for name, value in values.items() if name in written}, rel=1e-6)
        assert values.keys() - written.keys() == {"images_per_second", "memory_gib"}
        assert values["images_per_second"] > 0 and values["memory_gib"] > 0.1


def test_the_reliability_of_the_draws_is_put_into_words(npz, tmp_path):
    paper = ("--measure", "cv", "--method", "interval", "--stop-after", "scores")
    ended = completed(command(npz, tmp_path / "four", *paper))
    value = ScoreTable.load(tmp_path / "four" / "scores.npz").reliability("cv")
    assert f"{value:.2f} of 1" in ended.out and "(CV of 4 losses each, --scoring.draws" in ended.out
    ended = completed(command(npz, tmp_path / "two", "--scoring.draws", 2, *paper))
    assert "reliability" in ended.out and "good" not in ended.out


def test_the_rate_of_a_preset_shrinks_with_its_batch():
    rates = {
        (preset, batch): search.parse(["--preset", preset, "--batch-size", str(batch)]).search.bilevel("off", 1).lr
        for preset, batch in (("paper", 256), ("paper", 64), ("imagenet", 1024), ("imagenet", 64))
    }
    assert list(rates.values()) == [0.1, 0.025, 0.5, 0.03125]
    assert search.parse(["--preset", "imagenet", "--batch-size", "64", "--lr", ".2"]).search.bilevel("off", 1).lr == 0.2


def test_the_next_command_is_without_what_a_search_replaces():
    kept = ["--data", "x", "-j", "0", "--lr", "-1", "--no-report", "--seed", "3"]
    dropped = "--stop_after proxy --out=a --export-list l --fresh --ratio=.2 --no-balanced --scorer.milestones .5 .7"
    assert rest_of([*dropped.split(), *kept, *dropped.split()]) == kept


# -- the same command again, and another -------------------------------------------------------------------------------


def test_the_same_command_skips_every_stage(copy, npz):
    before, costs = files_of(copy), costs_of(copy)
    ended = completed(command(npz, copy))
    assert ended.out.count("is up to date, skipped") == 5
    after = files_of(copy)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"cost.json"}
    assert costs_of(copy) == {stage: {**cost, "skipped": True} for stage, cost in costs.items()}
    again = files_of(copy)
    completed(command(npz, copy))
    assert files_of(copy) == again


@pytest.mark.parametrize(
    ("flags", "file", "differing", "reused"),
    [
        (["--scorer.lr", ".05", *TO_PROXY], "scorer.pt", "lr was 0.1, now 0.05", None),
        (["--scoring.draws", "5", *TO_PROXY, "--scoring.k", "4"], "scores.npz", "draws was 4, now 5; k was 3, now 4",
         "scorer.pt"),
        (["--ratio", ".2", *TO_PROXY], "proxy.json", "ratio was 0.4, now 0.2", "scores.npz"),
        (["--lr", ".02", *ONE_STEP], "candidates.json", "lr was 0.025, now 0.02", "proxy.json"),
    ],
    ids=STAGES,
)  # fmt: skip
def test_another_setting_is_refused_with_a_remedy_that_works(flags, file, differing, reused, copy, npz, finished):
    before = files_of(copy)
    message = refused(command(npz, copy, *flags), copy / file, differing, "--fresh")
    changed = {name for name, content in files_of(copy).items() if content != before.get(name)}
    assert changed <= {"cost.json"}  # config.json still tells how the results were made

    remedy = shlex.split(
        re.search(r"the same command with (--out .*?)( to reuse the stages before it)?\.\n", message)[1]
    )
    assert remedy[2:] == ([f"--{Path(reused).stem}", str(copy / reused)] if reused else [])
    folder = Path(remedy[1])
    completed([*command(npz, folder, *flags), *remedy[2:]])
    assert file in results_of(folder) and reused not in results_of(folder)
    costs, earlier = costs_of(folder), costs_of(finished[0])
    for stage in STAGES[: 1 + ("scorer.pt", "scores.npz", "proxy.json").index(reused)] if reused else ():
        assert costs[stage] == {**earlier[stage], "skipped": True}


def test_other_data_are_refused(copy, tmp_path):
    other = write_npz(tmp_path / "other.npz", *draw_images(seed=1))
    refused(command(other, copy), copy / "scorer.pt", "data was", "--fresh")


def test_device_precision_and_workers_are_no_settings_of_a_stage(copy, npz):
    ended = completed(command(npz, copy, "--amp", "bf16", "--no-channels-last", "-j", 1, "--scoring.batch-size", 7))
    assert ended.out.count("is up to date, skipped") == 5


def test_one_search_is_not_overwritten_by_several(copy, npz):
    genotype = (copy / "genotype.json").read_bytes()
    refused(command(npz, copy, "--seeds", 2), copy / "candidates.json", "--fresh")
    assert (copy / "genotype.json").read_bytes() == genotype


def test_fresh_starts_over_and_removes_only_what_is_ours(copy, npz):
    (copy / "notes.txt").write_text("mine")
    (copy / "seed-0").mkdir()
    (copy / "seed-0" / "genotype.json").write_text("{}")
    completed(command(npz, copy, "--fresh", "--ratio", ".2", *TO_PROXY))
    assert results_of(copy) == {"scorer.pt", "scores.npz", "proxy.json"}
    assert (copy / "notes.txt").exists() and not (copy / "seed-0" / "genotype.json").exists()
    assert json.loads((copy / "proxy.json").read_text())["ratio"] == 0.2
    assert costs_of(copy)["search"]["wall_s"] == 0


@pytest.mark.parametrize("flags", [["--data", "nowhere"], ["--layers", "2"], ["--scores", "scores.npz"]], ids=str)
def test_fresh_removes_nothing_when_the_command_is_refused(flags, copy, npz, monkeypatch):
    monkeypatch.chdir(copy)
    before = files_of(copy)
    refused(command(npz, copy, "--fresh", *flags), flags[0].strip("-"))
    assert {name for name in before if before[name] != files_of(copy).get(name)} <= {"cost.json"}


def test_a_second_run_in_the_same_folder_is_refused(npz, tmp_path):
    with Run(tmp_path, stages=STAGES):
        refused(command(npz, tmp_path), "--out", "in use")
    assert not results_of(tmp_path)


# -- a part of the chain -----------------------------------------------------------------------------------------------


def test_one_stage_at_a_time_ends_like_one_command(finished, npz, tmp_path):
    expected = set()
    for stage, file in (("scorer", "scorer.pt"), ("scores", "scores.npz"), ("proxy", "proxy.json")):
        expected.add(file)
        completed(command(npz, tmp_path, "--stop-after", stage))
        assert results_of(tmp_path) == expected
    completed(command(npz, tmp_path))
    same_results(tmp_path, finished[0])
    bill = costs_of(tmp_path)
    assert [bill[stage]["skipped"] for stage in STAGES] == [True, True, True, False]
    for stage in STAGES:
        expected = costs_of(finished[0])[stage]["images_forward"]
        assert bill[stage]["images_forward"] == expected and bill[stage]["wall_s"] > 0


@pytest.mark.parametrize("start", [1, 2, 3])
def test_starting_later_bills_the_earlier_stages(start, finished, npz, tmp_path):
    given = ("scorer.pt", "scores.npz", "proxy.json")[start - 1]
    stop = [] if start == 3 else TO_PROXY
    completed(command(npz, tmp_path, f"--{given.split('.')[0]}", finished[0] / given, *stop))
    if start == 3:
        same_bytes(tmp_path, finished[0], "genotype.json", "alphas.npz")
    else:
        same_bytes(tmp_path, finished[0], "proxy.json")
    assert not results_of(tmp_path) & {"scorer.pt", "scores.npz", "proxy.json"} - {"proxy.json", "scores.npz"}
    assert given not in results_of(tmp_path)
    bill, earlier = costs_of(tmp_path), costs_of(finished[0])
    assert all(bill[stage] == {**earlier[stage], "skipped": True} for stage in STAGES[:start])
    assert not bill[STAGES[start]]["skipped"]


def test_a_given_file_without_its_bill_is_used_with_a_warning(finished, npz, tmp_path):
    shutil.copy(finished[0] / "scores.npz", tmp_path / "scores.npz")
    ended = completed(command(npz, tmp_path / "run", "--scores", tmp_path / "scores.npz", *TO_PROXY))
    assert "warning" in ended.out and "not billed" in ended.out
    same_bytes(tmp_path / "run", finished[0], "proxy.json")


def test_no_proxy_searches_on_every_image(npz, tmp_path):
    ended = completed(command(npz, tmp_path, "--proxy", "none", "--method", "random", *ONE_STEP))
    assert "these flags have no effect: " in ended.out and "--method" in ended.out
    assert results_of(tmp_path) == SEARCHED
    assert costs_of(tmp_path)["search"]["images_forward"] == 2 * 8  # a batch of either half
    refused(command(npz, tmp_path, "--ratio", ".2", "--proxy", "none", "--arch-share", ".25", *ONE_STEP), "proxy was")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method random --scorer.epochs 9 --scoring.draws 5", "method random these flags have no effect: --scorer"),
        ("--no-finals --finals.controls 9", "without --finals these flags have no effect: --finals.controls"),
        ("--scores {} --scorer.lr 1", "scores.npz these flags have no effect: --scorer.epochs, --scorer.batch-size"),
    ],
)
def test_flags_of_stages_that_are_not_run_are_named(flags, words, finished, npz, tmp_path):
    config = search.parse([*map(str, command(npz, tmp_path)), *flags.format(finished[0] / "scores.npz").split()])
    assert words in " ".join(without_effect(config))
    file = tmp_path / "config.json"  # as a run leaves it, with the common settings in every part
    file.write_text(json.dumps(asdict(replace(config, seed=3).spread()), default=str))
    again = search.parse(["--config", str(file), "--out", str(tmp_path)])
    assert list(without_effect(again)) == list(without_effect(config))


def test_a_candidate_is_not_removed_before_it_is_read(copy, npz):
    genotype = copy / "genotype.json"
    argv = command(npz, copy, "--finals", "--candidates", genotype, "--fresh")
    refused(argv, "--fresh would remove the file of --candidates")
    assert genotype.exists()


def test_a_command_that_only_skips_leaves_the_records_of_the_results(copy, finished, npz, tmp_path):
    """Otherwise config.json would list steps that nobody took."""
    before = {name: (copy / name).read_bytes() for name in ("config.json", "env.json")}
    moved = shutil.copy(npz, copy.parent / "moved.npz")
    ended = completed(command(npz, copy, "--stop-after", "scorer", "--arch-steps", 77, "--ratio", ".9"))
    assert "is up to date, skipped" in ended.out
    assert {name: (copy / name).read_bytes() for name in before} == before
    completed(command(moved, copy, "--stop-after", "scorer", "--arch-steps", 77))
    config = json.loads(before["config.json"])
    config["input"]["data"] = str(moved)  # where a report finds the images now
    assert json.loads((copy / "config.json").read_text()) == config
    completed(command(npz, copy, "--fresh", "--scorer", finished[0] / "scorer.pt", "--stop-after", "scorer"))
    assert json.loads((copy / "config.json").read_text())["stop_after"] == "scorer"


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--scoring.k", 80], "--scoring.k 80"), (["--scoring.pool-size", 2], "--scoring.pool-size must be"),
     (["--scoring.alpha", "inf"], "--scoring.alpha must be")],
)  # fmt: skip
def test_scoring_that_cannot_be_is_refused_before_the_scorer_is_trained(flags, words, npz, tmp_path):
    ended = main(command(npz, tmp_path, *flags))
    assert ended.code == 2 and words in ended.err and not results_of(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [["--proxy", "none", "--stop-after", "proxy"], ["--proxy", "none", "--export-list", "list.tsv"],
     ["--scores", "scores.npz", "--stop-after", "scorer"], ["--proxy", "proxy.json", "--stop-after", "scores"]],
    ids=" ".join,
)  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags, finished, npz, tmp_path, monkeypatch):
    monkeypatch.chdir(finished[0])
    refused(command(npz, tmp_path / "run", *flags, *ONE_STEP), flags[0], flags[2])
    assert not (tmp_path / "run").exists() or not results_of(tmp_path / "run")


def test_a_random_proxy_needs_no_scorer(npz, tmp_path):
    result = search.run(search.parse(command(npz, tmp_path, "--method", "random", *TO_PROXY)))
    assert results_of(tmp_path) == {"proxy.json"} and len(result.proxy.indices) == 30
    other = search.run(search.parse(command(npz, tmp_path / "b", "--method", "random", "--seed", 1, *TO_PROXY)))
    assert not np.array_equal(result.proxy.indices, other.proxy.indices)


def test_of_several_seeds_the_one_that_shares_most_edges_is_chosen(finished, npz, tmp_path):
    flags = ["--seeds", 3, "--seed", 7, *ONE_STEP, "--jobs", 2]
    argv = command(npz, tmp_path, "--proxy", finished[0] / "proxy.json", *flags)
    completed(argv)
    genotypes = [Genotype.load(tmp_path / f"seed-{i}" / "genotype.json") for i in range(3)]

    def edges(genotype: Genotype) -> set:
        cells = {"normal": genotype.normal, "reduce": genotype.reduce}
        return {(cell, i // 2, *edge) for cell, rows in cells.items() for i, edge in enumerate(rows)}

    shared = [sum(len(edges(a) & edges(b)) for b in genotypes if b is not a) for a in genotypes]
    assert len(set(map(str, genotypes))) == 3 and len(set(shared)) > 1  # otherwise this shows nothing
    assert Genotype.load(tmp_path / "genotype.json") == genotypes[int(np.argmax(shared))]
    for i in range(3):
        assert {"genotype.json", "genotypes.jsonl", "alphas.npz"} <= results_of(tmp_path / f"seed-{i}")
        assert not (tmp_path / f"seed-{i}" / "checkpoints").exists()
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["search/seed-0", "search/seed-1", "search/seed-2"]

    before = {name: content for name, content in files_of(tmp_path).items() if name != "cost.json"}
    assert completed(argv).out.count("is up to date, skipped") == 2
    assert {name: content for name, content in files_of(tmp_path).items() if name != "cost.json"} == before


def test_a_search_in_epochs_is_one_in_steps(finished, npz, tmp_path):
    """Its key and its history count the epochs in steps: 15 images are two batches of eight."""
    proxy = ["--proxy", finished[0] / "proxy.json"]
    unset = ["--rest-steps", "None", "--arch-steps", "None", "--record-every", "None"]
    epochs = [*unset, "--epochs", 3, "--frozen-epochs", 1]
    ended = completed(command(npz, tmp_path, *proxy, *epochs))
    assert "2 steps on the weights alone, then 4 on weights and architecture" in ended.out
    assert Genotype.load(tmp_path / "genotype.json") == Genotype.load(finished[0] / "genotype.json")
    same = ["--rest-steps", 2, "--arch-steps", 4, "--record-every", 2]
    assert "search: " in completed(command(npz, tmp_path, *proxy, *same)).out, "the same search by another name"


def test_the_search_may_see_smaller_images(finished, npz, tmp_path):
    """The area mean of the augmented images; scorer, scores and proxy are as they were."""
    seen = []
    forward = SuperNet.forward
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(SuperNet, "forward", lambda self, images: seen.append(images) or forward(self, images))
        proxy = ["--proxy", finished[0] / "proxy.json"]
        completed(command(npz, tmp_path / "full", *proxy, *ONE_STEP, "--search-size", 16))
        completed(command(npz, tmp_path / "half", *proxy, *ONE_STEP, "--search-size", 8))
    steps = [images for images in seen if len(images) == 8]  # the others measure what a batch needs of memory
    full, half = steps[:2], steps[2:]
    assert len(full) == 2
    for large, small in zip(full, half, strict=True):
        assert large.shape[2:] == (16, 16)
        torch.testing.assert_close(small, large.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)))
    size = "search_size was 16, now 8"
    refused(command(npz, tmp_path / "full", *proxy, *ONE_STEP, "--search-size", 8), size, "--fresh")


def test_a_search_that_starts_too_early_or_collapses_says_so(finished, npz, tmp_path, monkeypatch):
    proxy = ["--proxy", finished[0] / "proxy.json"]
    pools = Genotype.from_json(
        {
            **Genotype.load(finished[0] / "genotype.json").to_json(),
            "normal": [["max_pool_3x3", i % 2] for i in range(8)],
        }
    )
    monkeypatch.setattr(SuperNet, "genotype", lambda *_: pools)
    ended = completed(command(npz, tmp_path, *proxy))
    assert "warning: the architecture moves after 2 steps on the weights, 1.0 passes over their" in ended.out
    settled = "the record before the last had 16.0 of the 16 edges of the genotype on average: it had settled"
    assert settled in ended.out
    assert (
        "the search has collapsed: of the normal cell's 8 operations 0 are skip connections and 8 are pools"
        in ended.out
    )
    rested = completed(command(npz, tmp_path / "rested", *proxy, *ONE_STEP, "--arch-steps", 0, "--rest-steps", 1))
    assert "the architecture moves" not in rested.out, "where it never moves there is nothing to warn of"


@pytest.mark.parametrize(
    ("rest_steps", "images", "enough"),
    [(349, 100, 350), (350, 100, None), (789, 2500, 790), (790, 2500, None), (1800, 45_000, 14_070)],
)
def test_few_steps_and_few_passes_are_both_too_early(rest_steps, images, enough):
    said = []
    run = SimpleNamespace(say=said.append, world=World())
    halves = Halves(np.arange(images), np.arange(images), identity="")
    config = SearchConfig(rest_steps=rest_steps, arch_steps=5, batch_size=32)
    bilevel = config.bilevel("off", halves.epoch_steps(32))
    say_how_long(bilevel, config, halves, SimpleNamespace(image_size=32), run)
    assert [f"Set --rest-steps to {enough} or more" in line for line in said[1:]] == [True] * (enough is not None)


def test_the_list_for_other_trainers(finished, npz, tmp_path):
    flags = ["--proxy", finished[0] / "proxy.json", *TO_PROXY]
    completed(command(npz, tmp_path / "run", *flags, "--export-list", tmp_path / "list.tsv"))
    proxy = ProxyManifest.load(finished[0] / "proxy.json")
    rows = [line.split("\t") for line in (tmp_path / "list.tsv").read_text().splitlines()]
    assert rows == [[str(i), str(c), str(c)] for i, c in zip(proxy.indices, proxy.labels, strict=True)]


# -- the proxy on other copies of its data -----------------------------------------------------------------------------


def pixels_of(images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> list:
    return sorted((images[i].tobytes(), int(labels[i])) for i in indices)


def apply_proxy(proxy: Path, data: Path, out: Path) -> ProxyManifest:
    return search.run(search.parse(command(data, out, "--proxy", proxy, *TO_PROXY))).proxy


def test_a_proxy_selects_the_same_images_of_a_shuffled_copy(finished, npz, tmp_path):
    images, labels = draw_images()
    order = np.random.default_rng(5).permutation(IMAGES)
    shuffled = write_npz(tmp_path / "shuffled.npz", images[order], labels[order])
    proxy = ProxyManifest.load(finished[0] / "proxy.json")
    found = apply_proxy(finished[0] / "proxy.json", shuffled, tmp_path / "a")
    assert found.n == IMAGES and not np.array_equal(found.indices, proxy.indices)
    for half in ("indices", "weights", "arch"):
        there = pixels_of(images[order], labels[order], getattr(found, half))
        assert there == pixels_of(images, labels, getattr(proxy, half))


def test_a_proxy_of_an_npz_selects_the_same_images_of_a_folder(finished, tmp_path):
    images, labels = draw_images()
    order = np.random.default_rng(6).permutation(IMAGES)
    folder = write_folder(tmp_path / "folder", images[order], labels[order])
    proxy = ProxyManifest.load(finished[0] / "proxy.json")
    flags = ["--proxy", finished[0] / "proxy.json", *TO_PROXY, "--export-list", tmp_path / "list.tsv"]
    found = search.run(search.parse(command(folder, tmp_path / "b", *flags))).proxy
    assert [line.split("\t")[0] for line in (tmp_path / "list.tsv").read_text().splitlines()] == list(found.paths)
    for half in ("weights", "arch"):
        paths = [found.paths[np.searchsorted(found.indices, i)] for i in getattr(found, half)]
        there = sorted((np.asarray(Image.open(folder / p)).tobytes(), int(Path(p).parent.name)) for p in paths)
        assert there == pixels_of(images, labels, getattr(proxy, half))


def test_a_proxy_of_other_data_is_refused_with_the_first_missing_image(finished, tmp_path):
    proxy = ProxyManifest.load(finished[0] / "proxy.json")
    images, labels = draw_images()
    images[proxy.indices[3:]] ^= 1
    other = write_npz(tmp_path / "other.npz", images, labels)
    argv = command(other, tmp_path / "run", "--proxy", finished[0] / "proxy.json")
    refused(argv, "does not belong to other.npz", f"image {proxy.indices[3]} ", proxy.content[3])
    relabelled = write_npz(tmp_path / "relabelled.npz", draw_images()[0], (labels + 1) % CLASSES)
    argv = command(relabelled, tmp_path / "run", "--proxy", finished[0] / "proxy.json")
    refused(argv, f"image {proxy.indices[0]} ", proxy.content[0])
    assert not results_of(tmp_path / "run")


def test_repeated_images_are_matched_by_label_and_occurrence(tmp_path):
    images, labels = draw_images()
    images[3:12] = images[0]  # thrice in each class: repeated within it, and with conflicting labels across
    order = np.random.default_rng(7).permutation(IMAGES)
    original, shuffled = (write_npz(tmp_path / f"{i}.npz", images[o], labels[o]) for i, o in enumerate((..., order)))
    flags = ["--method", "random", "--ratio", ".7", *TO_PROXY]
    proxy = search.run(search.parse(command(original, tmp_path / "a", *flags))).proxy
    repeated = proxy.indices[np.isin(proxy.indices, [0, *range(3, 12)])]
    assert len(set(labels[repeated])) > 1 and len(set(labels[repeated])) < len(repeated) < 10  # worth a test
    found = apply_proxy(tmp_path / "a" / "proxy.json", shuffled, tmp_path / "b")
    assert len(found.indices) == len(set(found.indices))
    for half in ("weights", "arch"):
        there = pixels_of(images[order], labels[order], getattr(found, half))
        assert there == pixels_of(images, labels, getattr(proxy, half))


# -- files that cannot be read -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with five files that cannot be read, and their paths."""
    folder = write_folder(tmp_path_factory.mktemp("damaged"), *draw_images())
    jpeg, png = folder / "train" / "0" / "x.jpg", folder / "train" / "1" / "001.png"
    Image.fromarray(draw_images(seed=9)[0][0]).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-60])
    png.write_bytes(png.read_bytes()[:300])
    (folder / "train" / "2" / "002.png").write_bytes(b"no image at all")
    (folder / "train" / "2" / "005.png").write_bytes(b"")
    bomb = folder / "train" / "2" / "bomb.bmp"  # its header claims more pixels than Pillow is willing to open
    Image.fromarray(draw_images()[0][0]).save(bomb)
    bomb.write_bytes(bomb.read_bytes()[:18] + (2**17).to_bytes(4, "little") * 2 + bomb.read_bytes()[26:])
    return folder, ["0/x.jpg", "1/001.png", "2/002.png", "2/005.png", "2/bomb.bmp"]


@pytest.mark.parametrize("mode", [[], ["--max-resident-gb", "0"], ["--method", "random"]], ids=str)
def test_files_that_cannot_be_read_are_left_out_listed_and_counted(mode, damaged_folder, tmp_path):
    folder, bad = damaged_folder
    ended = completed(command(folder, tmp_path, "--ratio", 1, *mode, *TO_PROXY))
    assert f"warning: {len(bad)} files cannot be read" in ended.out and "bad_images.txt" in ended.out
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / "train" / name) for name in bad]
    proxy = ProxyManifest.load(tmp_path / "proxy.json")
    assert len(proxy.indices) == proxy.n - len(bad) == IMAGES - 3
    assert not {f"train/{name}" for name in bad} & set(proxy.paths)
    if "random" not in mode:
        assert np.array_equal(ScoreTable.load(tmp_path / "scores.npz").index, proxy.indices)


def test_bad_files_found_late_are_listed_too(damaged_folder, tmp_path, monkeypatch):
    """Of a large streamed set only a sample is read before training; the rest turns up while scoring."""
    folder, bad = damaged_folder
    monkeypatch.setattr(engine_data.augment.measure_constants, "__defaults__", (7,))
    streamed = ["--max-resident-gb", 0, "--image-size", 16]
    completed(command(folder, tmp_path / "run", *streamed, *TO_PROXY))
    listed = (tmp_path / "run" / "bad_images.txt").read_bytes()
    assert listed.count(b"\n") == len(bad)
    completed(command(folder, tmp_path / "a", "--scores", tmp_path / "run" / "scores.npz", *streamed, *TO_PROXY))
    assert (tmp_path / "a" / "bad_images.txt").read_bytes() == listed
    other = shutil.copytree(folder, tmp_path / "other")
    for path in list((other / "train").rglob("*.png")):  # another copy, to be matched by content
        path.rename(path.with_stem(f"renamed-{path.stem}"))
    found = completed(command(other, tmp_path / "b", "--proxy", tmp_path / "run" / "proxy.json", *streamed, *TO_PROXY))
    assert f"warning: {len(bad) - 1} files" in found.out  # a JPEG file is known by its bytes, which are not decoded


# -- no test image -----------------------------------------------------------------------------------------------------


def test_no_test_array_is_read(finished, tmp_path, monkeypatch):
    """With garbage for validation and test images everything is the same, and their arrays are never opened."""
    garbage = {"val_images": np.zeros(3), "val_labels": np.ones(1), "test_images": np.full(2, np.nan), "test_labels": 7}
    poisoned = write_npz(tmp_path / "tiny.npz", *draw_images(), **garbage)
    opened, original = [], zipfile.ZipFile.open

    def recording(self, name, *args, **kwargs):
        opened.append(getattr(name, "filename", name))
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", recording)
    completed(command(poisoned, tmp_path / "run"))
    same_results(tmp_path / "run", finished[0])
    assert "train_images.npy" in opened and not [name for name in opened if name.startswith(("val", "test"))]


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and arguments:
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else "")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory) -> tuple[Path, Path]:
    """A folder with nothing but training images, and a run on it."""
    place = tmp_path_factory.mktemp("folder")
    folder = write_folder(place / "set", *draw_images())
    completed(command(folder, place / "run", *ONE_STEP))
    return folder, place / "run"


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_no_file_under_test_is_opened(mode, folder_run, tmp_path):
    """Nor under val; and streamed and resident sets give the same."""
    global _opened
    folder = shutil.copytree(folder_run[0], tmp_path / "set")
    for split in ("test", "val"):
        for label in ("0", "1", "unheard-of"):
            (folder / split / label).mkdir(parents=True)
            (folder / split / label / "000.png").write_bytes(b"no image at all")
    sys.addaudithook(_audit)  # cannot be taken off again: it rests while _opened is None
    _opened = []
    try:
        limit = ["--max-resident-gb", 0 if mode == "streamed" else 1]
        ended = completed(command(folder, tmp_path / "run", *limit, *ONE_STEP))
        seen = set(_opened)
    finally:
        _opened = None
    assert f", {mode} on" in ended.out
    same_bytes(tmp_path / "run", folder_run[1], "proxy.json", "genotype.json", "alphas.npz", "metrics.csv")
    assert len([path for path in seen if path.startswith(str(folder / "train"))]) > IMAGES
    assert not [path for path in seen if path.startswith((str(folder / "test"), str(folder / "val")))]


# -- signals and failures on the way -----------------------------------------------------------------------------------


def signal_at(monkeypatch, stage: str, update: int, *signums: int) -> None:
    """Send this process signals right after the given progress report of a stage (counted from 1), once."""
    reports, original = [], Progress.update

    def reporting(self, *args, **kwargs):
        original(self, *args, **kwargs)
        reports.append(self.label)
        if self.label == stage and reports.count(stage) == update:
            for signum in signums:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(Progress, "update", reporting)


@pytest.mark.parametrize(
    ("stage", "update", "signum"),
    [("scorer", 1, signal.SIGINT), ("scorer", 3, signal.SIGTERM), ("scoring", 1, signal.SIGTERM),
     ("search", 1, signal.SIGTERM), ("search", 2, signal.SIGINT), ("search", 3, signal.SIGINT),
     ("search", 6, signal.SIGTERM)],
)  # fmt: skip
def test_a_signal_ends_the_step_and_the_rerun_goes_on(stage, update, signum, finished, npz, tmp_path, monkeypatch):
    """In the middle of an epoch and at its end; while alpha rests, at the end of that, later, after the last step."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    argv = command(npz, tmp_path, *([] if stage == "search" else TO_PROXY))
    signal_at(monkeypatch, stage, update, signum)
    ended = main(argv)
    assert ended.code == 128 + signum and signal.Signals(signum).name in ended.err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (tmp_path / "checkpoints" / f"{stage}.pt").exists() and "genotype.json" not in results_of(tmp_path)
    ended = completed(argv)
    assert re.search(rf"^{stage}: .*resumed after {IMAGES if stage == 'scoring' else update}$", ended.out, re.MULTILINE)
    same_bytes(tmp_path, finished[0], "scores.npz", "proxy.json")
    if stage == "search":
        same_results(tmp_path, finished[0])
    assert costs_of(tmp_path)[stage]["images_forward"] == costs_of(finished[0])[stage]["images_forward"]


def test_the_second_interrupt_does_not_wait(finished, npz, tmp_path, monkeypatch):
    signal_at(monkeypatch, "scorer", 4, signal.SIGINT, signal.SIGINT)
    ended = main(command(npz, tmp_path, *TO_PROXY))
    assert ended.code == 130 and "Traceback" not in ended.err
    completed(command(npz, tmp_path, *TO_PROXY))
    same_bytes(tmp_path, finished[0], "scores.npz", "proxy.json")


@pytest.mark.parametrize("stage", ["scorer", "scoring", "search"])
def test_a_checkpoint_left_behind_by_a_finished_stage_goes_at_last(stage, copy, npz):
    """A run can be killed after a stage has written its result and before it removes its checkpoint."""
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / f"{stage}.pt").write_bytes(b"of a stage that is done")
    completed(command(npz, copy))
    assert not (copy / "checkpoints").exists()


@pytest.mark.parametrize(("flag", "stage"), [("--scorer.lr", "scorer"), ("--lr", "search")])
def test_a_loss_that_is_not_finite_stops_with_its_step(flag, stage, finished, npz, tmp_path):
    part = ["--proxy", finished[0] / "proxy.json"] if stage == "search" else TO_PROXY
    argv = command(npz, tmp_path, *part, flag, "1e30")
    message = refused(argv, f"{stage}: ", code=1)
    step, epoch = map(int, re.search(r"not finite at step (\d+) of epoch (\d+)", message).groups())
    assert (step, epoch) != (1, 1)  # the very first loss is still that of the initial weights
    assert not results_of(tmp_path) & {"scorer.pt", "genotype.json"}
    assert refused(argv, code=1) == message  # what is saved is from before that step
    assert costs_of(tmp_path)[stage]["wall_s"] > 0


def test_the_first_loss_that_is_not_finite_is_the_one_named(finished, npz, tmp_path, monkeypatch):
    original = Search.step

    def step(self, train, val):
        result = original(self, train, val)
        step.calls += 1
        return result._replace(train_loss=result.train_loss * torch.nan) if step.calls >= 4 else result

    step.calls = 0
    monkeypatch.setattr(Search, "step", step)
    argv = command(npz, tmp_path, "--proxy", finished[0] / "proxy.json")
    refused(argv, "search: the loss was not finite at step 2 of epoch 2", "lower --lr or --arch-lr", code=1)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ratio 0", "--ratio"), ("--ratio 2", "--ratio"), ("--ratio nan", "--ratio"), ("--interval 0", "--interval"),
        ("--arch-share 1", "--arch-share"), ("--scoring.draws 1", "--scoring.draws"), ("--nonsense 3", "--nonsense"),
        ("--scoring.phi-anchor 1", "--scoring.phi-anchor"), ("--crop-padding -1", "--crop-padding"),
        ("--scorer.batch-size 0", "batch size"), ("--scorer.epochs -1", "epoch"), ("--epochs x", "--epochs"),
        ("--preset huge", "huge"), ("--scorer.mix-k 1", "--mix-k must be at least 2"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_named_before_anything_is_written(flags, words, npz, tmp_path):
    ended = main(command(npz, tmp_path / "run", *flags.split()))
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data nowhere", "no such folder"), ("--data nowhere.npz", "no such file"), ("--seeds 0", "--seeds"),
        ("--epochs 0", "epoch"), ("--batch-size 0", "--batch-size"), ("--layers 2", "layers"),
        ("--channels 3", "channels"), ("--search-size 18", "--search-size 16"), ("--seed -1", "--seed"),
        ("--search-size 32", "larger than the images"), ("--cuda-graphs --unrolled", "the steps of --unrolled"),
        ("--epochs 9", "no effect beside --rest-steps and --arch-steps"),
        ("--frozen-epochs 9", "no effect beside --rest-steps and --arch-steps"),
        ("--scorer.backbone huge", "backbone"),
        ("--amp fp16", "fp16"), ("--device cuda:77", "--device"), ("--proxy nowhere.json", "no such file"),
        ("--scores nowhere.npz", "no such file"), ("--scorer nowhere.pt", "no such file"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_sentence_before_any_stage(flags, words, npz, tmp_path):
    refused(command(npz, tmp_path / "run", *flags.split()), words)
    if (tmp_path / "run").exists():
        assert not results_of(tmp_path / "run") and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_images": None}, "train_images"),
        ({"train_labels": np.zeros((IMAGES, 2), dtype=int)}, "integers"),
        ({"train_labels": np.zeros(IMAGES, dtype=int)}, "single class"),
        ({"train_labels": np.arange(IMAGES) % 2 * 2}, "number of different labels"),
        ({"train_images": draw_images(size=3)[0]}, "--search-size 8 is larger than the images, 3 px"),
    ],
    ids=["missing", "shape", "one class", "empty class", "3 px"],
)
def test_bad_arrays_are_one_sentence(change, words, tmp_path):
    images, labels = draw_images()
    arrays = {"train_images": images, "train_labels": labels, **change}
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    refused(command(tmp_path / "bad.npz", tmp_path / "run"), words)
    assert not results_of(tmp_path / "run")


def test_bad_folders_are_one_sentence(tmp_path):
    images, labels = draw_images()
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    refused(command(tmp_path / "empty", out), tmp_path / "empty", "train")
    refused(command(write_folder(tmp_path / "one", images, labels * 0), out), "single class '0'")
    folder = write_folder(tmp_path / "folder", images, labels)
    for path in (folder / "train" / "1").iterdir():
        path.write_bytes(b"no image at all")
    refused(command(folder, out), "24 of 72 image files cannot be read, more than --max-bad-share 0.1 allows")
    refused(command(folder, out, "--max-bad-share", 1), "class '1'")
    assert not results_of(out)


@pytest.mark.parametrize("name", ["scorer.pt", "scores.npz", "proxy.json", "candidates.json", "genotype.json"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_result_cut_short_is_refused_by_name(name, share, copy, npz):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(share * len(content))])
    refused(command(npz, copy), copy / name)
    for flag in ("scorer", "scores", "proxy"):
        if name.startswith(flag + "."):
            refused(command(npz, copy / "other", f"--{flag}", copy / name, *TO_PROXY), copy / name)
            assert not results_of(copy / "other")


@pytest.mark.parametrize("stage", ["scorer", "scoring", "search"])
def test_a_checkpoint_cut_short_is_refused_by_name(stage, npz, tmp_path, monkeypatch):
    argv = command(npz, tmp_path, *([] if stage == "search" else TO_PROXY))
    signal_at(monkeypatch, stage, 1, signal.SIGTERM)
    assert main(argv).code == 143
    path = tmp_path / "checkpoints" / f"{stage}.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(argv, path, "--fresh")
    completed(command(npz, tmp_path, "--fresh", *TO_PROXY))


def altered_scores(path: Path, **change) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, **change})


META_WITHOUT_KEY = np.array(json.dumps({"format": "nas_kmix/scores", "bad": {}}))


@pytest.mark.parametrize(
    "change",
    [{"meta": np.array("[]")}, {"meta": np.array("no JSON")}, {"meta": META_WITHOUT_KEY}, {"losses": np.zeros((3, 4))},
     {"index": np.arange(IMAGES) + 0.5}, {"index": np.arange(IMAGES) + 5}, {"losses": np.full((IMAGES, 4), np.nan)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_scores_of_somebody_else_are_refused(change, copy, npz):
    altered_scores(copy / "scores.npz", **change)
    refused(command(npz, copy / "run", "--scores", copy / "scores.npz", *TO_PROXY), copy / "scores.npz")
    assert not results_of(copy / "run")


def test_scores_that_list_images_of_an_archive_as_unreadable_are_used(copy, npz):
    """No array's image can be unreadable, but a file may claim it; the images have no paths to list."""
    table = ScoreTable.load(copy / "scores.npz")
    keep = table.index != 7
    rows = {name: getattr(table, name)[keep] for name in ("index", "label", "losses")}
    columns = {name: values[keep] for name, values in table.columns.items()}
    replace(table, **rows, columns=columns, bad={7: "unreadable"}).save(copy / "scores.npz")
    ended = completed(command(npz, copy / "run", "--scores", copy / "scores.npz", *TO_PROXY))
    assert "warning: 1 files cannot be read" in ended.out
    assert (copy / "run" / "bad_images.txt").read_text() == "unreadable\n"


def test_files_of_somebody_else_are_refused(finished, npz, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "proxy.json").write_text('{"indices": [1, 2]}')
    (other / "list.json").write_text("[1, 2]")
    np.savez(other / "scores.npz", scores=np.ones(3))
    torch.save({"weights": torch.ones(3)}, other / "weights.pt")
    torch.save({"format": "nas_kmix/classifier"}, other / "scorer.pt")
    torch.save(torch.nn.Linear(2, 2), other / "module.pt")
    for flag, name in [("--proxy", "proxy.json"), ("--proxy", "list.json"), ("--scores", "scores.npz"),
                       ("--scorer", "weights.pt"), ("--scorer", "scorer.pt"), ("--scorer", "module.pt"),
                       ("--scorer", "proxy.json"), ("--scores", "proxy.json"), ("--proxy", "scores.npz")]:  # fmt: skip
        refused(command(npz, tmp_path / "run", flag, other / name, *TO_PROXY), other / name)
    unlike = write_npz(tmp_path / "unlike.npz", *draw_images(seed=1))
    refused(command(unlike, tmp_path / "run", "--scores", finished[0] / "scores.npz"), "--scores", "other data")
    four = write_npz(tmp_path / "four.npz", draw_images()[0], np.arange(IMAGES) % 4)
    refused(command(four, tmp_path / "run", "--scorer", finished[0] / "scorer.pt"), "num_classes=3")
    assert not results_of(tmp_path / "run")


def test_records_that_are_damaged_do_not_stop_a_run(copy, npz):
    (copy / "cost.json").write_text('{"stages": {"scorer": {"wall_s": "x"}}}')
    (copy / "metrics.csv").write_bytes(b"stage,epoch\n\xff\0,1\n")
    completed(command(npz, copy))


# -- other paths through the same stages -------------------------------------------------------------------------------


def test_the_imagenet_preset_on_large_images(tmp_path):
    """The stem for large images, K = 2, unequal halves, RandomResizedCrop, JPEG files of different sizes."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(64, 97, (40, 2))
    images = [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]
    folder = write_folder(tmp_path / "folder", images, np.arange(40) % 2, suffix=".jpg")
    flags = (
        "--preset imagenet --image-size 96 --scorer.backbone tiny --scorer.epochs 1 --scorer.batch-size 20 --threads 1 "
        "--scoring.draws 2 --ratio .5 --channels 4 --layers 3 --epochs 2 --warmup-epochs 1 --frozen-epochs 1 -j 0"
    )
    argv = ["--data", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu", *flags.split()]
    result = search.run(search.parse(argv))
    assert result.genotype == Genotype.load(tmp_path / "run" / "genotype.json")
    assert (len(result.proxy.weights), len(result.proxy.arch)) == (16, 4)
    origin = json.loads((tmp_path / "run" / "genotype.json").read_text())["provenance"]["config"]
    assert (origin["partial"], origin["arch_lr"], origin["arch_grad_clip"]) == (2, 6e-3, 5.0)
    with np.load(tmp_path / "run" / "alphas.npz") as tables:
        assert np.abs(tables["alphas_normal"][1] - tables["alphas_normal"][0]).max() > 1e-3


def test_bfloat16_and_channels_last_on_the_cpu(finished, npz, tmp_path):
    completed(command(npz, tmp_path, "--amp", "bf16", "--channels-last", *ONE_STEP))
    assert results_of(tmp_path) == RESULTS
    losses = [ScoreTable.load(folder / "scores.npz").mean for folder in (tmp_path, finished[0])]
    assert not np.array_equal(*losses) and np.allclose(*losses, rtol=0.3)
    assert np.corrcoef(*losses)[0, 1] > 0.9


def test_the_second_order_search(finished, npz, tmp_path):
    completed(command(npz, tmp_path, "--proxy", finished[0] / "proxy.json", "--unrolled", *ONE_STEP))
    assert costs_of(tmp_path)["search"]["images_forward"] == 4 * 8 + 8

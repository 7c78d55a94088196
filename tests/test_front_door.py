"""The ways in: one console script, functions for notebooks, settings of an earlier run, and runs that are only told."""

import importlib.util
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from processes import command

import nas_kmix
import search
import train_eval
from darts_space import GENOTYPES, BilevelConfig, Genotype
from nas_kmix import __main__ as door
from nas_kmix.commands import notebook
from nas_kmix.engine import cli, compute, program, workers
from nas_kmix.engine.containers import cpu_quota
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.settings import _names, configured

RESULTS = ("scores.npz", "proxy.json", "genotype.json", "genotypes.jsonl", "alphas.npz")
SETTINGS = {  # TINY as keywords
    "threads": 1,
    "device": "cpu",
    "workers": 0,
    "report": False,
    "ratio": 0.4,
    "finals": False,
    "scorer": {"epochs": 2, "batch_size": 8},
    "scoring": {"draws": 4},
    "channels": 2,
    "partial": 2,
    "layers": 3,
    "rest_steps": 2,
    "arch_steps": 2,
    "record_every": 2,
    "batch_size": 8,
}


def read(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def searched(npz, tmp_path_factory):
    """The folder of a search by the console script."""
    out = tmp_path_factory.mktemp("searched") / "run"
    assert door.main(["search", *command(npz, out)]) == 0
    return out


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", door.COMMANDS)
def test_every_command_has_a_module_and_help(name, capsys):
    assert importlib.util.find_spec(door.COMMANDS[name][0]) is not None
    assert door.main([name, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_help_lists_the_commands_and_a_typo_is_answered(capsys):
    for argv in ([], ["--help"]):
        assert door.main(argv) == 0
        said = capsys.readouterr().out
        assert all(f"nas_kmix {name}  " in said for name in door.COMMANDS)
    assert door.main(["serch"]) == 2
    assert "no command serch; did you mean search?" in capsys.readouterr().err
    assert door.main(["--version"]) == 0 and nas_kmix.__version__ in capsys.readouterr().out


def test_what_starts_fast_imports_little():
    """Torchvision and scipy.stats each take about as long to import as torch; a typo should not wait for them."""
    code = """
import sys, nas_kmix, nas_kmix.__main__
assert "torch" not in sys.modules, "the package itself"
import nas_kmix.commands.search, nas_kmix.commands.train
heavy = {"torchvision", "scipy.stats", "sklearn", "matplotlib", "tensorboard", "onnx"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(search.__file__).parent)


def test_it_is_a_module_too_and_says_its_name(tmp_path):
    argv = [sys.executable, "-m", "nas_kmix", "search", "--stop-after", "proxy", "--dry-run", "--proxy", "none"]
    environment = {**os.environ, "PYTHONPATH": str(Path(search.__file__).parent)}
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 2 and "--proxy none makes no proxy" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("started", "trains", "reports"),
    [
        (["python3", "search.py"], "python3 train_eval.py", "python3 -m nas_kmix report"),
        ([".venv/bin/python", "-u", "a b/train_eval.py"], "'a b/train_eval.py'", ".venv/bin/python -m nas_kmix report"),
        (["/venv/bin/python", "/venv/bin/nas-kmix", "search"], "nas-kmix train", "nas-kmix report"),
        (["/venv/bin/python", "there/nas-kmix", "search"], "there/nas-kmix train", "there/nas-kmix report"),
        (["python", "-m", "nas_kmix", "search"], "python -m nas_kmix train", "python -m nas_kmix report"),
        (["python", "-m", "ipykernel_launcher"], "python -m nas_kmix train", "python -m nas_kmix report"),
    ],
)
def test_messages_name_commands_as_the_user_types_them(started, trains, reports, monkeypatch, tmp_path, capsys):
    """Also once the door has opened, which changes argv[0] to what a help says."""
    script = next(word for word in started[1:] if word[0] != "-")
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", ["/src/nas_kmix/__main__.py" if "nas_kmix" in started else script, "search"])
    monkeypatch.setattr(program.shutil, "which", lambda _: "/venv/bin/nas-kmix")
    for _ in range(2):
        assert program.command("train").endswith(trains) and program.command("report") == reports
        assert program.command("train", "--out", "a b").endswith(f"{trains} --out 'a b'")
        assert search.main(["--test-only", "x"]) == 2
        assert f"use {program.command('train')} --eval-only FILE." in capsys.readouterr().err
        (tmp_path / "none.json").write_text("{}")
        assert search.main(["--proxy", str(tmp_path / "none.json"), "--out", str(tmp_path / "run")]) == 2
        assert f"make one with {program.command('search')} --stop-after proxy." in capsys.readouterr().err
        if not script.endswith(".py"):
            sys.argv[0] = program.command("search")


@pytest.mark.parametrize("main", [search.main, train_eval.main], ids=["search", "train"])
@pytest.mark.parametrize("flag", cli.FOREIGN)
def test_flags_of_other_projects_are_answered_with_ours(flag, main, capsys):
    for argv in ([flag, "1"], [f"{flag.replace('-', '_').replace('__', '--')}=1"]):
        assert main(argv) == 2
        assert f"There is no flag {flag}: " in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_flags_of_the_answers_exist():
    ours = {
        name.replace("_", "-") for config in (search.PRESETS, train_eval.PRESETS) for name in _names(config["quick"])
    }
    ours |= {f"scorer.{name.replace('_', '-')}" for name in _names(search.PRESETS["quick"].scorer)}
    named = {flag for hint in cli.FOREIGN.values() for flag in re.findall(r"--([a-z.-]+[a-z])", hint)}
    assert named and named <= ours
    assert not {flag.removeprefix("--") for flag in cli.FOREIGN} & ours


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presets", [search.PRESETS, train_eval.PRESETS], ids=["search", "train"])
def test_every_preset_comes_back_from_its_json(presets):
    for config in presets.values():
        assert configured(presets["quick"], json.loads(json.dumps(asdict(config), default=str))) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ratoi": 0.1}, "no setting 'ratoi'; did you mean 'ratio'"),
        ({"scorer": {"lerning": 1}}, "no setting 'lerning'"),
        ({"seed": "1"}, "seed cannot be '1'"),
        ({"seed": True}, "seed cannot be True"),
        ({"report": 1}, "report cannot be 1"),
        ({"ratio": None}, "ratio cannot be None"),
        ({"stop_after": "end"}, "stop_after is one of scorer, scores, proxy, not 'end'"),
        ({"color_jitter": [0.1, 0.1]}, "color_jitter takes 4 values"),
        ({"scoring": 5}, "scoring has settings of its own, such as 'draws', not 5"),
        ({"ratio": 2}, "--ratio is the share of images"),
    ],
)
def test_impossible_settings_are_named(values, said):
    with pytest.raises(ValueError, match=said):
        configured(search.PRESETS["quick"], values)


def test_settings_may_lie_where_their_flags_are():
    found = configured(
        search.PRESETS["quick"],
        {
            "data": Path("x.npz"),
            "device": "cpu",
            "finals": False,
            "ratio": 1,
            "scorer": {"epochs": 3, "milestones": [0.5]},
            "image_size": 64,
            "seed": 3,
        },
    )
    assert (found.input.data, found.input.image_size, found.selection.ratio, found.seed) == ("x.npz", 64, 1.0, 3)
    assert (found.scorer.optim.epochs, found.scorer.optim.milestones) == (3, (0.5,))
    assert found.search == search.PRESETS["quick"].search and found.device.device == "cpu" and not found.with_finals
    assert configured(found, {"finals": {"epochs": 3}}).finals.epochs == 3


def test_the_config_of_a_run_gives_the_same_bytes_in_another_folder(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in it are absolute
    assert search.main(["--config", str(searched / "config.json"), "--out", "again"]) == 0
    assert read(tmp_path / "again") == read(searched)


def test_flags_override_a_config(searched, tmp_path):
    file = str(searched / "config.json")
    found = search.parse([f"--config={file}", "--seed", "5", "--scorer.epochs", "1"])
    assert (found.seed, found.scorer.optim.epochs, found.scorer.optim.batch_size) == (5, 1, 8)
    assert found.out == search.PRESETS["quick"].out, "the folder is not a setting"


def test_files_that_a_run_wrote_besides_stay_its_own(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"export": "net.pt2", "eval_only": "last.pt"}))
    found = train_eval.parse(["--config", str(file)])
    assert found.export is None and found.eval_only is None
    file.write_text(json.dumps({"export_list": "list.tsv"}))
    assert search.parse(["--config", str(file)]).export_list is None


def test_the_next_command_goes_on_where_a_config_would_stop(npz, tmp_path, capsys):
    stopped = [*command(npz, tmp_path / "first"), "--stop-after", "proxy"]
    assert search.main([word for word in stopped if word != "--no-finals"]) == 0
    again = ["--config", str(tmp_path / "first" / "config.json"), "--out", str(tmp_path / "second")]
    capsys.readouterr()
    assert search.main([*again, "--scorer", str(tmp_path / "first" / "scorer.pt")]) == 0
    following = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("-m nas_kmix search ")[2])
    found = search.parse(following)
    assert found.stop_after is None and found.given.scorer is None
    assert found.given.proxy == tmp_path / "second" / "proxy.json"


@pytest.mark.parametrize("main", [search, train_eval], ids=["search", "train"])
def test_the_flips_of_a_config_hold_for_the_data_of_its_run(main, tmp_path, monkeypatch):
    """Other data have their own default, however they are named; an explicit flag wins."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.json"

    def flips(recorded, *argv):
        values = {"augmentation": {"flip": recorded}, "input": {"data": recorded_data}}
        file.write_text(json.dumps(values))
        return main.parse(["--config", str(file), *argv]).augmentation.flip

    recorded_data = str(tmp_path / "insects.npz")
    for recorded in (True, False):
        assert flips(recorded) is recorded
        for same in ("insects.npz", f"{tmp_path}/../{tmp_path.name}/insects.npz"):
            assert flips(recorded, "--data", same) is recorded
        assert flips(recorded, "--data=svhn.npz") is flips(recorded, "--data", "digits") is False
        assert flips(recorded, "--data", "birds.npz") is True
        assert flips(recorded, "--data", "birds.npz", "--no-flip") is False
        assert flips(recorded, "--data", "svhn.npz", "--flip") is True
        assert flips(recorded, "--no-flip") is False
    recorded_data = "digits"
    assert flips(True) is flips(True, "--data", "digits") is True


def test_a_config_of_another_kind_is_refused(searched, tmp_path, capsys):
    file = str(searched / "config.json")
    assert train_eval.main(["--config", file]) == 2
    assert "does not fit this command (there is no setting" in capsys.readouterr().err
    assert search.main(["--config", file, "--preset", "cpu"]) == 2
    assert "has the settings of --preset quick; leave out --preset cpu" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (("list.json", "is not the config.json of a run"), ("none.json", "there is no such file")):
        assert search.main(["--config", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


# -- notebooks ---------------------------------------------------------------------------------------------------------


def test_no_module_takes_the_names_of_the_functions():
    assert not {"search", "train"} & {module.name for module in pkgutil.iter_modules(nas_kmix.__path__)}
    assert nas_kmix.search is notebook.search and nas_kmix.train is notebook.train
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        _ = nas_kmix.serach


def test_a_notebook_searches_and_trains_in_folders_of_its_own(npz, searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = nas_kmix.search(data=npz, **SETTINGS)
    assert re.fullmatch(r"runs/search-[0-9a-f]{8}", str(found.folder)) and read(found.folder) == read(searched)
    assert found.genotype == Genotype.load(searched / "genotype.json") and len(found.proxy.indices) == 39
    before = (found.folder / "genotype.json").stat().st_mtime_ns
    again = nas_kmix.search(data=npz, **{**SETTINGS, "threads": 2})  # how to compute makes no other run
    assert again.folder == found.folder and again.genotype == found.genotype
    assert (found.folder / "genotype.json").stat().st_mtime_ns == before, "it is there already"
    assert nas_kmix.search(data=npz, **SETTINGS, stop_after="proxy").folder == found.folder  # nor does how far to go
    assert nas_kmix.search(data=npz, **{**SETTINGS, "seed": 1}, stop_after="scorer").folder != found.folder

    arguments = {"data": npz, "image_size": 32, "epochs": 1, "channels": 2, "layers": 3, "workers": 0, "report": False}
    trained = nas_kmix.train(genotype=found.genotype, **arguments, threads=1)
    assert trained.result["best"]["val_accuracy"] == trained.result["last"]["val_accuracy"]
    assert trained.network().class_names == ("0", "1", "2") and trained.network().genotype == found.genotype


def test_a_flag_may_be_given_beside_the_dict_of_its_part():
    for settings in ({"data": "a", "input": {"split_seed": 1}}, {"input": {"data": "a"}}, {"data": "a"}):
        assert notebook._flag(settings, "input", "data") == "a"
    assert notebook._flag({"device": {"threads": 1}}, "device", "device") is None
    assert notebook._flag({"device": "cpu"}, "device", "device") == "cpu"


def test_what_a_notebook_says_wrongly_is_a_value_error(npz, tmp_path):
    with pytest.raises(ValueError, match="no preset 'paper2'; choose one of quick"):
        nas_kmix.search("paper2")
    with pytest.raises(ValueError, match="no setting 'ratoi'"):
        nas_kmix.search(data=npz, out=tmp_path / "run", ratoi=0.1)
    with pytest.raises(ValueError, match="Give one of --genotype"):
        nas_kmix.train(data=npz, out=tmp_path / "run")
    with pytest.raises(ValueError, match="dry_run is for the command line"):
        nas_kmix.search(data=npz, out=tmp_path / "run", dry_run=True)
    with pytest.raises(ValueError, match="config is for the command line"):
        nas_kmix.train(data=npz, out=tmp_path / "run", genotype="DARTS_V1", config="nowhere.json")
    with pytest.raises(ValueError, match="eval_only trains nothing"):
        nas_kmix.train(data=npz, out=tmp_path / "run", eval_only="last.pt")
    assert not (tmp_path / "run").exists()


def test_a_notebook_may_say_the_same_in_several_ways(npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "finals": True, "stop_after": "scorer"}
    nested = {**settings, "seed": np.int64(0), "input": {"data": npz}}
    plain = nas_kmix.search(data=npz, **settings, candidates=[GENOTYPES["DARTS_V1"].to_text()])
    again = nas_kmix.search(**nested, candidates=[GENOTYPES["DARTS_V1"]])
    assert again.folder == plain.folder


def test_a_backbone_comes_back_with_its_weights(npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = nas_kmix.train(data=npz, backbone="tiny", epochs=1, workers=0, threads=1, report=False)
    state = torch.load(trained.folder / "last.pt", weights_only=True)["model"]
    network = trained.network()
    assert not network.training and all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(npz, tmp_path, capsys):
    assert search.main([*command(npz, tmp_path / "run"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny.npz: 96 training images of 3 classes, 16 px, mirrored at random, resident on cpu"
    assert re.match(r"scorer    train tiny for 2 epochs of 11 steps with 8 images: about \d+ s, \d", lines[1])
    assert re.match(r"scoring   4 losses and the EL2N of each of 96 images: about \d+ s", lines[2])
    assert lines[3] == (
        "proxy     select, 39 of 96 images, 13 to 13 of each class: 20 train the weights, 19 the architecture"
    )
    assert lines[4].startswith("search    2 steps on the weights, then 2 on the architecture too, 8 images: about ")
    assert lines[5].startswith("total     about ")
    with_finals = [word for word in command(npz, tmp_path / "run") if word != "--no-finals"]
    assert search.main([*with_finals, "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("finals    at most 4 candidates and 2 random ones, for 2, 4 epochs of 20 images: about ")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_is_there_from_what_is_missing(npz, searched, tmp_path, capsys):
    copy = shutil.copytree(searched, tmp_path / "run")
    argv = [*command(npz, copy), "--dry-run"]

    def stages(*more):
        assert search.main([*argv, *more]) == 0
        return [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1:5]]

    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    found = stages()
    assert [found[i] for i in (0, 1, 3)] == ["found"] * 3 and found[2].startswith("found, 39 of 96 images")
    assert stages("--fresh")[0].startswith("train tiny") and (copy / "scorer.pt").exists()
    (copy / "scores.npz").rename(tmp_path / "scores.npz")
    assert [line.split()[0].rstrip(",") for line in stages()] == ["found", "4", "select", "2"]
    (tmp_path / "scores.npz").rename(copy / "scores.npz")
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert search.main([*argv, "--ratio", ".5"]) == 2
    assert "ratio was 0.4, now 0.5" in capsys.readouterr().err


def test_a_dry_run_counts_the_memory_of_searches_side_by_side(npz, tmp_path, capsys):
    argv, needed = [*command(npz, tmp_path / "run"), "--method", "random", "--no-finals", "--dry-run"], {}
    for jobs in (1, 8):
        assert search.main([*argv, "--seeds", "8", "--jobs", str(jobs)]) == 0
        (line,) = re.findall(r"^search .*, (\d+) MB$", capsys.readouterr().out, re.MULTILINE)
        needed[jobs] = int(line)
    assert needed[8] == pytest.approx(8 * needed[1], abs=8)


def test_a_dry_run_up_to_a_proxy_needs_no_halves(npz, tmp_path, capsys):
    argv = [*command(npz, tmp_path / "run"), "--method", "random", "--ratio", ".03", "--stop-after", "proxy"]
    assert search.main([*argv, "--dry-run"]) == 0
    assert "3 train the weights, 0 the architecture" in capsys.readouterr().out


def test_a_dry_run_refuses_one_image_a_class_at_once(image_folder, tmp_path, capsys):
    folder = image_folder(per_class=1, classes=("ant", "bee", "fly"), sizes=((16, 16),))
    assert search.main([*command(folder, tmp_path / "run"), "--dry-run"]) == 2
    assert "no class has two images" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_dry_run_of_a_training(tmp_path, capsys):
    path = tmp_path / "set.npz"
    np.savez(path, train_images=draw_pixels(40, 32, 32, 3), train_labels=np.arange(40) % 4)
    argv = ["--data", str(path), "--out", str(tmp_path / "run"), "--genotype", "PC_DARTS_cifar", "-j", "0"]
    argv += ["--channels", "2", "--layers", "3", "--epochs", "2", "--batch-size", "8", "--device", "cpu", "--dry-run"]
    assert train_eval.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("set.npz: 36 training images of 4 classes, 32 px")
    assert lines[1].startswith("train     train 3 cells of 2 channels for 2 epochs of 5 steps with 8 images: about ")
    assert lines[3] == "validation: 4 images held out of the training images (--val-share 0.1)"
    assert not (tmp_path / "run").exists()
    assert train_eval.main([*argv, "--limit-steps", "2"]) == 0
    assert "for 2 epochs of 2 steps with 8 images" in capsys.readouterr().out
    assert train_eval.main([*argv, "--eval-only", str(path)]) == 2


def test_a_dry_run_of_a_training_tells_what_is_there(tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "run"
    np.savez(path, train_images=draw_pixels(40, 16, 16, 3), train_labels=np.arange(40) % 4)
    argv = ["--data", str(path), "--out", str(out), "--backbone", "tiny", "-j", "0", "--no-report", "--epochs", "1"]
    argv += ["--batch-size", "8", "--device", "cpu"]
    assert train_eval.main(argv) == train_eval.main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "train     found"
    assert train_eval.main([*argv, "--lr", ".3"]) == train_eval.main([*argv, "--lr", ".3", "--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1] and "lr was" in said[0]
    assert train_eval.main([*argv, "--lr", ".3", "--fresh", "--dry-run"]) == 0
    assert search.main(["--data", str(path), "--out", str(out), "--device", "cpu", "--dry-run"]) == 2
    assert "holds the run of another command" in capsys.readouterr().err


def test_the_estimate_is_near_the_truth(npz, tmp_path):
    """Of memory, which does not depend on what else the machine does: the line through two batches fits a third."""
    from nas_kmix.backbones import build_backbone
    from nas_kmix.commands import dry_run
    from nas_kmix.engine import forecast
    from nas_kmix.engine.learner import Learner, OptimConfig, Recipe

    data = load_data(DataConfig(data=str(npz)))
    model = build_backbone("small", num_classes=3)
    learner = Learner(model, OptimConfig(), Recipe(), compute.Compute())

    def step(n):
        learner.step(*dry_run._random_images(n, 16, data))

    found = forecast.at(48, *forecast.measured(step, model))
    assert found.bytes == pytest.approx(forecast.cost_of(step, 48, model).bytes, rel=0.02)
    assert found.bytes > 4 * sum(p.numel() * 4 for p in model.parameters())


# -- defaults that follow the machine, and flags of the published code -------------------------------------------------


def test_workers_follow_the_cores_of_each_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(compute, "cpu_quota", lambda: math.inf)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (compute.cores(), compute.DeviceConfig().workers) == (12, 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of torchrun
    assert (compute.cores(), compute.DeviceConfig().workers) == (1, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(compute, "cpu_quota", lambda: 2.5)  # docker run --cpus 2.5
    assert (compute.cores(), compute.DeviceConfig().workers) == (2, 2)


@pytest.mark.parametrize(
    ("line", "root", "files", "expected"),
    [
        ("0::/a/b", "", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 2.5),
        ("0::/", "", {}, math.inf),
        ("1:cpu,cpuacct:/a", "cpu,cpuacct", {"a/cpu.cfs_quota_us": "50000", "a/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/a", "cpu", {"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:cpuset:/a", "cpuset", {"a/cpu.cfs_quota_us": "1", "a/cpu.cfs_period_us": "1"}, math.inf),
    ],
)
def test_the_quota_of_a_container_is_that_of_its_narrowest_group(line, root, files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / root / name).write_text(text)
    (tmp_path / "cgroup").write_text(f"{line}\n")
    assert cpu_quota(tmp_path / "cgroup", tmp_path) == expected


def test_channels_last_is_the_default_where_it_was_measured_faster(monkeypatch):
    for cuda, device, expected in ((False, "auto", True), (True, "auto", False), (True, "cpu", True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        flags = ["--preset", "cifar", "--genotype", "DARTS_V2", "--device", device]
        assert train_eval.parse(flags).device.channels_last is expected
        assert train_eval.parse([*flags, "--no-channels-last"]).device.channels_last is False
    assert search.parse(["--preset", "gpu", "--device", "cuda"]).device.channels_last is True


def test_the_search_takes_the_published_code_s_settings():
    flags = "--lr-min .001 --momentum .8 --weight-decay 1e-4 --grad-clip 3 --arch-weight-decay 1e-2 --cutout 8"
    config = search.parse(["--preset", "paper", *flags.split()]).spread()
    found = config.search.bilevel("off", epoch_steps=10)
    values = (found.lr_min, found.momentum, found.weight_decay, found.grad_clip, found.arch_weight_decay)
    assert values == (0.001, 0.8, 1e-4, 3.0, 1e-2)
    assert (config.search.augmentation.cutout, config.scorer.augmentation.cutout) == (8, 0)
    default = search.parse(["--preset", "paper"]).search.bilevel("off", epoch_steps=98)
    assert default == BilevelConfig(15 * 98, 35 * 98), "PC-DARTS's on CIFAR"


@pytest.mark.parametrize("flag", ["--lr-min -1", "--momentum 1", "--weight-decay -1", "--arch-weight-decay inf"])
def test_impossible_settings_of_the_search_are_refused_before_anything_runs(flag, npz, tmp_path, capsys):
    assert search.main([*command(npz, tmp_path / "run"), *flag.split()]) == 2
    name = flag.split()[0].removeprefix("--").replace("-", "_")
    assert f"error: {name} is " in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_loader_that_starves_the_network_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(workers, "cores", lambda: 8)
    hunger = workers.Hunger()
    for _ in range(100):  # half a minute of a network that waits for a third of the time
        hunger.note(0.1, 0.3, 2)
    for _ in range(400):
        hunger.note(0.1, 0.3, 2)
    assert capsys.readouterr().out == ""
    for _ in range(400):
        hunger.note(0.25, 0.3, 2)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "raise --workers, now 2 for 8 cores" in said
    full = workers.Hunger()
    full.note(50.0, 60.0, 8)
    assert "83 % of the time is spent waiting for images to be read; store smaller copies" in capsys.readouterr().out


def test_streamed_batches_count_as_waited_for(image_folder, monkeypatch):
    noted = []
    monkeypatch.setattr(workers._hunger, "note", lambda *values: noted.append(values))
    data = load_data(DataConfig(data=str(image_folder(per_class=8, sizes=((40, 40),))), max_resident_gb=0))
    noted.clear()
    for _ in data.batches([np.arange(4), np.arange(4, 8), np.arange(8, 12)]):
        time.sleep(0.05)
    assert len(noted) == 2, "the first of a pass does not count"
    for waited, passed, processes in noted:
        assert 0 < waited <= passed - 0.05 and processes == 0

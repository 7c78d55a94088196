"""A batch that cannot fit into memory is refused before anything is trained, with one that does."""

import contextlib
import io
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from torch import nn

import search
import train_eval
from darts_space import GENOTYPES, CifarNetwork, SuperNet
from nas_kmix.backbones import build_backbone
from nas_kmix.engine import memory
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import load_data
from nas_kmix.engine.distributed import World
from nas_kmix.pipeline import checks

ONE_THREAD = "--threads 1 --device cpu -j 0 --no-report"
SEARCH = shlex.split(
    f"{ONE_THREAD} --scorer.epochs 1 --scoring.draws 2 --scoring.k 2 --ratio .5 --channels 2 --partial 2 --layers 3 "
    "--rest-steps 1 --arch-steps 1 --record-every 1"
)
TRAIN = shlex.split(
    f"{ONE_THREAD} --genotype PC_DARTS_cifar --channels 2 --layers 3 --epochs 1 --val-share .3 --image-size 32"
)
NETWORKS = {
    "small": lambda: build_backbone("small", num_classes=3, stem="cifar", seed=0),
    "supernet": lambda: SuperNet(4, 3, 3, 2, "cifar", True, generator=torch.Generator().manual_seed(0)),
    "genotype": lambda: CifarNetwork(GENOTYPES["DARTS_V1"], 2, 3, 3, generator=torch.Generator().manual_seed(0)),
}


def test_what_is_kept_of_an_image_is_counted_by_hand():
    """A linear layer keeps its input, a sigmoid its output; a view counts once."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid())
    few, more = (memory.kept_bytes(model, n, 2, Compute()) for n in (2, 4))
    assert more - few == 2 * (12 + 5) * 4


@pytest.mark.parametrize("name", NETWORKS)
def test_two_small_batches_foretell_a_large_one(name):
    few, more, many = (memory.kept_bytes(NETWORKS[name](), n, 32, Compute()) for n in (2, 4, 24))
    assert many == pytest.approx(few + 11 * (more - few), rel=0.01)


def test_the_model_and_the_random_state_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    memory.kept_bytes(model, 2, 8, Compute())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training


def test_processes_and_parts_divide_a_batch(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid())
    monkeypatch.setattr(memory, "free_bytes", lambda *_, **__: 10 * 68.0)
    memory.check_fits(model, 10, 2, Compute(), flag="--b", images=90)
    memory.check_fits(model, 90, 2, Compute(), flag="--b", images=10)
    memory.check_fits(model, 60, 2, Compute(), flag="--b", images=90, world=World(0, 2), parts=3)
    with pytest.raises(ValueError, match=r"--b 61 needs more than .* for each process, where .* use --b 36"):
        memory.check_fits(model, 61, 2, Compute(), flag="--b", images=90, world=World(0, 2), parts=3)


@pytest.mark.parametrize(("seeds", "shares"), [(1, 4), (3, 4), (4, 1)])
def test_processes_share_the_batch_of_a_search_unless_each_has_its_own(seeds, shares, tmp_path, monkeypatch):
    judged = {}
    monkeypatch.setattr(checks, "check_fits", lambda *_, flag, world, **__: judged.update({flag: world or World()}))
    config = search.parse([*SEARCH, "--data", "digits", "--proxy", "none", "--seeds", str(seeds)])
    run = SimpleNamespace(world=World(2, 4), compute=Compute(), path=tmp_path.joinpath)
    checks.check_memory(config, load_data(config.input), run)
    assert {flag: world.size for flag, world in judged.items()} == {"--batch-size": shares}


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/a/b", {"a/memory.max": "700", "a/b/memory.max": "max", "{}/memory.stat": "anon 200\nfile 400"}),
        ("4:memory:/a/b", {"memory/a/memory.limit_in_bytes": "700", "{}/memory.stat": "total_rss 200\ncache 400"}),
        ("4:memory:/not/mounted", {"memory/memory.limit_in_bytes": "700", "{}/memory.stat": "total_rss 200"}),
    ],
)
def test_limits_of_containers_are_seen(line, files, tmp_path):
    """Also of an enclosing group; what only caches files can be dropped."""
    folders = {str((tmp_path / name).parent) for name in files if "{}" not in name}
    for name, text in files.items():
        for folder in folders if "{}" in name else [tmp_path]:
            path = tmp_path / name.replace("{}", str(folder))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "cgroup").write_text(f"3:cpuset:/\n{line}\n")
    assert list(memory._of_the_container(tmp_path / "cgroup", tmp_path)) == [500]


@pytest.fixture
def little_memory(tmp_path, monkeypatch):
    """The flags of 96 images and a folder, on a machine where 10 images fit."""
    np.savez(tmp_path / "set.npz", train_images=draw_pixels(96, 16, 16, 3), train_labels=np.arange(96) % 3)
    monkeypatch.setattr(memory, "kept_bytes", lambda _, n, *__: 1e6 * n)
    monkeypatch.setattr(memory, "free_bytes", lambda *_, **__: 15e6)
    return ["--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "run")]


with_each_batch = pytest.mark.parametrize(
    ("main", "flags", "flag"),
    [
        (search.main, [*SEARCH, "--batch-size", "4"], "--scorer.batch-size"),
        (search.main, [*SEARCH, "--scorer.batch-size", "4"], "--batch-size"),
        (train_eval.main, TRAIN, "--batch-size"),
    ],
)


@with_each_batch
def test_a_dry_run_refuses_such_a_batch_in_the_same_words(main, flags, flag, tmp_path, little_memory, capsys):
    said = []
    for more in ((), ("--dry-run",)):
        assert main([*flags, *little_memory, flag, "10000", *more]) == 2
        said.append(capsys.readouterr())
    assert said[0] == said[1] and f"error: {flag} 10000 needs more than" in said[0].err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@with_each_batch
def test_a_command_refuses_such_a_batch_and_takes_the_one_that_it_names(main, flags, flag, tmp_path, little_memory):
    argv, complained = [*flags, *little_memory], io.StringIO()
    with contextlib.redirect_stderr(complained), contextlib.redirect_stdout(io.StringIO()):
        assert main([*argv, flag, "10000"]) == 2
        assert not (tmp_path / "run").exists()
        said = complained.getvalue()
        advised = re.fullmatch(
            rf"error: {flag} 10000 needs more than .* GB of memory on cpu, where 0\.0 GB are free; use {flag} (10)\.\n",
            said,
        )
        assert advised, said
        assert main([*argv, flag, advised[1]]) == 0, complained.getvalue()

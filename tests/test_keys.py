"""Every field of both commands' configs changes a stage's key, or is on a short list of those that change no result.

The keys are those that the stages themselves would compute, on two small archives.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_pixels

import search
import train_eval
from darts_space import GENOTYPES, read_genotype
from nas_kmix.analysis import landscape
from nas_kmix.backbones import build_backbone
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.compute import DeviceConfig
from nas_kmix.engine.data import load_data
from nas_kmix.engine.keys import identity
from nas_kmix.pipeline import finals, network, proxy, scorer, scores
from nas_kmix.pipeline import search as search_stage
from nas_kmix.pipeline.candidates import Candidate
from nas_kmix.scores import ScoreTable
from nas_kmix.splits import divide, other_splits

# What changes no result: places, reporting, what is run at all, and sizes that bound memory alone.
SEARCH = {
    *("preset", "out", "stop_after", "given.scorer", "given.scores", "given.proxy", "export_list", "fresh", "report"),
    *("with_finals", "jobs", "quiet", "input.data_root", "input.max_bad_share", "scoring.batch_size"),
    *("search.cuda_graphs", "invocation.config", "invocation.dry_run"),
}
TRAIN = {
    *("preset", "out", "fresh", "quiet", "skip_bad", "report", "eval_only", "export", "export_raw", "input.data_root"),
    *("input.max_bad_share", "invocation.config", "invocation.dry_run"),
}
DEVICE = {f"device.{field.name}" for field in fields(DeviceConfig)}  # a run may go on on another device
# Filled in from the fields `augmentation` and `seed` of the whole.
FILLED = {*(f"{part}.seed" for part in ("scorer", "scoring", "selection", "search")), "scorer.augmentation"}
FILLED |= {"search.augmentation", "finals.augmentation", "finals.seed", "finals.jobs", "search.jobs"}
# Values to change a field to, where neither the next number nor the opposite will do.
OTHER = {
    "device.amp": "bf16",
    "device.device": "cpu",
    "eval_only": Path("last.pt"),
    "export": Path("net.pt2"),
    "export_list": Path("list.tsv"),
    "invocation.config": Path("config.json"),
    "given.proxy": Path("proxy.json"),
    "given.scorer": Path("scorer.pt"),
    "given.scores": Path("scores.npz"),
    "preset": "cpu",
    "stop_after": "proxy",
    "candidates": ("DARTS_V1",),
    "finals.channels": 10,
    "finals.images": 5,
    "augmentation.color_jitter": (0.1, 0.0, 0.0, 0.0),
    "augmentation.crop_padding": 5,
    "input.image_size": 64,
    "input.max_resident_gb": 0.0,
    "mix.mix": "mixup",
    "network.backbone": "small",
    "network.block_size": 5,
    "network.genotype": "DARTS_V1",
    "network.macs_convention": "published",
    "network.max_macs": "12M",
    "optim.milestones": (0.5,),
    "optim.schedule": "linear",
    "recipe.ema": 0.9,
    "recipe.grad_clip": 1.0,
    "recipe.limit_steps": 1,
    "recipe.loss": "softmax_bce",
    "scorer.backbone": "small",
    "scorer.mix.mix": "none",
    "scorer.optim.milestones": (0.5,),
    "scorer.optim.schedule": "linear",
    "scoring.loss": "mixed",
    "scoring.partners": "fixed",
    "search.arch_grad_clip": 1.0,
    "search.arch_steps": 5,
    "search.edges_by": "alpha-beta",
    "search.frozen_epochs": 1,
    "search.full_batch": 512,
    "search.lr": 0.2,
    "search.record_every": 7,
    "search.rest_steps": 3,
    "search.schedule": "constant",
    "search.search_size": 16,
    "selection.measure": "mean",
    "selection.method": "top",
    "train_images": 5,
    "val_share": 0.3,
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Two archives of 24 images of 32 px, of three classes."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(2):
        pixels, labels = draw_pixels(24, 32, 32, 3, seed=seed), np.arange(24) % 3
        np.savez(folder / f"{seed}.npz", train_images=pixels, train_labels=labels)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder, which streams where it does not fit into memory."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for i in range(8):
        path = folder / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_pixels(70, 70, 3, seed=i)).save(path)
    return folder


def leaves(config, prefix=""):
    """All fields by their dotted names, those of nested configs too."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value) and prefix + field.name not in FILLED:
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def changed(config, name, value):
    """The config with another value in the field of that dotted name."""
    head, _, rest = name.partition(".")
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def another(name, value):
    """Another value that is allowed."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, Path):
        return value / "elsewhere"
    assert isinstance(value, bool | int | float), f"choose another value for {name}"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.9 * value or 0.05


def search_keys(config):
    """The keys of all five stages, of a search that finds nothing in its folder."""
    config = config.spread()
    data = load_data(config.input)
    model = build_backbone(config.scorer.backbone, num_classes=data.num_classes, seed=0)
    losses = np.random.default_rng(0).random((len(data), 4), dtype=np.float32)
    table = ScoreTable(np.arange(len(data)), data.labels, losses)
    halves = search_stage.Halves.of_all_images(data, config.selection.arch_share, seed=0)
    halves = replace(halves, weights=halves.weights[::2], arch=halves.arch[::2])
    roles = finals.divide(data, halves.weights, halves.arch, config.finals)
    given = {text: read_genotype(text) for text in config.candidates}
    searched = [Candidate(GENOTYPES["PC_DARTS_cifar"], "bilevel", 0, 1)]
    entrants = finals.entrants(searched, {}, given, config.finals, data)
    return [
        scorer.key(config.scorer, data),
        scores.key(config.scoring, scorer.Scorer(model, data, None), data),
        proxy.key(config.selection, table, data),
        search_stage.key(config.search, halves, data),
        finals.key(config.finals, entrants, roles, data),
    ]


def train_keys(config):
    """The key of a training, whatever its weights were drawn from."""
    data = load_data(config.input)
    evaluated = other_splits(config.input, data, device=torch.device("cpu"), workers=0, strict=True)
    settings = {"val_share": config.val_share, "train_images": config.train_images, "seed": config.seed}
    parts = divide(data, evaluated, **settings)
    model = network.build(config.network, data, seed=0)
    return [network.key(config, model, *parts, BadFileList([]))]


def misjudged(config, keys, listed, elsewhere):
    """The fields that change no key without being `listed`, and those that change one although they are.

    Those that are tested `elsewhere` are left out.
    """
    values, before = dict(leaves(config)), keys(config)
    assert listed | elsewhere <= values.keys(), "a name on the list is of no field"
    asked = values.keys() - FILLED - elsewhere
    return {n for n in asked if (keys(changed(config, n, another(n, values[n]))) == before) != (n in listed)}


def test_every_field_of_a_search_is_in_a_key_or_on_the_list(archives):
    unset = [
        word
        for name in ("rest-steps", "arch-steps", "record-every", "search-size", "lr")
        for word in (f"--{name}", "None")
    ]
    flags = ["--batch-size", "4", "--epochs", "4", "--schedule", "cosine", *unset]
    config = search.parse(["--data", str(archives / "0.npz"), *flags])
    elsewhere = {
        "input.data",
        "input.split_seed",
        "input.max_resident_gb",
        "scoring.pool_size",
    }  # here and in the next test
    assert misjudged(config, search_keys, SEARCH | DEVICE, elsewhere) == set()
    other = changed(config, "input.data", str(archives / "1.npz"))
    assert all(a != b for a, b in zip(search_keys(config), search_keys(other), strict=True))


def test_the_pool_and_its_size_count_by_their_effect(photographs):
    """All images of a set in memory are the pool of its scores; of a streamed set it is drawn."""
    resident = search.parse(["--data", str(photographs), "--image-size", "64", "--batch-size", "4"])
    streamed = changed(resident, "input.max_resident_gb", 0.0)
    keys = {name: search_keys(config) for name, config in (("resident", resident), ("streamed", streamed))}
    assert search_keys(changed(resident, "scoring.pool_size", 5)) == keys["resident"]
    assert search_keys(changed(streamed, "scoring.pool_size", 5))[1] != keys["streamed"][1] != keys["resident"][1]
    assert keys["streamed"][0] == keys["resident"][0]


@pytest.mark.parametrize("what", ["genotype", "budget", "backbone"])
def test_every_field_of_a_training_is_in_its_key_or_on_the_list(what, archives):
    flags = {
        "genotype": ["--genotype", "PC_DARTS_cifar", "--channels", "4", "--layers", "3"],
        "budget": ["--genotype", "PC_DARTS_cifar", "--layers", "3", "--max-macs", "8M"],
        "backbone": ["--backbone", "tiny"],
    }[what]
    config = train_eval.parse(["--data", str(archives / "0.npz"), *flags])
    without = {
        "genotype": {"network.macs_convention", "network.backbone"},
        "budget": {"network.channels", "network.backbone"},  # which the budget chooses
        "backbone": {f"network.{name}" for name in ("genotype", "channels", "layers", "auxiliary", "max_macs")}
        | {"network.macs_convention", "recipe.drop_path"},  # of a genotype's network
    }[what]
    elsewhere = {"input.data", "input.split_seed", "input.max_resident_gb"}  # below, and in the next test
    assert misjudged(config, train_keys, TRAIN | DEVICE, elsewhere | without) == set()
    assert train_keys(changed(config, "input.data", str(archives / "1.npz"))) != train_keys(config)


def test_whole_photographs_are_other_images_than_their_centres(photographs):
    flags = ["--data", str(photographs), "--image-size", "96", "--backbone", "tiny", "-j", "0", "--val-share", "0"]
    config = train_eval.parse(flags)
    assert train_keys(changed(config, "input.max_resident_gb", 0.0)) != train_keys(config)


def test_only_keys_with_jitter_say_how_it_is_drawn():
    """Results of earlier versions without it stay valid."""
    assert "jitter" not in identity(Augmentation(flip=False, lighting=0.1))
    assert identity(Augmentation(color_jitter=(0.0, 0.0, 0.0, 0.1)))["jitter"] == "batched"


def test_every_view_of_a_landscape_is_in_its_key():
    """Images are drawn by their number and the seed, and hashed."""
    views = landscape.Views()
    assert identity(views).keys() == {field.name for field in fields(views)}

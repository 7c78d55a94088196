"""The results of the paper's tables: complete, as published, and every one of them trains."""

import re
import signal

import numpy as np
import pytest
import torch

import search
import train_eval
from nas_kmix.backbones import BACKBONES, build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.augment import augment_batch
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.learner import Learner, Recipe
from nas_kmix.engine.log import Log
from nas_kmix.engine.run import StoppedError
from nas_kmix.mixers import make_mix
from nas_kmix.paper_tables import PAPER
from nas_kmix.pipeline.network import build

# Steps of the deepest network take seconds: the default suite trains it where it has a setting to itself. The sweeps
# over K on ImageNet differ in that number alone.
DEEP = {name for name, cell in PAPER.items() if cell.network["backbone"] == "pyramidnet200"}
OFTEN = {"pyramidnet200-cifar100-stochdepth", "pyramidnet200-cifar100-dropblock"}
SLOW = DEEP - OFTEN | {name for name in PAPER if re.search(r"imagenet.*-k\d$", name)}
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PAPER]


def settings(name):
    config = train_eval.PRESETS[name]
    return config.mix.mix, config.mix.mix_k, config.mix.mix_alpha, config.mix.mix_prob


def test_every_row_of_the_tables_is_there():
    tables = [cell.table for cell in PAPER.values()]
    rows = {"Table 1": 5 + 10 + 7, "Table 2": 3 * 5, "Table 3": 7 + 9, "SM Table 1": 6, "SM Table 2": 10}
    assert {table: tables.count(table) for table in rows} == rows and len(tables) == sum(rows.values())


@pytest.mark.parametrize(
    ("name", "mix", "error"),
    [
        ("pyramidnet110-cifar100-dcutmix", ("dcutmix", 5, 0.2, 1.0), 16.95),
        ("pyramidnet110-cifar100-dmixup", ("dmixup", 3, 1 / 3, 1.0), 18.60),
        ("pyramidnet200-cifar100-dcutmix", ("dcutmix", 5, 1.0, 0.5), 13.86),
        ("pyramidnet200-cifar10-dcutmix", ("dcutmix", 3, 1 / 3, 1.0), 2.42),
        ("pyramidnet200-cifar10-dmixup", ("dmixup", 5, 0.2, 1.0), 2.90),
        ("table2-wrn16-8-dcutmix", ("dcutmix", 5, 0.2, 1.0), 18.64),
        ("table2-preactresnet18-dcutmix", ("dcutmix", 4, 0.25, 1.0), 20.50),
        ("imagenet-resnet50-saliency-dcutmix", ("saliency_dcutmix", 3, 1 / 3, 1.0), 21.38),
        ("imagenet-resnet50-dcutmix-k9", ("dcutmix", 9, 1.0, 1.0), 22.58),
        ("sm-preactresnet18-dcutmix-k7", ("dcutmix", 7, 1 / 7, 1.0), 20.9),
        ("sm-pyramidnet200-dcutmix-alpha0.5", ("dcutmix", 5, 0.5, 0.5), 13.67),
    ],
)
def test_cells_are_those_of_the_paper(name, mix, error):
    assert settings(name) == mix and PAPER[name].error == error
    assert f"{error:.2f} %" in PAPER[name].doc and PAPER[name].table in PAPER[name].doc


@pytest.mark.parametrize("name", PAPER)
def test_a_cell_differs_from_its_baseline_in_the_method_alone(name):
    cell = PAPER[name]
    assert cell.network["backbone"] in BACKBONES and re.fullmatch(r"[a-z0-9.-]+", name)
    if cell.baseline is None:
        assert cell.mix["mix"] == "none"
        return
    baseline = PAPER[cell.baseline]
    assert baseline.baseline is None and baseline.network["backbone"] == cell.network["backbone"]
    cutout = {"cutout": 16} if name.endswith("-cutout") else {}
    assert (cell.input, cell.augmentation) == (baseline.input, baseline.augmentation | cutout)
    same = ("epochs", "batch_size", "lr")
    assert [cell.optim[field] for field in same] == [baseline.optim[field] for field in same]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Eight images of 16 px in two classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(path, train_images=pixels, train_labels=np.arange(8) % 2)
    return path


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_preset_builds_its_model_and_takes_two_steps(name, tiny, tmp_path):
    """The cell's network, augmentation, mixing, loss and optimiser on images of its kind, small ones."""
    config = train_eval.PRESETS[name]
    large = config.input.image_size is not None
    data = load_data(DataConfig(data=str(tiny), image_size=65 if large else None))
    assert data.stem == ("imagenet" if large else "cifar")
    model = build(config.network, data, seed=config.seed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mix = make_mix(config.mix, data.num_classes, model)
    learner = Learner(model.train(), config.optim, config.recipe)
    for step in range(2):
        rng = np.random.default_rng(step)
        batch = data.fetch(np.arange(4 * step, 4 * step + 4))
        images = augment_batch(batch.images, data, config.augmentation, rng=rng)
        assert learner.step(*mix(images, batch.labels, rng))[0].isfinite()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key for key, _ in model.named_parameters()} <= {*changed, *_without_gradient(model)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quick", "cpu", "gpu", "paper"])
def test_the_scorer_of_a_search_does_not_diverge(name):
    """Without a final normalisation, logits grow with the rate until they overflow, within thirty steps."""
    config, data = search.PRESETS[name].scorer, load_data(DataConfig(data="digits"))
    model = build_backbone(config.backbone, num_classes=10, stem="cifar", seed=0)
    learner, mix = Learner(model.train(), config.optim, Recipe()), make_mix(config.mix, 10, model)
    for step in range(30):
        rng = np.random.default_rng(step)
        batch = data.fetch(rng.permutation(len(data))[:16])
        loss = float(learner.step(*mix(data.normalise(batch.images), batch.labels, rng))[0])
        assert loss < 16 * 25.0, step  # the sum over the batch; chance has 16 log 10 = 37


def _without_gradient(model):
    """Weights whose step was zero: those of a path that stochastic depth skipped both times."""
    return {key for key, parameter in model.named_parameters() if not parameter.grad.any()}


def test_a_cell_is_one_line_and_resumes(tiny, tmp_path):
    flags = f"--data {tiny} --epochs 2 --batch-size 4 --limit-steps 1 --threads 1 --device cpu -j 0"
    command = ["--preset", "table2-preactresnet18-dcutmix", "--out", str(tmp_path / "run"), *flags.split()]
    first = train_eval.run(train_eval.parse(command))
    assert first["network"]["backbone"] == "preactresnet18" and first["best"] is None
    assert train_eval.run(train_eval.parse(command)) == first


def test_an_unknown_preset_is_named(capsys):
    assert train_eval.main(["--preset", "table9"]) == 2
    assert "no --preset table9; choose one of quick, cpu" in capsys.readouterr().err


def test_stopped_and_resumed_a_network_that_drops_ends_the_same(tiny, tmp_path, monkeypatch):
    """Stochastic depth draws from torch's global generator, which no checkpoint holds."""
    flags = (
        f"--backbone small --stochastic-depth .8 --drop-block .2 --block-size 1 --data {tiny} --val-share 0 --epochs 3"
    )
    flags += " --batch-size 4 --lr .1 --threads 1 --device cpu -j 0"

    def trained(out):
        train_eval.run(train_eval.parse([*flags.split(), "--out", str(out)]))
        return files.hash_tensors(torch.load(out / "last.pt", weights_only=True)["model"])

    alone = trained(tmp_path / "alone")
    add = Log.add

    def stopping(self, stage, at, **values):
        add(self, stage, at, **values)
        if at == 0:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Log, "add", stopping)
        trained(tmp_path / "stopped")
    torch.rand(3)
    assert trained(tmp_path / "stopped") == alone
    flags = flags.replace("depth .8", "depth .1")
    assert trained(tmp_path / "other") != alone


def test_manifold_mixup_of_a_genotype_or_in_parts_is_refused(tiny, tmp_path):
    for flags in ("--genotype PC_DARTS_cifar", "--backbone small --accumulate 2"):
        command = [*flags.split(), "--mix", "manifold_mixup", "--data", str(tiny), "--out", str(tmp_path)]
        with pytest.raises(ValueError, match="--mix manifold_mixup"):
            train_eval.run(train_eval.parse(command))
    with pytest.raises(ValueError, match="--stochastic-depth"):
        train_eval.run(train_eval.parse(["--genotype", "PC_DARTS_cifar", "--stochastic-depth", ".2"]))

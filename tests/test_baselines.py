"""The measures of other methods against slow loops in NumPy, and their way through scoring into the table."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import IMAGES, command
from torch.nn import functional as F

import search
from nas_kmix import scoring
from nas_kmix.backbones import BACKBONES, build_backbone, last_linear
from nas_kmix.baselines import (
    MASKS,
    PASSES,
    el2n,
    entropy,
    forgetting_counts,
    mc_dropout,
    measure_baselines,
    note_forgetting,
    pick_order,
)
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import Source
from nas_kmix.pipeline import scorer
from nas_kmix.proxy import ProxyConfig, make_proxy
from nas_kmix.sampling import select
from nas_kmix.scores import COLUMNS, TITLES, ScoreTable
from nas_kmix.scoring import ScoringConfig, score_dataset

CLASSES, SIZE = 5, 12
CONFIG = ScoringConfig(draws=4, baselines=True)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(40, SIZE, SIZE, 3), dtype=np.uint8)
    source = Source("generated", "train", rng.integers(0, CLASSES, size=40), tuple("abcde"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageData(source, SIZE, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), torch.device("cpu"), images)


@pytest.fixture(scope="module")
def model():
    model = build_backbone("tiny", num_classes=CLASSES, seed=1)
    with torch.no_grad():
        model.classifier.weight.mul_(20.0)
    return model


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def slow_logits(features, head):
    weight, bias = head.weight.tolist(), head.bias.tolist()
    return [sum(w * x for w, x in zip(row, features, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def test_entropy_and_el2n():
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    np.testing.assert_allclose(entropy(probabilities), [slow_entropy(row) for row in probabilities.tolist()], rtol=1e-6)
    expected = [math.sqrt(2), math.sqrt(0.5), math.sqrt(0.04 + 0.09 + 0.25)]
    np.testing.assert_allclose(el2n(probabilities, torch.tensor([1, 0, 2])), expected, rtol=1e-6)


def test_dropout_measures_are_those_of_networks_one_by_one():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 4)
    features = 3 * torch.randn(9, 6, generator=generator)
    masks = (torch.rand(7, 6, generator=generator) < 0.5) * 2.0
    bald, ratio = mc_dropout(features, head, masks)
    for row, x in enumerate(features.tolist()):
        predictions = [
            softmax(slow_logits([a * b for a, b in zip(x, mask, strict=True)], head)) for mask in masks.tolist()
        ]
        mean = [sum(p[c] for p in predictions) / 7 for c in range(4)]
        expected = slow_entropy(mean) - sum(map(slow_entropy, predictions)) / 7
        votes = [max(range(4), key=p.__getitem__) for p in predictions]
        assert bald[row].item() == pytest.approx(expected, abs=1e-5)
        assert ratio[row].item() == pytest.approx(1 - max(map(votes.count, votes)) / 7, abs=1e-6)
    assert ratio.max() > 0.2  # else the test says nothing


def test_dropout_of_the_training_changes_no_measure(data, model):
    """A scorer that was just trained with dropout measures as its file does."""
    trained = build_backbone("tiny", num_classes=CLASSES, seed=1)
    trained.load_state_dict(model.state_dict())
    scorer.drop_before(last_linear(trained), 0.5)
    found, expected = (measure_baselines(one, data, np.arange(40), seed=0) for one in (trained.train(), model))
    assert trained.training and found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@torch.no_grad()
def test_networks_that_agree_have_no_bald():
    features = torch.rand(5, 3)
    bald, ratio = mc_dropout(features, torch.nn.Linear(3, 4), torch.ones(6, 3))
    assert bald.max() < 1e-6 and ratio.max() < 1e-6


@pytest.mark.parametrize("n", [1, 3, 40])
def test_k_centre_picks_the_farthest_by_brute_force(n):
    features = np.random.default_rng(n).normal(loc=5.0, size=(n, 4)).astype(np.float32)
    points = features.astype(np.float64).tolist()
    center = np.mean(points, axis=0)
    picked = [min(range(n), key=lambda i: math.dist(points[i], center))]
    while len(picked) < n:
        rest = [i for i in range(n) if i not in picked]
        picked.append(max(rest, key=lambda i: min(math.dist(points[i], points[p]) for p in picked)))
    assert np.argsort(pick_order(torch.from_numpy(features))).tolist() == picked


def test_k_centre_leaves_copies_for_last():
    features = torch.from_numpy(np.repeat(np.random.default_rng(0).normal(size=(10, 3)), 3, axis=0)).float()
    order = pick_order(features)
    assert sorted(order) == list(range(30))
    assert sorted(np.argsort(order)[:10] // 3) == list(range(10))


@torch.no_grad()
def test_all_follow_from_one_pass(model, data):
    indices = np.array([2, 3, 17, 31, 39])
    model.train()
    found = measure_baselines(model, data, indices, seed=3)
    assert model.training and not last_linear(model)._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        images = data.normalise(data.images[indices])
        features = model.features(images).mean(dim=(2, 3))
        probabilities = F.softmax(model(images), dim=1)
    keep = np.random.default_rng([3, MASKS]).random((PASSES, features.shape[1])) >= 0.5
    bald, ratio = mc_dropout(features, model.classifier, torch.from_numpy(keep) * 2.0)
    with torch.no_grad():
        expected = {
            "entropy": entropy(probabilities),
            "bald": bald,
            "variation_ratio": ratio,
            "k_centre": -torch.from_numpy(pick_order(features)),
        }
    assert found.keys() == expected.keys() == set(COLUMNS) - {"mixed_entropy", "forgetting", "el2n"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.double(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_last_layer_of_every_backbone_gives_its_classes():
    for name in BACKBONES:
        stem = "imagenet" if name.startswith("resnet") else "cifar"
        assert last_linear(BACKBONES[name](num_classes=7, stem=stem)).out_features == 7


@pytest.mark.parametrize("loss", ["mixed", "anchor"])
def test_entropy_under_mixing_is_that_of_the_mean_prediction(model, data, loss, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", 9)
    config = ScoringConfig(draws=4, baselines=True, batch_size=7, loss=loss)
    table = score_dataset(model, data, config)
    np.testing.assert_array_equal(table.losses, score_dataset(model, data, replace(config, baselines=False)).losses)
    for index in (0, 23):
        mixes, _ = scoring.redraw(table, data, index)
        with torch.no_grad():
            predictions = F.softmax(model(data.normalise(mixes)), dim=1).tolist()
        mean = [sum(p[c] for p in predictions) / 4 for c in range(CLASSES)]
        assert table.columns["mixed_entropy"][index] == pytest.approx(slow_entropy(mean), rel=1e-4)


@pytest.mark.parametrize("partners", ["common", "fresh"])
def test_every_scoring_measures_el2n_of_the_unmixed_images(model, data, partners, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", 9)
    table = score_dataset(model, data, ScoringConfig(draws=2, batch_size=7, partners=partners))
    assert table.reliability("el2n") == 1.0 and table.columns.keys() == {"el2n"}
    for index in (0, 23, 39):
        with torch.no_grad():
            (probabilities,) = F.softmax(model(data.normalise(data.images[[index]])), dim=1).tolist()
        wrong = [p - (c == data.labels[index]) for c, p in enumerate(probabilities)]
        assert table.measure("el2n")[index] == pytest.approx(math.sqrt(sum(error**2 for error in wrong)), rel=1e-4)


def test_residuals_do_not_depend_on_the_mean_of_their_class():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], [200, 50, 1])
    losses = rng.gamma(3.0, size=(251, 10)) * rng.uniform(1, 3, size=(251, 1)) + label[:, None]
    table = ScoreTable(np.arange(251), label, losses.astype(np.float32))
    for c in (0, 1):
        rows = label == c
        slope, at_zero = np.polyfit(table.mean[rows], table.cv[rows], 1)
        np.testing.assert_allclose(table.residual[rows], table.cv[rows] - slope * table.mean[rows] - at_zero, atol=1e-9)
        assert abs(np.corrcoef(table.residual[rows], table.mean[rows])[0, 1]) < 1e-6 < abs(slope)
    assert abs(table.residual[250]) < 1e-12


def test_columns_are_saved_merged_hashed_and_selected_by(data, model, tmp_path):
    whole = score_dataset(model, data, CONFIG)
    parts = [score_dataset(model, data, CONFIG, indices=part) for part in (np.arange(20, 40), np.arange(20))]
    merged = ScoreTable.merge(parts)
    np.testing.assert_allclose(merged.columns["mixed_entropy"], whole.columns["mixed_entropy"], rtol=1e-4)
    whole.save(tmp_path / "scores.npz")
    assert ScoreTable.load(tmp_path / "scores.npz") == whole
    other = ScoreTable(whole.index, whole.label, whole.losses, whole.key, {}, {"mixed_entropy": np.zeros(40)})
    assert other.hash() != whole.hash()
    proxy = make_proxy(data, whole, ProxyConfig(ratio=0.2, measure="mixed_entropy", method="top", balanced=False))
    best = np.argsort(-whole.columns["mixed_entropy"])[:8]
    assert proxy.indices.tolist() == sorted(best.tolist())
    assert math.isnan(whole.reliability("mixed_entropy"))
    with pytest.raises(ValueError, match=r"no bald.*--scoring\.baselines"):
        whole.measure("bald")
    assert set(whole.measures) == set(TITLES) - set(COLUMNS) | {"mixed_entropy", "el2n"}


def test_a_search_by_every_measure(npz, tmp_path):
    flags = ["--stop-after", "proxy", "--scoring.baselines", "--scorer.forgetting"]
    table = search.run(search.parse([*command(npz, tmp_path / "a"), *flags])).table
    assert set(table.measures) == set(TITLES)
    for measure in TITLES:
        flags = ["--measure", measure, "--method", "top", "--scores", str(tmp_path / "a" / "scores.npz")]
        proxy = search.run(search.parse([*command(npz, tmp_path / measure), *flags, "--stop-after", "proxy"])).proxy
        assert proxy.indices.tolist() == select(table.measure(measure), table.label, 0.4, method="top").tolist()
    for measure, flag in COLUMNS.items():
        if measure == "el2n":
            continue
        with pytest.raises(ValueError, match=f"--measure {measure} needs {flag}"):
            search.run(search.parse([*command(npz, tmp_path / "b"), "--measure", measure, "--method", "top"]))


class Told(torch.nn.Module):
    """A classifier that tells the images of `right` from their first pixel, their number, and no others."""

    right = ()

    def forward(self, images):
        numbers = (images[:, 0, 0, 0] * 0.2 + 0.5).mul(255).round().long()
        wrong = torch.tensor([n not in self.right for n in numbers.tolist()])
        return F.one_hot((numbers % 3 + wrong) % 3, 3).float()


def test_forgetting_counts_are_those_of_a_loop():
    pixels = np.zeros((30, 4, 4, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(30)
    source = Source("numbers", "train", np.arange(30) % 3, tuple("abc"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    data = ImageData(source, 4, (0.5,) * 3, (0.2,) * 3, torch.device("cpu"), images)
    rng, model, memory = np.random.default_rng(0), Told(), {}
    epochs = [set(np.flatnonzero(rng.random(30) < 0.4).tolist()) for _ in range(6)]
    for right in epochs:
        model.right = right
        assert note_forgetting(memory, model, data) == pytest.approx(len(right) / 30)
    expected = []
    for i in range(30):
        told = [i in epoch for epoch in epochs]
        times = sum(a and not b for a, b in itertools.pairwise(told))
        expected.append(times if any(told) else 6)
    assert forgetting_counts(memory, 6).tolist() == expected
    assert {0, 1, 2, 6} <= set(expected)


def test_a_scorer_without_counts_is_refused_before_it_scores(npz, tmp_path, capsys):
    argv = [*command(npz, tmp_path / "run"), "--stop-after", "scorer"]
    assert search.main(argv) == 0
    given = ["--scorer", str(tmp_path / "run" / "scorer.pt"), "--measure", "forgetting", "--stop-after", "proxy"]
    for more in ([], ["--dry-run"]):
        assert search.main([*command(npz, tmp_path / "more"), *given, *more]) == 2
        assert "leave it out, and add --scorer.forgetting" in capsys.readouterr().err
    assert not (tmp_path / "more" / "scores.npz").exists()


def test_a_scorer_counts_what_it_forgets_over_a_stop(npz, tmp_path, monkeypatch):
    """The same counts, and weights, in one go and after a stop between two epochs; and weights as without counting."""
    flags = ["--stop-after", "scorer", "--scorer.epochs", "4", "--scorer.dropout", "0.5", "--scorer.val-share", "0"]
    counting = [*flags, "--scorer.forgetting"]
    for name, chosen in (("plain", flags), ("whole", counting)):
        search.run(search.parse([*command(npz, tmp_path / name), *chosen]))
    note, calls = scorer.note_forgetting, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return note(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scorer, "note_forgetting", stopped)
        search.run(search.parse([*command(npz, tmp_path / "cut"), *counting]))
    search.run(search.parse([*command(npz, tmp_path / "cut"), *counting]))
    plain, whole, cut = (files.load_tensors(tmp_path / name / "scorer.pt") for name in ("plain", "whole", "cut"))
    assert torch.equal(cut["forgetting"], whole["forgetting"]) and whole["forgetting"].shape == (IMAGES,)
    assert whole["forgetting"].max() > 0
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]) and torch.equal(value, plain["model"][name])
    costs = json.loads((tmp_path / "whole" / "cost.json").read_text())["stages"]["scorer"]
    assert costs["images_forward"] == 2 * costs["images_backward"] == 2 * 4 * IMAGES


def test_dropout_before_the_last_layer_acts_in_training_alone():
    layer = torch.nn.Linear(1000, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    scorer.drop_before(layer, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = layer(torch.ones(200, 1000))
    assert values.mean().item() == pytest.approx(1000, rel=0.01)
    assert values.std().item() == pytest.approx(1000**0.5, rel=0.2)
    assert layer.eval()(torch.ones(1, 1000)).item() == 1000
    assert list(layer.state_dict()) == ["weight"]

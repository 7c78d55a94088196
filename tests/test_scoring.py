"""Scoring: an oracle that mixes pixel by pixel, and scores that depend on nothing but seed, index and draw."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional as F

from nas_kmix import anchors, scoring
from nas_kmix.backbones import build_backbone
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.sources import Source
from nas_kmix.scores import ScoreTable, verdict
from nas_kmix.scoring import ScoringConfig, score_dataset

CLASSES, SIZE = 5, 12
CONFIG = ScoringConfig(draws=6, batch_size=64, partners="fresh")


def make_data(n=40, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(n, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, size=n)
    source = Source("generated", "train", labels, tuple("abcde"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageData(source, SIZE, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), torch.device("cpu"), images)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def model():
    """Losses vary as much as a trained network's. An untrained one's hardly do, and rounding drowns so small a CV."""
    model = build_backbone("tiny", num_classes=CLASSES, seed=1)
    with torch.no_grad():
        model.classifier.weight.mul_(20.0)
    return model


def oracle_losses(model, data, config, index):
    """Losses of one anchor, mixed with Python loops over pixels from the draws that `_draw` gives for it alone."""
    draws = anchors.draw(np.array([index]), data.good(), (SIZE, SIZE), config)
    losses = []
    for partners, boxes in zip(draws.partners, draws.boxes, strict=True):
        owners = [index, *data.good()[partners]]
        mixed, counts = np.empty((3, SIZE, SIZE)), np.zeros(config.k)
        for y in range(SIZE):
            for x in range(SIZE):
                owner = sum(top <= y < top + h and left <= x < left + w for top, left, h, w in boxes)
                counts[owner] += 1
                pixel = data.source.arrays[owners[owner], y, x] / 255.0
                mixed[:, y, x] = (pixel - np.array(data.mean)) / np.array(data.std)
        with torch.no_grad():
            log_p = F.log_softmax(model.eval()(torch.tensor(mixed[None], dtype=torch.float32)), dim=1)[0].double()
        soft = np.zeros(CLASSES)
        for owner, count in zip(owners, counts, strict=True):
            soft[data.labels[owner]] += count / SIZE**2
        loss = -sum(soft[c] * float(log_p[c]) for c in range(CLASSES))
        if config.loss == "minus_entropy":
            loss += sum(s * np.log(s) for s in soft if s > 0)
        if config.loss == "anchor":
            loss = -float(log_p[data.labels[index]])
        losses.append(loss)
    return np.array(losses)


@pytest.mark.parametrize("loss", ["mixed", "minus_entropy", "anchor"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_losses_agree_with_a_pixel_by_pixel_oracle(model, data, loss, k):
    config = ScoringConfig(draws=4, k=k, loss=loss)
    table = score_dataset(model, data, config, indices=np.array([3, 17, 39]))
    for row, index in enumerate(table.index):
        np.testing.assert_allclose(table.losses[row], oracle_losses(model, data, config, index), rtol=2e-5, atol=2e-6)


def test_measures_are_those_of_the_losses(model, data):
    table = score_dataset(model, data, CONFIG)
    for row in (0, 7, 23):
        values = [float(v) for v in table.losses[row]]
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        assert table.mean[row] == pytest.approx(mean)
        assert table.std[row] == pytest.approx(std)
        assert table.cv[row] == pytest.approx(std / mean)
    np.testing.assert_array_equal(table.label, data.labels)


@pytest.mark.parametrize("partners", ["fresh", "fixed", "common"])
def test_scores_do_not_depend_on_batches_order_or_shards(model, data, partners, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", 9)
    whole = score_dataset(model, data, ScoringConfig(draws=6, batch_size=512, partners=partners))
    for batch_size in (1, 7):
        other = score_dataset(model, data, ScoringConfig(draws=6, batch_size=batch_size, partners=partners))
        np.testing.assert_allclose(other.cv, whole.cv, rtol=1e-5)
        np.testing.assert_allclose(other.losses, whole.losses, rtol=1e-5)
    shuffled = np.random.default_rng(1).permutation(len(data))
    config = ScoringConfig(draws=6, partners=partners)
    np.testing.assert_allclose(score_dataset(model, data, config, indices=shuffled).cv, whole.cv, rtol=1e-5)
    shards = [score_dataset(model, data, config, indices=part) for part in (shuffled[:13], shuffled[13:])]
    merged = ScoreTable.merge(shards)
    np.testing.assert_array_equal(merged.index, whole.index)
    np.testing.assert_allclose(merged.cv, whole.cv, rtol=1e-5)


def test_more_draws_begin_with_the_fewer(model, data):
    ten = score_dataset(model, data, ScoringConfig(draws=10))
    twenty = score_dataset(model, data, ScoringConfig(draws=20))
    np.testing.assert_allclose(twenty.losses[:, :10], ten.losses, rtol=1e-5)
    assert not np.allclose(twenty.losses[:, 10:], ten.losses)


def test_another_seed_gives_other_draws(model, data):
    other = score_dataset(model, data, ScoringConfig(draws=6, seed=1))
    assert not np.allclose(score_dataset(model, data, CONFIG).losses, other.losses)


def test_streams_and_draws_do_not_repeat_each_other():
    indices = np.arange(50)
    blocks = [anchors.uniforms(s, m, indices, 3, CONFIG) for s in (1, 2, 3) for m in range(4)]
    values = np.concatenate([block.ravel() for block in blocks])
    assert len(np.unique(values)) == len(values)
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_uniforms_of_one_index_do_not_depend_on_its_neighbours():
    sparse = np.array([3, 17, 1000])
    together = anchors.uniforms(2, 5, sparse, 6, CONFIG)
    alone = np.concatenate([anchors.uniforms(2, 5, sparse[i : i + 1], 6, CONFIG) for i in range(3)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(("k", "alpha"), [(3, 2 / 9), (4, 0.5), (5, 2.0)])
def test_the_rest_of_phi_is_dirichlet(k, alpha, monkeypatch):
    """Recover phi from the sticks that are handed on; every partner's share of the rest is Beta(a, (K-2) a)."""
    sticks = []
    monkeypatch.setattr(anchors, "boxes_from_uniforms", lambda v, size, u: sticks.append(v) or np.zeros((*v.shape, 4)))
    anchors.draw(np.arange(3000), np.arange(3000), (32, 32), ScoringConfig(draws=2, k=k, alpha=alpha, partners="fresh"))
    v = sticks[0]
    assert (v[:, 0] == 0.5).all()
    left, rest = np.ones(len(v)), []
    for column in v[:, 1:].T:
        rest.append(left * column)
        left = left * (1 - column)
    for share in (*rest, left):
        assert stats.kstest(share, stats.beta(alpha, (k - 2) * alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("pool", [np.arange(6), np.array([0, 2, 3, 9])], ids=["resident", "pool"])
def test_partners_are_distinct_uniform_and_never_the_anchor(pool):
    n, k = 6000, 3
    indices = np.random.default_rng(0).integers(0, 6, size=n)
    rows = anchors.draw_partners(np.random.default_rng(1).random((n, k)), indices, pool)
    partners = pool[rows]
    assert (partners != indices[:, None]).all()
    assert (partners[:, 0] != partners[:, 1]).all()
    for anchor in range(6):
        others = pool[pool != anchor]
        for column in partners[indices == anchor].T:
            counts = [(column == other).sum() for other in others]
            assert stats.chisquare(counts).pvalue > 1e-4


def test_common_partners_are_the_same_for_all_other_anchors():
    config = ScoringConfig(draws=8, partners="common")
    draws = anchors.draw(np.arange(100), np.arange(100), (SIZE, SIZE), config)
    partners, boxes = draws.partners.reshape(100, 8, 2), draws.boxes.reshape(100, 8, 2, 4)
    for m in range(8):
        usual = stats.mode(partners[:, m], axis=0).mode
        odd = (partners[:, m] != usual).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(odd), np.sort(usual))
        assert (boxes[:, m] == boxes[0, m]).all()
    assert len(np.unique(partners[50], axis=0)) == 8


def test_fixed_partners_keep_phi_and_boxes_fresh():
    draws = anchors.draw(np.arange(30), np.arange(30), (SIZE, SIZE), ScoringConfig(draws=8, partners="fixed"))
    partners, boxes = draws.partners.reshape(30, 8, 2), draws.boxes.reshape(30, 8, 2, 4)
    assert (partners == partners[:, :1]).all()
    assert len(np.unique(partners[:, 0], axis=0)) > 20
    assert all(len(np.unique(boxes[i].reshape(8, -1), axis=0)) > 1 for i in range(30))


def test_a_model_in_training_mode_is_scored_in_eval_mode_and_given_back(data):
    model = build_backbone("tiny", num_classes=CLASSES, seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = score_dataset(model, data, CONFIG)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(table.losses, score_dataset(model.eval(), data, CONFIG).losses)


def test_autocast_and_channels_last_change_scores_only_by_rounding(model, data):
    plain = score_dataset(model, data, CONFIG)
    rough = score_dataset(model, data, CONFIG, compute=Compute(amp="bf16", channels_last=True))
    assert rough.losses.dtype == np.float32
    np.testing.assert_allclose(rough.losses, plain.losses, rtol=0.05)
    assert not np.array_equal(rough.losses, plain.losses)


def test_a_streamed_folder_scores_like_a_resident_one_if_its_pool_holds_every_image(model, data, tmp_path):
    for index, (pixels, label) in enumerate(zip(data.source.arrays, data.labels, strict=True)):
        path = tmp_path / "train" / "abcde"[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    tables = []
    for gigabytes in (4.0, 0.0):
        folder = load_data(DataConfig(data=str(tmp_path), max_resident_gb=gigabytes))
        assert folder.resident == (gigabytes > 0)
        tables.append(score_dataset(model, folder, CONFIG))
    np.testing.assert_allclose(tables[1].losses, tables[0].losses, rtol=1e-5)
    smaller = score_dataset(model, folder, replace(CONFIG, pool_size=10))
    assert not np.allclose(smaller.losses, tables[0].losses)


def test_reliability_tells_signal_from_noise():
    rng = np.random.default_rng(0)
    n, m = 2000, 10
    noise = ScoreTable(np.arange(n), np.zeros(n, dtype=int), rng.gamma(9.0, size=(n, m)).astype(np.float32))
    assert abs(noise.reliability()) < 0.1
    spread = rng.uniform(0.01, 0.9, size=(n, 1))
    signal = ScoreTable(np.arange(n), noise.label, (1 + spread * rng.choice([-1, 1], size=(n, m))).astype(np.float32))
    assert signal.reliability() > 0.8
    assert np.isnan(ScoreTable(np.arange(n), noise.label, noise.losses[:, :3]).reliability())
    assert np.isnan(ScoreTable(np.arange(n), noise.label, np.ones((n, m), dtype=np.float32)).reliability())
    assert signal.reliability("std") > 0.8 > abs(signal.reliability("mean"))


def test_a_reliability_is_put_into_words():
    words = [verdict(value) for value in (float("nan"), -0.2, 0.49, 0.5, 0.79, 0.8, 1.0)]
    assert words == ["unknown", "mostly noise", "mostly noise", "fair", "fair", "good", "good"]


@pytest.mark.parametrize(("measure", "draws", "error"), [("cv", 10, 0.05), ("mean", 5, 0.02), ("mean", 8, 0.02)])
def test_reliability_predicts_the_correlation_between_two_seeds(measure, draws, error):
    """Stepping halves up to M draws by Spearman-Brown estimates how two independent tables of M draws agree."""
    rng = np.random.default_rng(0)
    n = 20_000
    level, spread = rng.normal(5.0, 0.3, size=(n, 1)), rng.uniform(0.1, 0.5, size=(n, 1))
    draw = (level + spread * rng.normal(size=(n, draws)) for _ in range(2))
    tables = [ScoreTable(np.arange(n), np.zeros(n, dtype=int), losses) for losses in draw]
    between = stats.spearmanr(*(table.measure(measure) for table in tables)).statistic
    assert tables[0].reliability(measure) == pytest.approx(between, abs=error)


def test_all_zero_losses_have_a_cv_of_zero():
    table = ScoreTable(np.arange(2), np.zeros(2, dtype=int), np.zeros((2, 4), dtype=np.float32))
    np.testing.assert_array_equal(table.cv, [0.0, 0.0])


def test_save_and_load(model, data, tmp_path):
    table = replace(score_dataset(model, data, CONFIG), bad={3: "why"})
    table.save(tmp_path / "scores.npz")
    loaded = ScoreTable.load(str(tmp_path / "scores.npz"))
    assert loaded == table and loaded.bad == {3: "why"}
    assert loaded.key["config"]["draws"] == 6 and loaded.key["inputs"]["data"] == data.fingerprint
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as archive:
        assert {"index", "label", "mean", "std", "cv", "losses"} <= set(archive.files)
        np.testing.assert_array_equal(archive["cv"], table.cv)


def test_the_key_follows_settings_scorer_and_data(model, data):
    def key(model=model, data=data, **settings):
        return score_dataset(model, data, ScoringConfig(**{"draws": 4, **settings}), indices=np.arange(3)).key

    other_model = build_backbone("tiny", num_classes=CLASSES, seed=2)
    assert key() == key(batch_size=3) == key(pool_size=5)  # a resident set has no pool
    assert (
        len({str(k) for k in (key(), key(k=2), key(seed=1), key(model=other_model), key(data=make_data(seed=1)))}) == 5
    )


def test_shards_without_a_readable_image(model, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", 4)
    data = make_data()
    whole = score_dataset(model, data, replace(CONFIG, partners="common"))
    data.bad.add(dict.fromkeys(range(4, 8), "unreadable"))
    table = score_dataset(model, data, CONFIG, indices=np.arange(12))
    assert table.index.tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and whole.index.tolist() == list(range(40))
    assert score_dataset(model, data, CONFIG, indices=np.array([], dtype=int)).losses.shape == (0, 6)


def test_a_diverged_scorer_is_named(data):
    model = build_backbone("tiny", num_classes=CLASSES, seed=1)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"image 0, .*--scorer\.lr"):
        score_dataset(model, data, CONFIG)


@pytest.mark.parametrize("damage", ["cut", "foreign", "lacking", "unsorted"])
def test_a_damaged_file_is_named(model, data, tmp_path, damage):
    path = tmp_path / "scores.npz"
    table = score_dataset(model, data, CONFIG)
    table.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        np.savez(path, index=table.index, label=table.label, losses=table.losses, meta=np.array("{}"))
    elif damage == "lacking":
        np.savez(path, index=table.index)
    else:
        ScoreTable(table.index[::-1], table.label, table.losses).save(path)
    with pytest.raises(ValueError, match=r"scores\.npz"):
        ScoreTable.load(path)


def test_overlapping_shards_are_refused(model, data):
    parts = [score_dataset(model, data, CONFIG, indices=np.arange(i, i + 5)) for i in (0, 4)]
    with pytest.raises(ValueError, match="twice"):
        ScoreTable.merge(parts)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"draws": 1}, "draws"),
        ({"k": 1}, r"scoring\.k"),
        ({"phi_anchor": 0.0}, "phi-anchor"),
        ({"phi_anchor": 1.0}, "phi-anchor"),
        ({"alpha": 0.0}, "alpha"),
        ({"batch_size": 0}, "batch-size"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ScoringConfig(**settings)


def test_too_few_images_to_mix(model):
    with pytest.raises(ValueError, match="only 2"):
        score_dataset(model, make_data(n=2), CONFIG)
    assert len(score_dataset(model, make_data(n=3), CONFIG).index) == 3

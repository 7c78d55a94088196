"""Mixup, CutMix, Cutout and Manifold Mixup against their published descriptions, redone per pixel or by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from nas_kmix.backbones import BACKBONES, build_backbone
from nas_kmix.rivals import CutMix, Cutout, ManifoldMixup, Mixup, manifold_mixup

HW = (20, 32)
MIXERS = [Mixup, CutMix, Cutout]
P_VALUE = 1e-4  # the generators are seeded: a test passes or fails for good


def rng(seed=0):
    return np.random.default_rng(seed)


def indicator_images(n, hw=HW):
    """Image i is one in channel i and zero elsewhere: a mixed pixel then lists its sources' weights."""
    return torch.eye(n)[:, :, None, None].expand(n, n, *hw).contiguous()


def mixed_batches(mixer, n, batches, **settings):
    generator, mix = rng(1), mixer(num_classes=n, **settings)
    for _ in range(batches):
        yield mix(indicator_images(n), torch.arange(n), rng=generator)


# --------------------------------------------------------------------------------------------------------------
# the call


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mixer", MIXERS)
def test_form_is_kept_and_the_input_left_alone(mixer, dtype, memory_format):
    for n in (1, 5):
        images = (255 * torch.rand(n, 3, *HW, generator=torch.Generator().manual_seed(0))).to(dtype)
        images = images.contiguous(memory_format=memory_format)
        before = images.clone()
        mixed, soft = mixer(num_classes=7)(images, torch.arange(n), rng=rng())
        assert mixed.dtype == dtype and mixed.shape == images.shape
        assert mixed.is_contiguous(memory_format=memory_format)
        assert soft.shape == (n, 7) and soft.dtype == torch.float32
        torch.testing.assert_close(soft.sum(1), torch.ones(n))
        assert torch.equal(images, before)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generator_seed_and_probability(mixer):
    images, labels = indicator_images(6), torch.arange(6)
    once, again = (mixer(num_classes=6, seed=seed)(images, labels, rng=rng(3)) for seed in (0, 1))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    by_seed = [mixer(num_classes=6, seed=seed)(images, labels)[0] for seed in (0, 0, 1)]
    assert torch.equal(by_seed[0], by_seed[1]) and not torch.equal(by_seed[0], by_seed[2])
    untouched, hard = mixer(num_classes=6, p=0.0)(images, labels)
    assert torch.equal(untouched, images) and torch.equal(hard, torch.eye(6))


@pytest.mark.parametrize(
    ("mixer", "settings", "name"),
    [
        (Mixup, {"alpha": 0.0}, "alpha"),
        (CutMix, {"alpha": float("inf")}, "alpha"),
        (Cutout, {"size": 0}, "size"),
        *((mixer, {"p": 1.5}, "p") for mixer in MIXERS),
        *((mixer, {"num_classes": 0}, "num_classes") for mixer in MIXERS),
    ],
)
def test_bad_settings_are_named(mixer, settings, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        mixer(**{"num_classes": 2} | settings)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bad_batches_are_named(mixer):
    with pytest.raises(ValueError, match="labels"):
        mixer(num_classes=3)(torch.zeros(2, 3, *HW), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="images"):
        mixer(num_classes=3)(torch.zeros(2, *HW), torch.tensor([0, 1]))


# --------------------------------------------------------------------------------------------------------------
# Mixup and CutMix


def test_mixup_adds_with_one_lambda_per_batch():
    shares = []
    for mixed, soft in mixed_batches(Mixup, 9, 400, alpha=0.7):
        torch.testing.assert_close(mixed, soft[:, :, None, None].expand_as(mixed))
        own = soft.diagonal()
        share = own[own < 1].min() if (own < 1).any() else own[0]  # an image may be its own partner
        assert torch.allclose(own[own < 1], share)
        shares.append(share.double().item())
    assert stats.kstest(shares, stats.beta(0.7, 0.7).cdf).pvalue > P_VALUE


@pytest.mark.parametrize("mixer", [Mixup, CutMix])
def test_partners_are_a_permutation(mixer):
    for seed in range(20):
        plan = mixer(num_classes=2).plan(torch.zeros(9, 1, *HW), rng=rng(seed))
        assert plan.partners[:, 0].tolist() == list(range(9))
        assert sorted(plan.partners[:, 1].tolist()) == list(range(9))


def published_box(share, centre, hw):
    """The box of CutMix's appendix: the sides by sqrt(1 - lambda), halved to both sides of the centre, clipped."""
    box = []
    for at, side in zip(centre, hw, strict=True):
        cut = int(side * (1 - share) ** 0.5)
        box.append((max(at - cut // 2, 0), min(at + cut // 2, side)))
    return box


def test_cutmix_pastes_the_published_box():
    for seed in range(50):
        mixed, soft = CutMix(num_classes=9)(indicator_images(9), torch.arange(9), rng=rng(seed))
        draws = rng(seed)
        draws.random()  # whether the batch is mixed
        share = draws.beta(1.0, 1.0)
        (top, bottom), (left, right) = published_box(share, draws.integers(0, HW).tolist(), HW)
        partners = draws.permutation(9)
        expected = indicator_images(9)
        expected[:, :, top:bottom, left:right] = indicator_images(9)[partners, :, top:bottom, left:right]
        assert torch.equal(mixed, expected)
        torch.testing.assert_close(soft, expected.mean(dim=(2, 3)))  # lambda corrected to the clipped box


def test_cutmix_draws_its_lambda_uniformly_and_every_centre():
    """The sides of an unclipped box give lambda; clipped boxes reach every border."""
    owners = [CutMix(num_classes=2).plan(torch.zeros(2, 1, 64, 48), rng=rng(seed)).owner for seed in range(600)]
    assert all(torch.equal(owner[0], owner[1]) for owner in owners)  # one box per batch
    inside = torch.stack([owner[0] for owner in owners]).bool()
    assert all(edge.any() for edge in (inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]))
    rows = inside.any(2).sum(1).double()
    touching = inside[:, 0].any(1) | inside[:, -1].any(1)
    # P(height <= h) without the border is P(1 - lambda <= (h / H)^2); clipping only shortens.
    for height in (16, 32, 48):
        assert (rows <= height).double().mean() >= (height / 64) ** 2 - 0.06
    assert 0.2 < touching.double().mean() < 0.9


# --------------------------------------------------------------------------------------------------------------
# Cutout


@pytest.mark.parametrize("size", [1, 2, 7, 16, 99])
def test_cutout_clears_one_clipped_square_per_image(size):
    n, clipped, centres = 200, 0, set()
    images = torch.ones(n, 2, *HW)
    cut, soft = Cutout(num_classes=3, size=size)(images, torch.zeros(n, dtype=torch.long), rng=rng(size))
    assert torch.equal(soft, torch.tensor([[1.0, 0, 0]]).expand(n, 3))
    for image in cut:
        assert torch.equal(image[0], image[1])
        ys, xs = np.nonzero(image[0].numpy() == 0)
        h, w = np.ptp(ys) + 1, np.ptp(xs) + 1
        assert len(ys) == h * w  # one full rectangle
        for start, length, side in ((ys.min(), h, HW[0]), (xs.min(), w, HW[1])):
            assert length == min(size, side) or (length < size and (start == 0 or start + length == side))
        clipped += h < size or w < size
        centres.add((int(ys.min()), int(xs.min())))
    assert (clipped > 0) == (size > 1)
    assert size > 60 or len(centres) > 50


# --------------------------------------------------------------------------------------------------------------
# Manifold Mixup


class Square(nn.Module):
    def forward(self, x):
        return x.square()


class Squares(nn.Module):
    """The square of a square, so that mixing before, between and after the two gives different logits."""

    stage_ends = ("first", "second")

    def __init__(self):
        super().__init__()
        self.first, self.second = Square(), Square()

    def forward(self, x):
        return self.second(self.first(x)).flatten(1)


def test_manifold_mixup_mixes_one_drawn_layer():
    images, labels = torch.rand(5, 4, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 2, 2, 1])
    seen = set()
    for seed in range(40):
        logits, soft = manifold_mixup(Squares(), images, labels, rng(seed), alpha=2.0)
        draws = rng(seed)
        share, layer = draws.beta(2.0, 2.0), draws.choice(["", "first", "second"])
        partners = draws.permutation(5)

        def mix(x, share=share, partners=partners):
            return share * x + (1 - share) * x[partners]

        x = images.flatten(1)
        expected = {"": mix(x) ** 4, "first": mix(x**2) ** 2, "second": mix(x**4)}[layer]
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(soft, mix(F.one_hot(labels, 4).float()))
        seen.add(str(layer))
    assert seen == {"", "first", "second"}


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"pyramidnet200", "resnet152"}))  # deeper sisters of others
def test_manifold_mixup_of_a_backbone_trains_and_leaves_no_hook(name):
    stem = "imagenet" if name == "resnet50" else "cifar"
    network = build_backbone(name, num_classes=4, stem=stem)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        logits, soft = manifold_mixup(network, images, torch.arange(4), rng(seed))
        assert logits.shape == soft.shape == (4, 4)
        F.cross_entropy(logits, soft).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_hook_is_removed_even_if_the_network_fails():
    class Failing(Squares):
        def forward(self, x):
            self.first(x)
            raise RuntimeError("out of memory")

    model = Failing()
    for seed in range(6):
        with pytest.raises(RuntimeError, match="out of memory"):
            manifold_mixup(model, torch.zeros(2, 1, 1, 1), torch.tensor([0, 0]), rng(seed))
    assert not any(module._forward_hooks for module in model.modules())


def test_manifold_mixup_names_what_is_missing():
    with pytest.raises(ValueError, match=r"stage_ends.*Linear"):
        manifold_mixup(nn.Linear(1, 1), torch.zeros(2, 1), torch.tensor([0, 0]), rng())
    with pytest.raises(ValueError, match="alpha"):
        manifold_mixup(Squares(), torch.zeros(2, 1, 1, 1), torch.tensor([0, 0]), rng(), alpha=0.0)


def test_the_mixer_lets_the_next_forward_pass_mix_and_no_other():
    images, labels = torch.rand(5, 4, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 2, 2, 1])
    model = Squares()
    for seed in range(20):
        mixed, soft = ManifoldMixup(model=model, num_classes=4, alpha=2.0).mix(images, labels, rng(seed))
        first, second = model(mixed), model(images)
        logits, expected = manifold_mixup(Squares(), images, labels, rng(seed), alpha=2.0)
        assert torch.equal(first, logits) and torch.equal(soft, expected)
        torch.testing.assert_close(second, images.flatten(1) ** 4)

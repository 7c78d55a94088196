"""Tests of nas_kmix.mixing against slow oracles: Python loops per pixel, brute force, scipy's distributions.

The traps they are set for: Algorithm 1's own errors (partners taken from the mixed batch, K=2 losing its last
weight, v ~ Beta(1, alpha)), weights not corrected after rounding, an exclusive upper bound of the offsets, one
box for the whole batch, H and W swapped, lost dtypes and memory formats, workers that all make the same mix.
"""

import dataclasses
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from nas_kmix.boxes import box_sides, centred_boxes, draw_phi, nested_boxes, owner_map, stick_lengths
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.mixing import DCutMix, DMixup, MixPlan, SaliencyDCutMix, blend, mix_labels, paste
from nas_kmix.saliency import SALIENCY, fine_grained, peaks

HW = (20, 32)  # height != width, so that a swap shows
CHANNELS = 3
SOURCES = 11  # more sources than images: a pool, not the batch
CLASSES = 4  # fewer classes than sources, so that weights must add up
ALL_K = range(2, 10)
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
MIXERS = [DCutMix, DMixup, SaliencyDCutMix]
PASTING = [DCutMix, SaliencyDCutMix]
P_VALUE = 1e-4  # the generators are seeded: a test passes or fails for good
GOLDEN = json.loads((Path(__file__).parent / "golden" / "dcutmix_areas.json").read_text())["cases"]


def blank(n, hw=HW):
    """A batch for plans that use only its shape."""
    return torch.zeros(n, 1, *hw)


def rng(seed=0):
    return np.random.default_rng(seed)


def random_images(n, dtype=torch.float32, memory_format=torch.contiguous_format, hw=HW):
    """Bytes, or fractions that float32 cannot hold where the dtype is finer."""
    images = torch.from_numpy(rng(n).integers(0, 256, (n, CHANNELS, *hw)))
    images = images.double() / 255 if dtype.is_floating_point else images
    return images.to(dtype).contiguous(memory_format=memory_format)


def indicator_images(n, hw=HW):
    """Image i is one in channel i and zero elsewhere: a mixed pixel then lists its sources' weights."""
    return torch.eye(n)[:, :, None, None].expand(n, n, *hw).contiguous()


def located_images(n, hw):
    """All values of all images differ: a mixed pixel then identifies its source, channel, y and x."""
    return torch.arange(n * CHANNELS * hw[0] * hw[1], dtype=torch.float64).reshape(n, CHANNELS, *hw)


# --------------------------------------------------------------------------------------------------------------
# slow oracles


def slow_sticks(phi):
    v = np.zeros((phi.shape[0], phi.shape[1] - 1))
    for n, row in enumerate(phi.tolist()):
        rest = 1.0
        for k, part in enumerate(row[:-1]):
            v[n, k] = part / rest
            rest *= 1 - v[n, k]
    return v


def slow_sides(v, hw):
    """Sides of the boxes of one image, each dimension rounded (Python's round: half to even) on its way in."""
    sides, (h, w) = [], hw
    for stick in v.tolist():
        h, w = round(h * (1 - stick) ** 0.5), round(w * (1 - stick) ** 0.5)
        sides.append((h, w))
    return sides


def slow_owner(boxes, hw):
    """Owner of each pixel of one image: the last box that holds it."""
    owner = np.zeros(hw, dtype=np.uint8)
    for y in range(hw[0]):
        for x in range(hw[1]):
            for k, (top, left, h, w) in enumerate(boxes.tolist(), start=1):
                if top <= y < top + h and left <= x < left + w:
                    owner[y, x] = k
    return owner


def slow_shares(owner, k):
    values = owner.ravel().tolist()
    return np.array([np.float32(values.count(source) / len(values)) for source in range(k)])


def slow_rows(partners, owner):
    """The row of the sources that each pixel shows: (N, H, W)."""
    rows = np.full(owner.shape, -1)
    for n, row in enumerate(partners.tolist()):
        for y in range(owner.shape[1]):
            for x in range(owner.shape[2]):
                rows[n, y, x] = row[owner[n, y, x]]
    return rows


def take_pixels(sources, rows):
    """Pixel (n, y, x) of source rows[n, y, x]: float64 (N, C, H, W), exact for every dtype."""
    y, x = np.indices(rows.shape[1:])
    return np.moveaxis(sources.double().numpy()[rows, :, y, x], -1, 1)


def slow_blend(sources, partners, weights):
    pixels = sources.double().numpy()
    mixed = np.zeros((len(partners), *pixels.shape[1:]))
    for n, row in enumerate(partners.tolist()):
        for y in range(pixels.shape[2]):
            for x in range(pixels.shape[3]):
                for source, weight in zip(row, weights[n].tolist(), strict=True):
                    mixed[n, :, y, x] += weight * pixels[source, :, y, x]
    return mixed


def slow_labels(labels, partners, weights, num_classes):
    soft = np.zeros((len(partners), num_classes))
    for n, row in enumerate(partners.tolist()):
        for source, weight in zip(row, weights[n].tolist(), strict=True):
            soft[n, labels[source]] += weight
    return soft


def inside(box, outer):
    y, x, h, w = box
    top, left, height, width = outer
    return top <= y and left <= x and y + h <= top + height and x + w <= left + width


def random_boxes(n, k, alpha=1.0, hw=HW):
    v = stick_lengths(draw_phi(n, k, alpha, rng=rng(k)))
    return v, nested_boxes(v, hw, rng=rng(n))


# --------------------------------------------------------------------------------------------------------------
# the parts against the oracles


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("k", ALL_K)
def test_every_mix_agrees_with_loops_over_pixels(k, n):
    phi = draw_phi(n, k, 1.0, rng=rng(k))
    v = stick_lengths(phi)
    boxes = nested_boxes(v, HW, rng=rng(n))
    owner = owner_map(boxes, HW)

    assert phi.shape == (n, k) and phi.dtype == np.float64
    assert v.shape == (n, k - 1) and v.dtype == np.float64
    assert boxes.shape == (n, k - 1, 4) and boxes.dtype == np.int64
    assert owner.shape == (n, *HW) and owner.dtype == torch.uint8
    np.testing.assert_allclose(v, slow_sticks(phi), rtol=1e-9)
    for image in range(n):
        assert [tuple(sides) for sides in boxes[image, :, 2:]] == slow_sides(v[image], HW)
        outer = (0, 0, *HW)
        for box in boxes[image]:
            assert inside(box, outer)
            outer = box
    slow_owners = np.stack([slow_owner(image, HW) for image in boxes])
    assert np.array_equal(owner.numpy(), slow_owners)

    partners = rng(n + k).integers(0, SOURCES, (n, k))
    weights = np.stack([slow_shares(image, k) for image in slow_owners])
    plan = MixPlan(torch.from_numpy(partners), torch.from_numpy(weights), owner)
    rows = slow_rows(partners, slow_owners)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            sources = random_images(SOURCES, dtype, memory_format)
            mixed = paste(sources, plan)
            assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=memory_format)
            assert np.array_equal(mixed.double().numpy(), take_pixels(sources, rows))

    labels = np.arange(SOURCES) % CLASSES
    soft = mix_labels(torch.from_numpy(labels), plan.partners, plan.weights, CLASSES)
    assert soft.dtype == torch.float32 and soft.shape == (n, CLASSES)
    np.testing.assert_allclose(soft.numpy(), slow_labels(labels, partners, weights, CLASSES), rtol=0, atol=1e-6)


def test_owner_map_is_the_boxes_painted_in_order():
    for k in ALL_K:
        _, boxes = random_boxes(50, k, alpha=0.3)
        painted = np.zeros((50, *HW), dtype=np.uint8)
        for n in range(50):
            for source, (y, x, h, w) in enumerate(boxes[n], start=1):
                painted[n, y : y + h, x : x + w] = source
        assert np.array_equal(owner_map(boxes, HW).numpy(), painted)


def test_paste_reads_views_that_are_not_contiguous():
    sources = random_images(SOURCES, hw=(HW[1], 2 * HW[0]))[:, :, :, ::2].transpose(2, 3)
    assert not any(sources.is_contiguous(memory_format=f) for f in FORMATS)
    _, boxes = random_boxes(4, 3)
    plan = MixPlan(torch.tensor([[0, 9, 4]] * 4), torch.zeros(4, 3), owner_map(boxes, HW))
    assert np.array_equal(paste(sources, plan), take_pixels(sources, slow_rows(plan.partners, plan.owner.numpy())))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_agrees_with_loops_over_pixels(dtype, memory_format):
    sources = random_images(SOURCES, dtype, memory_format)
    for n, k in ((1, 2), (3, 5)):
        weights = draw_phi(n, k, 1.0, rng=rng(k)).astype(np.float32)
        partners = rng(n).integers(0, SOURCES, (n, k))
        mixed = blend(sources, MixPlan(torch.from_numpy(partners), torch.from_numpy(weights), None))
        assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=memory_format)
        expected = slow_blend(sources, partners, weights)
        error = np.abs(mixed.double().numpy() - expected)
        if dtype == torch.uint8:
            assert error.max() <= 0.5 + 1e-4
        else:  # one final rounding: half a unit in the last place of the result, on top of float32's sum
            ulp = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
            assert (error <= (ulp + 1e-6) * np.abs(expected)).all()


def test_blend_rounds_bytes_half_to_even():
    sources = torch.tensor([0, 1, 2, 3, 254, 255], dtype=torch.uint8).view(-1, 1, 1, 1)
    partners = torch.tensor([[0, 1], [1, 2], [2, 3], [4, 5], [5, 5]])
    mixed = blend(sources, MixPlan(partners, torch.full((5, 2), 0.5), None))
    assert mixed.flatten().tolist() == [0, 2, 2, 254, 255]


def test_mix_labels_adds_the_weights_of_one_class():
    partners = torch.tensor([[0, 1, 2], [3, 3, 0]])
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        soft = mix_labels(torch.tensor([2, 0, 2, 1], dtype=dtype), partners, weights, 4)
        assert soft.tolist() == [[0.25, 0, 0.75, 0], [0, 0.5, 0.5, 0]]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['HxW'][0]}px-{'-'.join(f'{p:.3g}' for p in c['phi'])}")
def test_golden_areas_and_sides(case):
    hw, phi, areas = tuple(case["HxW"]), case["phi"], case["areas_px"]
    boxes = nested_boxes(stick_lengths(np.array([phi] * 3)), hw, rng=rng())
    assert (boxes[:, :, 2:] == case["inner_box_sides"]).all()
    owner = owner_map(boxes, hw)
    for image in owner:
        assert torch.bincount(image.flatten(), minlength=len(phi)).tolist() == areas
    assert [area / (hw[0] * hw[1]) for area in areas] == case["lambda"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("phi", "owned"),
    [((1, 0, 0), (1, 0, 0)), ((0.5, 0.5, 0), (1, 1, 0)), ((0, 0, 1), (0, 0, 1)), ((0, 1, 0), (0, 1, 0))],
)
def test_exhausted_sticks(phi, owned):
    v = stick_lengths(np.array([phi], dtype=np.float64))
    assert np.isfinite(v).all() and (v >= 0).all() and (v <= 1).all()
    owner = owner_map(nested_boxes(v, HW, rng=rng()), HW)
    assert [bool((owner == source).any()) for source in range(3)] == [bool(share) for share in owned]


@pytest.mark.filterwarnings("error")
def test_nearly_exhausted_sticks_stay_in_the_unit_interval():
    for k in ALL_K:
        phi = draw_phi(500, k, 0.01, rng=rng(k))  # most rows are one to the last bit in one source
        v = stick_lengths(phi)
        assert (v >= 0).all() and (v <= 1).all()
        shares = np.stack([slow_shares(owner, k) for owner in owner_map(nested_boxes(v, HW, rng=rng()), HW)])
        assert np.abs(shares - phi).max() < 0.12  # rounding a side of 20 px moves a share by some per cent


def test_sides_are_rounded_half_to_even_in_each_dimension():
    boxes = nested_boxes(np.full((20, 1), 0.75), (5, 7), rng=rng())  # 2.5 and 3.5
    assert (boxes[:, 0, 2:] == (2, 4)).all()


# --------------------------------------------------------------------------------------------------------------
# distributions


@pytest.mark.parametrize(("k", "alpha"), [(2, 1.0), (3, 1 / 3), (3, 1.0), (5, 0.2), (4, 2.5), (9, 0.7)])
def test_phi_and_every_stick_are_beta(k, alpha):
    phi = draw_phi(20_000, k, alpha, rng=rng(k))
    np.testing.assert_allclose(phi.sum(1), 1, rtol=1e-12)
    assert (phi >= 0).all()
    assert stats.kstest(phi[:, 0], stats.beta(alpha, (k - 1) * alpha).cdf).pvalue > P_VALUE
    v = stick_lengths(phi)
    for stick in range(1, k):
        assert stats.kstest(v[:, stick - 1], stats.beta(alpha, (k - stick) * alpha).cdf).pvalue > P_VALUE


@pytest.mark.parametrize(("hw", "sides"), [((32, 32), [(23, 23), (16, 16)]), (HW, [(14, 23), (10, 16)])])
def test_every_legal_origin_occurs_equally_often(hw, sides):
    boxes = nested_boxes(np.full((64_000, 2), 0.5), hw, rng=rng())
    assert (boxes[:, :, 2:] == sides).all()
    offsets = boxes[:, :, :2].copy()
    offsets[:, 1] -= offsets[:, 0]  # the inner box relative to the outer one
    room = np.array([np.subtract(hw, sides[0]), np.subtract(sides[0], sides[1])]) + 1  # both ends included
    for box in range(2):
        legal = {(y, x) for y in range(room[box, 0]) for x in range(room[box, 1])}
        assert set(map(tuple, offsets[:, box].tolist())) == legal
    cells = np.ravel_multi_index(offsets.reshape(-1, 4).T, room.ravel())  # y, x of both boxes, jointly
    assert stats.chisquare(np.bincount(cells, minlength=room.prod())).pvalue > P_VALUE


def test_half_of_32_pixels_has_a_hundred_origins():
    boxes = nested_boxes(np.full((5_000, 1), 0.5), (32, 32), rng=rng(1))
    assert len(np.unique(boxes, axis=0)) == 100
    assert boxes[:, 0, :2].min() == 0 and (boxes[:, 0, :2].max(0) == 9).all()


@pytest.mark.parametrize("mixer", [DCutMix, DMixup])
@pytest.mark.parametrize(("k", "alpha"), [(2, 1.0), (3, 2.0), (5, 1.0)])
def test_weights_of_a_plan_are_dirichlet(mixer, k, alpha):
    plan = mixer(k=k, alpha=alpha, num_classes=2).plan(blank(1_000, (128, 96)), rng=rng(k))
    for source in range(k):  # rounding moves a share by about 1 % at this size, less than the test resolves
        weights = plan.weights[:, source].double().numpy()
        assert stats.ks_1samp(weights, stats.beta(alpha, (k - 1) * alpha).cdf).statistic < 0.07
    torch.testing.assert_close(plan.weights.sum(1), torch.ones(1_000), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------
# boxes around centres


@pytest.mark.parametrize("seed", range(3))
def test_centred_boxes_are_shifted_as_little_as_nesting_asks(seed):
    n, k = 60, 4
    centers = np.stack([rng(seed).integers(0, side, (n, k - 1)) for side in HW], axis=-1)
    v = stick_lengths(draw_phi(n, k, 0.8, rng=rng(k)))
    sides = box_sides(v, HW)
    boxes = centred_boxes(sides, torch.from_numpy(centers)).numpy()
    assert boxes.dtype == np.int64 and np.array_equal(boxes[:, :, 2:], sides[:, 1:])
    shifted = 0
    for image in range(n):
        outer = (0, 0, *HW)
        for (cy, cx), box in zip(centers[image].tolist(), boxes[image].tolist(), strict=True):
            y, x, h, w = box
            top, left, height, width = outer
            ideal = (cy - h // 2, cx - w // 2)
            legal = [(oy, ox) for oy in range(top, top + height - h + 1) for ox in range(left, left + width - w + 1)]
            best = min(legal, key=lambda o: (o[0] - ideal[0]) ** 2 + (o[1] - ideal[1]) ** 2)
            assert (y, x) == best
            shifted += best != ideal
            if inside((cy, cx, 1, 1), outer) and h and w:
                assert inside((cy, cx, 1, 1), box)
            outer = box
    assert 0 < shifted < n * (k - 1)


def test_centred_boxes_by_hand():
    sides = box_sides(np.array([[0.5, 0.5]]), HW)
    boxes = centred_boxes(sides, torch.tensor([[[10, 16], [0, 31]]]))
    assert boxes.tolist() == [[[10 - 7, 16 - 11, 14, 23], [3, 5 + 23 - 16, 10, 16]]]


# --------------------------------------------------------------------------------------------------------------
# plans and the two transforms


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_plan_pairs_each_image_with_permutations_of_the_batch(mixer, n):
    for k in ALL_K:
        plan = mixer(k=k, alpha=1.0, num_classes=2).plan(blank(n), rng=rng(k))
        assert plan.partners.shape == plan.weights.shape == (n, k)
        assert plan.partners.dtype == torch.int64 and plan.weights.dtype == torch.float32
        assert plan.partners[:, 0].tolist() == list(range(n))
        for column in plan.partners.T:
            assert sorted(column.tolist()) == list(range(n))
    if n == 9:  # nine sources, eight permutations: none repeats another or the identity
        assert len({tuple(column.tolist()) for column in plan.partners.T}) == k


def test_plan_of_dcutmix_weighs_by_exact_pixel_share():
    for k in ALL_K:
        plan = DCutMix(k=k, alpha=0.5, num_classes=2).plan(blank(40), rng=rng(k))
        assert plan.owner.dtype == torch.uint8 and plan.owner.shape == (40, *HW)
        for owner, weights in zip(plan.owner.numpy(), plan.weights.numpy(), strict=True):
            assert np.array_equal(weights, slow_shares(owner, k))
            for source in range(1, k):  # whoever lies within box k: a full rectangle
                ys, xs = np.nonzero(owner >= source)
                assert ys.size == 0 or ys.size == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
        assert len({owner.tobytes() for owner in plan.owner.numpy()}) > 35  # boxes per image, not per batch
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.owner = None


def test_plan_of_dmixup_draws_weights_per_image_and_no_boxes():
    plan = DMixup(k=3, alpha=1.0, num_classes=2).plan(blank(40), rng=rng())
    assert plan.owner is None
    assert len(plan.weights.unique(dim=0)) == 40


@pytest.mark.parametrize("hw", [HW, (32, 32), (1, 5)])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("k", ALL_K)
@pytest.mark.parametrize("mixer", PASTING)
def test_labels_agree_with_the_origin_of_every_pixel(mixer, k, n, hw):
    area = hw[0] * hw[1]
    images = located_images(n, hw)
    mixed, soft = mixer(k=k, alpha=1.0, num_classes=n)(images, torch.arange(n), rng=rng(k))
    origin = mixed.long() // (CHANNELS * area)  # (N, C, H, W): the source image of each value
    assert torch.equal(mixed.long() % (CHANNELS * area), images[:1].long().expand_as(mixed))  # none moved
    assert (origin == origin[:, :1]).all()  # whole pixels
    counts = torch.stack([(origin[:, 0] == source).sum((1, 2)) for source in range(n)], dim=1)
    shares = (counts.double() / area).float()
    assert soft.dtype == torch.float32 and soft.shape == (n, n)
    if area == 1024:  # sums of multiples of 2**-10 are exact, even where a partner comes twice
        assert torch.equal(soft, shares)
    torch.testing.assert_close(soft, shares, rtol=0, atol=1e-6)
    if hw == (32, 32) and n == 9:
        assert (counts.amax(1) < area).any()  # something was mixed at all


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("k", ALL_K)
def test_labels_of_dmixup_agree_with_every_pixel(k, n):
    mixed, soft = DMixup(k=k, alpha=1.0, num_classes=n)(indicator_images(n), torch.arange(n), rng=rng(k))
    torch.testing.assert_close(mixed, soft[:, :, None, None].expand_as(mixed), rtol=0, atol=1e-6)
    torch.testing.assert_close(soft.sum(1), torch.ones(n), rtol=0, atol=1e-6)
    assert n < 9 or (soft.amax(1) < 0.999).any()  # of two images, a permutation may mix nothing


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_transforms_keep_form_and_leave_their_input_alone(mixer, dtype, memory_format):
    for n in (1, 5):
        images, labels = random_images(n, dtype, memory_format), torch.arange(n)
        images_before, labels_before = images.clone(), labels.clone()
        mixed, soft = mixer(k=3, alpha=1.0, num_classes=n)(images, labels, rng=rng())
        assert mixed.dtype == dtype and mixed.shape == images.shape
        assert mixed.is_contiguous(memory_format=memory_format)
        assert soft.dtype == torch.float32
        assert torch.equal(images, images_before) and torch.equal(labels, labels_before)
        if n == 1:  # an image mixed with itself; a float16 blend may be one rounding away
            torch.testing.assert_close(mixed, images)
            torch.testing.assert_close(soft, torch.ones(1, 1))
        else:
            assert not torch.equal(mixed, images)


@pytest.mark.parametrize("mixer", MIXERS)
def test_probability_zero_changes_nothing(mixer):
    images, labels = random_images(6), torch.tensor([3, 0, 1, 1, 2, 3])
    mix = mixer(k=3, alpha=1.0, num_classes=CLASSES, p=0.0)
    for _ in range(20):
        mixed, soft = mix(images, labels)
        assert torch.equal(mixed, images)
        assert soft.dtype == torch.float32
        assert torch.equal(soft, torch.eye(CLASSES)[labels])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("p", "fewest", "most"), [(0.5, 70, 130), (0.1, 5, 40), (1.0, 200, 200)])
def test_mixing_is_one_draw_per_batch(mixer, p, fewest, most):
    n, batches = 32, 200
    images, labels = indicator_images(n, (8, 8)), torch.arange(n)
    mix = mixer(k=6, alpha=20.0, num_classes=n, p=p)  # six nearly equal parts: whatever is mixed shows
    mixed_batches = 0
    for _ in range(batches):
        mixed, soft = mix(images, labels)
        touched = (soft.amax(1) < 0.999).sum().item()
        assert touched in (0, n)
        assert torch.equal(mixed, images) == (touched == 0)
        mixed_batches += touched == n
    assert fewest <= mixed_batches <= most


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast_does_not_round_the_mix(mixer):
    mix, images, labels = mixer(k=5, alpha=1.0, num_classes=CLASSES), random_images(9), torch.arange(9) % CLASSES
    plain = mix(images, labels, rng=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mix(images, labels, rng=rng())
    for ours, theirs in zip(plain, cast, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------------
# Saliency-DCutMix


@pytest.mark.parametrize("saliency", SALIENCY)
@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_patches_lie_around_the_peaks_of_their_sources(k, saliency):
    """The maps have oracles of their own in test_saliency."""
    n = 30
    images = random_images(n)
    dots = peaks(SALIENCY[saliency](images)).numpy()
    plan = SaliencyDCutMix(k=k, alpha=1.0, num_classes=2, saliency=saliency).plan(images, rng=rng(k))
    sides = box_sides(stick_lengths(draw_phi(n, k, 1.0, rng=rng(k))), HW)  # phi is the first of its draws
    covered = 0
    for image in range(n):
        boxes, outer = [], (0, 0, *HW)
        for source in range(1, k):
            dot = dots[plan.partners[image, source]].tolist()
            h, w = sides[image, source].tolist()
            # Along each axis the nearest legal position, searched for.
            box = [
                min(range(low, low + room - side + 1), key=lambda at, c=c, side=side: abs(at - (c - side // 2)))
                for c, low, room, side in zip(dot, outer[:2], outer[2:], (h, w), strict=True)
            ] + [h, w]
            if h and w and inside((*dot, 1, 1), outer):
                assert inside((*dot, 1, 1), box)
                covered += 1
            boxes.append(box)
            outer = box
        owner = slow_owner(np.array(boxes), HW)
        assert np.array_equal(plan.owner[image].numpy(), owner)
        assert np.array_equal(plan.weights[image].numpy(), slow_shares(owner, k))
    assert covered >= n  # the first patch always, unless it is empty


def test_an_unknown_saliency_is_named():
    with pytest.raises(ValueError, match="no saliency 'deep': choose one of fine_grained, spectral_residual"):
        SaliencyDCutMix(k=3, alpha=1.0, num_classes=2, saliency="deep")


@pytest.mark.parametrize("source", ["digits", "cifar100"])
def test_patches_of_real_images_cover_the_peak_where_nesting_allows_it(source, request, record_property):
    """All do. Nesting always allows the first patch to, later ones less often, as their peak lies anywhere."""
    if source == "digits":
        images = load_data(DataConfig(data="digits")).images[:600]
    else:
        images = load_data(DataConfig(data=str(request.getfixturevalue("real_cifar100")))).images[:600]
    n, size = len(images), tuple(images.shape[2:])
    at = peaks(fine_grained(images)).numpy()
    allowed, patches = np.zeros(4), np.zeros(4)
    plan = SaliencyDCutMix(k=5, alpha=1.0, num_classes=2).plan(images, rng=rng())
    for image in range(n):
        for source_k in range(1, 5):
            within = [plan.owner[image].numpy() >= k for k in (source_k - 1, source_k)]  # the boxes k-1 and k
            if within[1].any():
                y, x = at[plan.partners[image, source_k]]
                patches[source_k - 1] += 1
                allowed[source_k - 1] += within[0][y, x]
                assert within[1][y, x] == within[0][y, x]
    shares = allowed / patches
    record_property("peaks covered by patch 1 to 4", shares.round(3).tolist())
    print(f"{source} at {size}: of patches 1 to 4, {shares.round(2)} cover the peak of their source")
    assert shares[0] == 1.0 and (np.diff(shares) < 0).all() and shares[3] > 0.1


# --------------------------------------------------------------------------------------------------------------
# randomness


def mixes(mixer, calls=3, *, seed=0, rngs=None, mix=None):
    """Images and soft labels of several calls on one fixed batch, as one flat tensor a call."""
    mix = mix or mixer(k=3, alpha=1.0, num_classes=6, seed=seed)
    rngs = rngs or [None] * calls
    outputs = [mix(indicator_images(6), torch.arange(6), rng=generator) for generator in rngs]
    return [torch.cat([images.flatten(), soft.flatten()]) for images, soft in outputs]


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def all_differ(outputs):
    return len({output.numpy().tobytes() for output in outputs}) == len(outputs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_given_generator_alone_decides(mixer):
    once = mixes(mixer, rngs=[rng(5), rng(6)], seed=0)
    again = mixes(mixer, rngs=[rng(5), rng(6)], seed=1)
    assert all_equal(once, again) and all_differ(once)
    shared = rng(5)
    assert all_differ(mixes(mixer, rngs=[shared, shared]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_seed_decides_in_the_main_process(mixer):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        once = mixes(mixer, seed=7)
        torch.manual_seed(2)
        again = mixes(mixer, seed=7)
    assert all_equal(once, again)
    assert all_differ(once + mixes(mixer, seed=8))


@pytest.mark.parametrize("mixer", MIXERS)
def test_global_random_state_is_left_alone(mixer):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    mixes(mixer)
    mixes(mixer, rngs=[rng()])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert python_state == random.getstate()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_pickled_copy_goes_on_alike(mixer):
    mix = mixer(k=3, alpha=1.0, num_classes=6)
    mixes(mixer, mix=mix)
    copy = pickle.loads(pickle.dumps(mix))
    assert all_equal(mixes(mixer, mix=copy), mixes(mixer, mix=mix))


class SameBatch(Dataset):
    """Six indicator images, again in every batch: two batches can differ by their mix alone."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return 6 * self.batches

    def __getitem__(self, index):
        return indicator_images(6)[index % 6], index % 6


class Collate:
    def __init__(self, mix):
        self.mix = mix

    def __call__(self, samples):
        return self.mix(*default_collate(samples))


def loader_mixes(mix, torch_seed, *, workers=2, persistent=False, epochs=2):
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed)
        loader = DataLoader(
            SameBatch(4),
            batch_size=6,
            num_workers=workers,
            collate_fn=Collate(mix),
            persistent_workers=persistent,
            timeout=60 if workers else 0,
        )
        batches = [batch for _ in range(epochs) for batch in loader]
    for images, soft in batches:
        torch.testing.assert_close(images.mean((2, 3)), soft, rtol=0, atol=1e-5)
    return [torch.cat([images.flatten(), soft.flatten()]) for images, soft in batches]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_workers_and_epochs_mix_differently_and_reproducibly(mixer, persistent):
    mix = mixer(k=3, alpha=1.0, num_classes=6)
    once = loader_mixes(mix, 1, persistent=persistent)
    assert all_differ(once)  # two workers, two epochs, two batches each
    mixes(mixer, mix=mix)  # a generator already used in the main process must not leak into the workers
    assert all_equal(once, loader_mixes(mix, 1, persistent=persistent))
    assert all_differ(once + loader_mixes(mix, 2, persistent=persistent))


def test_loader_without_workers_mixes_every_epoch_differently():
    assert all_differ(loader_mixes(DCutMix(k=3, alpha=1.0, num_classes=6), 1, workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_random_choice_between_the_two_in_a_collate_fn(workers):
    sharp = {"k": 3, "alpha": 1.0, "num_classes": 6}
    choice = v2.RandomChoice([DCutMix(**sharp), DMixup(**sharp)])
    outputs = loader_mixes(choice, 1, workers=workers, epochs=3)
    pasted = [bool(torch.isin(output[:-36], torch.tensor([0.0, 1.0])).all()) for output in outputs]
    assert all_differ(outputs)
    assert {True, False} == set(pasted)  # pixels of DCutMix are whole, those of DMixup are not


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_gpu_makes_the_mix_of_a_cpu(mixer):
    mix = mixer(k=5, alpha=1.0, num_classes=CLASSES)
    images, labels = random_images(9, memory_format=torch.channels_last), torch.arange(9) % CLASSES
    on_cpu = mix(images, labels, rng=rng())
    on_gpu = mix(images.cuda(), labels.cuda(), rng=rng())
    for ours, theirs in zip(on_cpu, on_gpu, strict=True):
        assert theirs.device.type == "cuda"
        torch.testing.assert_close(ours, theirs.cpu())
    plan = mix.plan(images.cuda(), rng=rng())
    assert {plan.partners.device.type, plan.weights.device.type} == {"cuda"}


# --------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("k", value) for value in (1, 0, 257)),
        *(("alpha", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        *(("p", value) for value in (-0.1, 1.1, float("nan"))),
    ],
)
def test_bad_settings_are_named(mixer, argument, value):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        mixer(**{"k": 3, "alpha": 1.0, "num_classes": 2} | {argument: value})


@pytest.mark.parametrize(("argument", "k", "alpha"), [("k", 1, 1.0), ("alpha", 3, 0.0), ("alpha", 3, -1.0)])
def test_draw_phi_names_bad_settings(argument, k, alpha):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        draw_phi(4, k, alpha, rng=rng())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("labels", [[0, 1, 2, 4], [0, -1, 2, 3], [0, 1, 2], [0, 1, 2, 3, 0]])
def test_bad_labels_are_named(mixer, p, labels):
    with pytest.raises(ValueError, match="labels"):
        mixer(k=3, alpha=1.0, num_classes=CLASSES, p=p)(random_images(4), torch.tensor(labels))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(4, *HW), (4, 2, CHANNELS, *HW)])
def test_images_of_other_than_four_dimensions_are_named(mixer, p, shape):
    with pytest.raises(ValueError, match="images"):
        mixer(k=3, alpha=1.0, num_classes=CLASSES, p=p)(torch.zeros(shape), torch.arange(4))

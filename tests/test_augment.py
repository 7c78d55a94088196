"""Batched augmentation against loops over single images and pixels, and the distribution of its draws."""

import math

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from scipy import stats
from torchvision.transforms import functional as transforms
from torchvision.transforms.v2 import functional as TF

from nas_kmix.engine import augment
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import Source

H, W = 20, 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def rng(seed=0):
    return np.random.default_rng(seed)


def draw_images(n=6, height=H, width=W):
    return torch.from_numpy(draw_pixels(n, 3, height, width))


def coordinates(n, height=H, width=W, step=1):
    """Images whose pixels say where they came from: row and column (times `step`) in the first two channels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (step * torch.stack([y, x, torch.zeros_like(x)])).to(torch.uint8).expand(n, -1, -1, -1).clone()


OPERATIONS = {
    "crop": lambda images, rng: augment.random_crop(images, 4, rng=rng),
    "flip": lambda images, rng: augment.random_flip(images, rng=rng),
    "resized_crop": lambda images, rng: augment.random_resized_crop(images, rng=rng),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
@pytest.mark.parametrize("n", [1, 7])
def test_same_shape_and_type_a_function_of_the_generator_inputs_unchanged(operation, n):
    images = draw_images(n)
    before = images.clone()
    first, again = operation(images, rng(3)), operation(images, rng(3))
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, again) and torch.equal(images, before)
    assert first.data_ptr() != images.data_ptr()
    assert any(not torch.equal(first, operation(images, rng(seed))) for seed in range(4, 12))


def test_normalise_is_the_formula():
    images = draw_images()
    before = images.clone()
    wanted = (images.numpy() / 255.0 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    result = augment.normalise(images, MEAN, STD)
    assert result.dtype == torch.float32 and torch.equal(images, before)
    np.testing.assert_allclose(result.numpy(), wanted, atol=2e-6)


def test_normalise_leaves_floats_unchanged():
    images = draw_images().float()
    before = images.clone()
    augment.normalise(images, MEAN, STD)
    assert torch.equal(images, before)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_is_a_window_of_the_padded_image(padding):
    images = draw_images(5)
    result = augment.random_crop(images, padding, rng=rng())
    tops, lefts = rng().integers(0, 2 * padding + 1, size=(2, 5))
    for n in range(5):
        for y in range(H):
            for x in range(W):
                v, u = y + tops[n] - padding, x + lefts[n] - padding
                wanted = images[n, :, v, u] if 0 <= v < H and 0 <= u < W else torch.zeros(3)
                assert torch.equal(result[n, :, y, x], wanted.to(torch.uint8))


def test_every_crop_offset_occurs_equally_often():
    result = augment.random_crop(coordinates(5000), 2, rng=rng())
    dy, dx = (result[:, channel, 10, 16].long() - centre + 2 for channel, centre in ((0, 10), (1, 16)))
    counts = torch.bincount(dy * 5 + dx, minlength=25)
    assert len(counts) == 25 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = draw_images(2000, 4, 6)
    result = augment.random_flip(images, rng=rng())
    mirrored = (result == images.flip(3)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-3


def windows(n, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Top, left, height and width of the windows as fractions of the image, by torchvision's rejection loop."""
    area = rng.uniform(*scale, size=(n, 10))
    aspect = np.exp(rng.uniform(*np.log(ratio), size=(n, 10)))
    place = rng.uniform(-1.0, 1.0, size=(n, 2))
    for i in range(n):
        height = width = 1.0
        for j in range(10):
            h, w = math.sqrt(area[i, j] / aspect[i, j]), math.sqrt(area[i, j] * aspect[i, j])
            if h <= 1.0 and w <= 1.0:
                height, width = h, w
                break
        yield (1 - height) * (place[i, 0] + 1) / 2, (1 - width) * (place[i, 1] + 1) / 2, height, width


def bilinear(image, y, x):
    """The value at a real-valued place; beyond the border it is the border's."""
    y, x = (min(max(at, 0.0), size - 1.0) for at, size in ((y, image.shape[1]), (x, image.shape[2])))
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
    upper = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def test_resized_crop_samples_its_window_bilinearly():
    images = draw_images(4)
    result = augment.random_resized_crop(images, rng=rng(1))
    for n, (top, left, height, width) in enumerate(windows(4, rng(1))):
        for y in range(H):
            for x in range(W):
                v, u = (top + height * (y + 0.5) / H) * H - 0.5, (left + width * (x + 0.5) / W) * W - 0.5
                wanted = bilinear(images[n].numpy().astype(np.float64), v, u)
                assert np.abs(result[n, :, y, x].numpy() - wanted).max() < 0.51


class GivenPlaces:
    """Stands in for a generator: windows of a quarter of the area at the given places."""

    def __init__(self, places):
        self.answers = iter([0.25, 0.0, places])

    def uniform(self, low, high, size):
        return np.broadcast_to(np.asarray(next(self.answers), dtype=np.float64), size)


def test_resized_crop_agrees_with_torchvision_on_whole_pixels():
    images = draw_images(3)
    corners = np.array([[0, 0], [10, 16], [3, 7]])  # top, left of windows of 10 x 16
    result = augment.random_resized_crop(images, rng=GivenPlaces(2 * corners / [H / 2, W / 2] - 1))
    for n, (top, left) in enumerate(corners.tolist()):
        wanted = TF.resized_crop(images[n], top, left, 10, 16, [H, W], antialias=True)
        # torchvision repeats the window's own border, ours goes on into the image: the outermost pixels may differ.
        difference = (result[n].int() - wanted.int()).abs()[:, 1:-1, 1:-1]
        assert difference.max() <= 1


def test_resized_crop_draws_the_windows_it_promises():
    n, size = 1500, 64
    result = augment.random_resized_crop(coordinates(n, size, size, step=3), rng=rng()).double() / 3
    inner = slice(8, -8)  # the border is clamped
    heights = (result[:, 0, inner, 0][:, -1] - result[:, 0, inner, 0][:, 0]) / 47
    widths = (result[:, 1, 0, inner][:, -1] - result[:, 1, 0, inner][:, 0]) / 47
    area, aspect = heights * widths, widths / heights
    assert 0.07 < area.min() < 0.1 and 0.97 < area.max() < 1.02
    assert 0.72 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.38
    assert abs(float(aspect.log().mean())) < 0.02
    assert abs(float(result[:, 0].mean()) - 31.5) < 0.5 and abs(float(result[:, 1].mean()) - 31.5) < 0.5


def test_resized_crop_takes_the_whole_image_where_no_window_fits():
    images = draw_images()
    result = augment.random_resized_crop(images, rng=rng(), scale=(1.0, 1.0), ratio=(1.2, 4 / 3))
    assert torch.equal(result, images)


def data_of(size):
    labels = np.array([0, 1])
    source = Source("generated", "train", labels, ("ant", "bee"), arrays=draw_pixels(2, size, size, 3))
    return ImageData(source, size, MEAN, STD, torch.device("cpu"), torch.zeros(2, 3, size, size, dtype=torch.uint8))


def test_small_images_are_cropped_flipped_and_normalised():
    images, shared = draw_images(9, 32, 32), rng(5)
    cropped = augment.random_crop(images, 4, rng=shared)
    wanted = augment.normalise(augment.random_flip(cropped, rng=shared), MEAN, STD)
    assert torch.equal(augment_batch(images, data_of(32), Augmentation(), rng=rng(5)), wanted)


def test_large_images_are_cropped_and_resized():
    images, shared = draw_images(3, 65, 65), rng(5)
    wanted = augment.normalise(augment.random_resized_crop(images, rng=shared), MEAN, STD)
    assert torch.equal(augment_batch(images, data_of(65), Augmentation(flip=False), rng=rng(5)), wanted)


def test_without_crop_and_flip_only_normalisation_is_left():
    images = draw_images(50, 32, 32)
    result = augment_batch(images, data_of(32), Augmentation(flip=False, crop_padding=0), rng=rng())
    assert torch.equal(result, augment.normalise(images, MEAN, STD))


@pytest.mark.parametrize("name", ["crop", "flip", "resized_crop"])
def test_memory_format_is_kept(name):
    assert OPERATIONS[name](draw_images(), rng()).is_contiguous()


# -- colours and Cutout ------------------------------------------------------------------------------------------------


CHANGES = (
    transforms.adjust_brightness,
    transforms.adjust_contrast,
    transforms.adjust_saturation,
    transforms.adjust_hue,
)


@pytest.mark.parametrize("strengths", [(0.4, 0.3, 0.2, 0.1), (0.9, 2.0, 3.0, 0.5), (0.0, 0.4, 0.0, 0.2)])
def test_color_jitter_is_torchvisions_with_the_drawn_factors(strengths):
    """Image by image with scalars, in the drawn order; grey and extreme pixels have no hue."""
    images = torch.from_numpy(draw_pixels(8, 3, 12, 10))
    images[0], images[1, :, :6], images[1, :, 6:] = images[0, :1], 0, 255
    before = images.clone()
    found = augment.color_jitter(images, strengths, rng=rng(3))
    assert found.dtype == torch.float32 and torch.equal(images, before)
    draws, strengths = rng(3), np.array(strengths)
    low, high = np.maximum(0, 1 - strengths), 1 + strengths
    low[3], high[3] = -strengths[3], strengths[3]
    factors = draws.uniform(low, high, size=(8, 4))
    orders = draws.permuted(np.tile(range(4), (8, 1)), axis=1)
    assert len({tuple(order) for order in orders}) > 4
    for image, result, factor, order in zip(images, found, factors, orders, strict=True):
        wanted = image / 255
        for i in order:
            if strengths[i]:
                wanted = CHANGES[i](wanted, float(factor[i]))
        torch.testing.assert_close(result / 255, wanted, atol=2e-4, rtol=0)
    assert not torch.equal(found, images.float())


def test_color_jitter_factors_fill_their_ranges():
    """The brightness can be read off a grey image."""
    images = torch.full((2000, 3, 2, 2), 100, dtype=torch.uint8)
    values = augment.color_jitter(images, (0.4, 0.0, 0.0, 0.0), rng=rng())[:, 0, 0, 0].double()
    assert 59.9 <= values.min() <= 61 and 139 <= values.max() <= 140.1 and abs(values.mean() - 100) < 2


def test_colours_of_crops_change_on_the_device_alone():
    """What `photographs` has cropped is flipped, jittered, normalised, lit and cut out, in this order."""
    images, shared = draw_images(9), rng(5)
    config = Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.2), lighting=0.1, cutout=4)
    wanted = augment.random_flip(images, rng=shared)
    wanted = augment.color_jitter(wanted, config.color_jitter, rng=shared)
    wanted = augment.lighting(augment.normalise(wanted, MEAN, STD), 0.1, STD, rng=shared)
    wanted = augment.cutout(wanted, 4, rng=shared)
    for size in (32, 65):
        assert torch.equal(augment_batch(images, data_of(size), config, rng=rng(5), cropped=True), wanted)


def test_cutout_is_a_clipped_square_around_a_uniform_pixel():
    n, h, w, length = 4000, 7, 9, 4
    images = torch.ones(n, 3, h, w)
    found = augment.cutout(images, length, rng=rng(1))
    possible = {}
    for y in range(h):
        for x in range(w):
            mask = torch.ones(h, w)
            mask[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 0.0
            possible[mask.numpy().tobytes()] = possible.get(mask.numpy().tobytes(), 0) + 1
    assert (found == found[:, :1]).all() and (images == 1).all()
    counts = {}
    for image in found[:, 0]:
        counts[image.numpy().tobytes()] = counts.get(image.numpy().tobytes(), 0) + 1
    assert counts.keys() == possible.keys()
    for mask, multiplicity in possible.items():
        assert abs(counts[mask] - n * multiplicity / (h * w)) < 5 * (n * multiplicity / (h * w)) ** 0.5


def test_lighting_is_alexnets_shift_of_whole_images():
    images, std = torch.zeros(5, 3, 4, 6), (0.2, 0.25, 0.5)
    found = augment.lighting(images, 0.1, std, rng=rng(2))
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))  # one colour per image
    draws = rng(2).normal(size=(5, 3)) * 0.1
    vectors = np.array(augment.COLOR_DIRECTIONS)  # columns are the directions
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)  # orthonormal
    for image, draw in zip(found, draws, strict=True):
        shift = sum(draw[i] * augment.COLOR_VARIANCES[i] * vectors[:, i] for i in range(3)) / np.array(std)
        np.testing.assert_allclose(image[:, 0, 0], shift, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"crop_padding": -1}, "--crop-padding"),
        ({"cutout": -1}, "--cutout"),
        ({"lighting": -0.1}, "--lighting"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "--color-jitter"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Augmentation(**fields)

"""Crops of whole photographs against torchvision's, and scaled decoding against whole decoding."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from nas_kmix.engine.photographs import RATIO, SCALE, PhotoCrops, choose_crop


def draw(n, seed=0):
    return np.random.default_rng(seed).random((n, 10, 4)).tolist()


def encoded(pixels, mode="RGB", kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def opened(file):
    return Image.open(io.BytesIO(file))


def smooth(height, width):
    """Pixels that say where they are, in the first two channels."""
    y, x = np.linspace(0, 250, height), np.linspace(0, 250, width)
    planes = np.broadcast_arrays(x, y[:, None], 125.0)
    return np.stack(planes, axis=2).round().astype(np.uint8)


def test_the_distribution_is_torchvisions():
    height, width, n = 375, 500, 2000
    found = np.array([choose_crop(width, height, draws) for draws in draw(n)])
    blank = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wanted = np.array([RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(n)])
    wanted = wanted[:, [1, 0, 3, 2]]  # top, left, height, width
    for of in (
        lambda crops: crops[:, 2] * crops[:, 3],
        lambda crops: np.log(crops[:, 2] / crops[:, 3]),
        lambda crops: crops[:, 0],
        lambda crops: crops[:, 1] / (height - crops[:, 3] + 1),
    ):
        assert stats.ks_2samp(of(found), of(wanted)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (65, 64), (500, 375)])
def test_every_crop_lies_in_the_photograph(size):
    crops = np.array([choose_crop(*size, draws) for draws in draw(500)])
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] >= 1).all() and (crops[:, :2] + crops[:, 2:] <= size).all()


@pytest.mark.parametrize("size", [(500, 40), (40, 500), (300, 299)])
def test_without_a_fitting_crop_it_is_the_centre_as_in_torchvision(size):
    too_long = [[1.0, 0.0, 0.3, 0.3]] * 10
    top, left, height, width = RandomResizedCrop.get_params(torch.zeros(3, *size[::-1]), [1.5, 1.5], list(RATIO))
    assert choose_crop(*size, too_long) == (left, top, width, height)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")]
)
def test_a_small_photograph_gives_the_crop_of_its_pixels(mode, kind):
    file, crops = encoded(draw_pixels(90, 150, 3), mode, kind), PhotoCrops(64, seed=0)
    whole = TF.to_image(opened(file).convert("RGB"))
    for draws in draw(20):
        left, top, width, height = choose_crop(150, 90, draws)
        found = crops.resize(np.asarray(crops.cut(opened(file), draws).convert("RGB")))
        wanted = TF.resized_crop(whole, top, left, height, width, [64, 64], antialias=True)
        assert found.shape == (3, 64, 64) and torch.equal(found, wanted)


def test_large_crops_are_decoded_at_a_fraction_of_their_size_and_show_the_same():
    crops, by_scale = PhotoCrops(70, seed=0), {}
    file = encoded(smooth(701, 1003), quality=95)  # multiples of nothing
    whole = TF.to_image(opened(file).convert("RGB"))
    for draws in draw(40):
        left, top, width, height = choose_crop(1003, 701, draws)
        image = opened(file)
        part = crops.cut(image, draws)
        scale = round(1003 / image.width)
        by_scale[scale] = by_scale.get(scale, 0) + 1
        assert scale == 2 ** min(3, math.floor(math.log2(max(1, min(width, height) / 70))))
        assert min(part.size) >= min(70, width, height)
        wanted = TF.resized_crop(whole, top, left, height, width, [70, 70], antialias=True)
        assert (crops.resize(np.asarray(part)).int() - wanted.int()).abs().max() <= 4  # of 250 levels on 1003 px
    assert {2, 4, 8} <= by_scale.keys()


def test_lossless_files_are_cut_at_their_own_size():
    pixels, crops = draw_pixels(600, 600, 3), PhotoCrops(65, seed=0)
    for draws in draw(5):
        part = crops.cut(opened(encoded(pixels, kind="PNG")), draws)
        left, top, width, height = choose_crop(600, 600, draws)
        assert np.array_equal(np.asarray(part), pixels[top : top + height, left : left + width])


def test_draws_are_a_function_of_seed_epoch_and_image():
    found = [PhotoCrops(32, seed).draw(index, epoch) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    assert len({str(draws) for draws in found}) == 8
    assert PhotoCrops(224, 1).draw(1, 1) == found[-1]

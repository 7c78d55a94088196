"""Images of every mode as RGB, transparent ones on white."""

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image

from darts_space import Preparation
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.pixels import rgb_of


def on_white(rgb, alpha):
    """As browsers show it, in float64."""
    share = alpha[..., None].astype(np.float64) / 255
    return rgb * share + 255 * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_on_white(mode):
    pixels = draw_pixels(9, 7, len(Image.new(mode, (1, 1)).getbands()))
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    colours = pixels[..., :-1] if mode == "RGBA" else pixels[..., :1].repeat(3, axis=2)
    shown = rgb_of(Image.fromarray(pixels, mode))
    assert np.abs(shown - on_white(colours, pixels[..., -1])).max() <= 1
    assert (shown[0] == 255).all() and (shown[1] == colours[1]).all()


def test_a_transparent_colour_of_a_palette_or_of_rgb_is_white():
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    palette.info["transparency"] = 0
    assert rgb_of(palette).tolist() == [[[255, 255, 255], [10, 20, 30], [40, 50, 60]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    keyed.info["transparency"] = (1, 2, 3)
    assert rgb_of(keyed).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_the_transforms_of_a_network_lay_them_on_white_too():
    transforms = Preparation(("a", "b"), 4, 4, (0.5,) * 3, (0.25,) * 3).transforms()
    assert torch.equal(transforms(Image.new("RGBA", (4, 4), (9, 9, 9, 0))), torch.full((3, 4, 4), 2.0))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "HSV", "YCbCr"])
def test_opaque_images_are_as_pillow_converts_them(mode):
    image = Image.fromarray(draw_pixels(8, 8, 3)).convert(mode)
    assert np.array_equal(rgb_of(image), np.array(image.convert("RGB")))


def test_a_folder_of_logos_is_not_black(image_folder):
    folder = image_folder(sizes=((32, 32),))
    for path in folder.rglob("*.png"):
        logo = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        logo.putpixel((3, 4), (200, 0, 0, 255))
        logo.save(path)
    images = load_data(DataConfig(data=str(folder))).images
    assert images[0, :, 4, 3].tolist() == [200, 0, 0] and (images[:, :, 0] == 255).all()

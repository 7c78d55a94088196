"""Labels and items as other people's data sets and trainers give them."""

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image

from nas_kmix.engine.foreign import source_of
from nas_kmix.engine.labels import class_indices
from nas_kmix.mixing import DCutMix
from nas_kmix.rivals import CutMix

LABELS = [2, 0, 1, 2]
ONE_HOT = np.eye(3)[LABELS]
FORMS = {
    "list": LABELS,
    "array": np.array(LABELS),
    "uint8 array": np.array(LABELS, dtype=np.uint8),
    "column": np.array(LABELS)[:, None],
    "arrays of one": [np.array([label]) for label in LABELS],
    "tensors": [torch.tensor(label) for label in LABELS],
    "tensor": torch.tensor(LABELS, dtype=torch.int32),
    "one-hot": torch.tensor(ONE_HOT, dtype=torch.float32),
    "one-hot integers": ONE_HOT.astype(int),
    "one-hot bools": ONE_HOT.astype(bool),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_labels(form):
    found = class_indices(FORMS[form])
    assert found.tolist() == LABELS and found.dtype == torch.int64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixer", [DCutMix(k=3, alpha=1.0, num_classes=3), CutMix(num_classes=3)])
def test_mixers_take_every_form(form, mixer):
    images = torch.from_numpy(draw_pixels(4, 3, 8, 8)).float()
    expected = mixer(images, torch.tensor(LABELS), rng=np.random.default_rng(0))
    found = mixer(images, FORMS[form], rng=np.random.default_rng(0))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "labels",
    [ONE_HOT * 0.9, np.ones((4, 3)), torch.zeros(4), ["a", "b", "c", "d"], [1, [2, 3]], None, 3, ONE_HOT[:, :2]],
)
def test_what_is_no_class_per_image_is_a_sentence(labels):
    mixer = DCutMix(k=2, alpha=1.0, num_classes=3)
    with pytest.raises(ValueError, match="labels"):
        mixer(torch.zeros(4, 3, 8, 8), labels, rng=np.random.default_rng(0))


@pytest.mark.parametrize("item", ["rows", "channels first", "tensor", "grey tensor"])
def test_a_data_set_like_medmnist_gives_its_images(item):
    """Labels come as arrays of one, and items in either order of their axes."""
    pixels = draw_pixels(4, 9, 8, 3)
    views = {
        "rows": lambda image: image,
        "channels first": lambda image: image.transpose(2, 0, 1),
        "tensor": lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()),
        "grey tensor": lambda image: torch.from_numpy(image[None, :, :, 0].copy()),
    }
    source = source_of([(views[item](image), np.array([label])) for image, label in zip(pixels, LABELS, strict=True)])
    expected = pixels[..., :1].repeat(3, axis=3) if item == "grey tensor" else pixels
    assert source.labels.tolist() == LABELS and np.array_equal(source.arrays, expected)


def test_items_that_are_no_images_and_several_labels_are_sentences():
    with pytest.raises(ValueError, match=r"uint8 \(4, 8, 8\)"):
        source_of([(draw_pixels(4, 8, 8), 0), (draw_pixels(4, 8, 8), 1)])
    with pytest.raises(ValueError, match=r"list: labels .* must be one-hot"):
        source_of([(draw_pixels(8, 8, 3), np.array([1, 1, 0]))] * 2)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Image.new("RGB", (8, 8)), "not Image"),
        ({"image": Image.new("RGB", (8, 8)), "label": 0}, "not dict of image, label"),
        ((Image.new("RGB", (8, 8)), 0, "a.png"), "not tuple"),
    ],
)
def test_items_that_are_no_pairs_are_told(item, said):
    """Such as those of Hugging Face's datasets."""

    class Dataset:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return item

    with pytest.raises(ValueError, match=f"The items of Dataset must be pairs of an image and a label, {said}"):
        source_of(Dataset())

"""The picture of mixed images: what is drawn is what the mixers return, and its captions are their labels."""

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image

from nas_kmix.analysis import mixes
from nas_kmix.engine.data import DataConfig, load_data

CONFIG = mixes.Config(images=5, seed=4)


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(data="digits"))


def test_rows_are_the_mixes_and_captions_their_soft_labels(data):
    table, marks = mixes.rows(CONFIG, data)
    unmixed = table[0]
    by_class = {}
    for image, name in zip(unmixed.images, unmixed.captions, strict=True):
        by_class.setdefault(name, []).append(image)
    assert [row.title.split("\n")[0] for row in table] == [
        *("unmixed", "Cutout", "Mixup", "CutMix", "DMixup", "DCutMix", "Saliency-")
    ]
    assert marks.shape == (5, 2)
    for row in table[1:]:
        assert row.images.shape == (5, 32, 32, 3) and row.images.min() >= 0 and row.images.max() <= 1
        for image, text in zip(row.images, row.captions, strict=True):
            shares = {line.split(": ")[0]: float(line.split(": ")[1]) for line in text.splitlines()}
            assert abs(sum(shares.values()) - 1) < 0.03
            assert list(shares.values()) == sorted(shares.values(), reverse=True)
            if "CutMix" not in row.title:
                continue
            # Every class named shows at least in its share of pixels (more where images agree), none else is needed.
            seen = {name: np.zeros((32, 32), dtype=bool) for name in shares}
            for name, mask in seen.items():
                for source in by_class[name]:
                    mask |= np.isclose(image, source, atol=1e-6).all(axis=2)
                assert mask.mean() >= shares[name] - 0.01
            assert np.mean(np.logical_or.reduce(list(seen.values()))) > 0.98


def test_shares_below_half_a_per_cent_are_left_out():
    assert mixes.caption(torch.tensor([0.004, 0.596, 0.4]), ["a", "b", "c"]) == "b: 0.60\nc: 0.40"


def test_the_command_writes_a_picture_or_says_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "new" / "mixes.png"
    assert mixes.main(["--data", "digits", "--images", "3", "--picture", str(path)]) == 0
    with Image.open(path) as image:
        assert image.width > 300 and image.height > image.width
    for flags, message in (
        (["--images", "1"], "two images"),
        (["--picture", "mixes.gif"], r".png"),
        (["--images", "99999"], "images available"),
        (["--k", "1"], "k is the number"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert mixes.main(["--picture", str(path), *flags]) == 2
        assert message in capsys.readouterr().err


def test_dollars_in_the_names_of_classes_are_no_formulas(npz_file, tmp_path):
    pixels, names = draw_pixels(8, 32, 32, 3), np.array(["US$1 \\frac", "$^$"])
    path = npz_file(train_images=pixels, train_labels=np.arange(8) % 2, class_names=names)
    assert mixes.main(["--data", str(path), "--images", "3", "--picture", str(tmp_path / "mixes.png")]) == 0

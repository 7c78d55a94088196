"""Fixtures shared by the tests: one thread, generated image folders and archives, the real images of NAS_KMIX_DATA."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import alone as alone
from processes import npz as npz
from processes import server as server


@pytest.fixture(autouse=True)
def one_thread():
    """On such small tensors more threads only wait for each other; with one, sums are reproducible."""
    torch.set_num_threads(1)


def draw_pixels(*shape, seed=0):
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.fixture
def image_folder(tmp_path):
    """Makes a folder SPLIT/CLASS/N.png of random images; sizes (H, W) are taken in turn.

    `grey` images are stored with one channel; `truncated` files are cut in half. Both are given as paths in the folder.
    """

    def make(
        name="images",
        *,
        classes=("ant", "bee"),
        per_class=4,
        sizes=((8, 8),),
        suffix=".png",
        splits=("train",),
        grey=(),
        truncated=(),
        seed=0,
    ):
        folder, number = tmp_path / name, 0
        for split in splits:
            for label in classes:
                (folder / split / label).mkdir(parents=True)
                for i in range(per_class):
                    image = Image.fromarray(draw_pixels(*sizes[number % len(sizes)], 3, seed=(seed, number)))
                    path = f"{split}/{label}/{i}{suffix}"
                    (image.convert("L") if path in grey else image).save(folder / path)
                    if path in truncated:
                        cut_in_half(folder / path)
                    number += 1
        return folder

    return make


def cut_in_half(path):
    """Damage a file as an interrupted copy would."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def npz_file(tmp_path):
    """Writes an archive of twelve 8x8 images in three classes; keywords replace arrays, None removes them."""

    def make(name="set.npz", *, save=np.savez, **arrays):
        defaults = {"train_images": draw_pixels(12, 8, 8, 3), "train_labels": np.arange(12) % 3}
        save(tmp_path / name, **{k: v for k, v in {**defaults, **arrays}.items() if v is not None})
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images that NAS_KMIX_DATA names, with its `unpack.py`."""
    folder = os.environ.get("NAS_KMIX_DATA")
    if folder is None:
        pytest.skip("NAS_KMIX_DATA does not name the folder of real images")
    return Path(folder)


def _unpack(real_data, *arguments):
    subprocess.run([sys.executable, real_data / "unpack.py", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="session")
def real_cifar100(real_data, tmp_path_factory):
    """cifar100.npz with 20 training and 4 test images of each class."""
    path = tmp_path_factory.mktemp("cifar100") / "cifar100.npz"
    _unpack(real_data, "cifar100", path, "--per-class", "20")
    return path


@pytest.fixture
def whole_cifar100(real_data, tmp_path):
    """All arrays of CIFAR-100, in the archive's order."""
    _unpack(real_data, "cifar100", tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def real_imagenette(real_data, tmp_path_factory):
    """Imagenette as train|val/CLASS/*.JPEG, the shorter side 224, some greyscale."""
    folder = tmp_path_factory.mktemp("imagenette") / "imagenette"
    _unpack(real_data, "imagenette", folder)
    return folder

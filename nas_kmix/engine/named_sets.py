"""The sets that `--data` knows by name: scikit-learn's digits, torchvision's CIFAR, MedMNIST through its package."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image

from nas_kmix.engine.pixels import to_rgb
from nas_kmix.engine.sources import Source

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".download.lock"
# The constants that the published training scripts use.
CIFAR_CONSTANTS = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}
MEDMNIST = (
    "pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist", "tissuemnist",
    "organamnist", "organcmnist", "organsmnist",
)  # fmt: skip
MEDMNIST_SIZES = (28, 64, 128, 224)
"""Sides in pixels; `pathmnist_64` names the images of 64 px."""
NOT_MIRRORED = re.compile(r"(e|k|q|not)?mnist|svhn|usps|digits?|letters?|characters?")


def is_named(data: str) -> bool:
    """Whether `--data` is a name, not a place."""
    return data == "digits" or data in CIFAR_CONSTANTS or _medmnist_parts(data) is not None


def splits_of_named(data: str) -> tuple[str, ...]:
    return ("train", "test") if _medmnist_parts(data) is None else ("train", "val", "test")


def open_named(data: str, root: Path, split: str, *, download: bool) -> Source:
    """Open a split of a set that `is_named`; it is downloaded to `root` if it is not there and `download` allows it."""
    if split not in splits_of_named(data):
        raise ValueError(f"--data {data} has the splits train and test, not {split!r}.")
    if data == "digits":
        return _digits(split)
    with _one_at_a_time(root) if download else nullcontext():
        reader = _cifar if data in CIFAR_CONSTANTS else _medmnist
        return reader(data, root, split, download)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Let one process download at a time: those of torchrun start together, and so may commands of several seeds."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written to, or locked
            root.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(root / LOCK, "w"))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def survives_mirroring(data: str) -> bool:
    """Whether an image still shows its class when it is mirrored: not digits, letters and SVHN, judging by the name."""
    words = re.split(r"[^a-z]+", Path(data.removeprefix("hf:")).stem.lower())
    return "fashion" in words or not any(NOT_MIRRORED.fullmatch(word) for word in words)


def _digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32; every fifth of a class is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rank_in_class = np.empty(len(digits.target), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        rank_in_class[members] = np.arange(len(members))
    rows = np.flatnonzero((rank_in_class % 5 == 4) == (split == "test"))
    grey = np.rint(digits.images[rows] * (255.0 / 16.0)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in grey]
    labels = digits.target[rows].astype(np.int64)
    return Source("digits", split, labels, tuple("0123456789"), arrays=to_rgb(np.stack(large)))


def _cifar(name: str, root: Path, split: str, download: bool) -> Source:
    """torchvision's reader; it checks the archive's checksums, test files included, but decodes one split only."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        cifar = reader(root, train=split == "train", download=download)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError) as error:
        tried = "could not be" if download else "is not"
        raise ValueError(
            f"--data {name} is not under --data-root {root} and {tried} downloaded ({error}). "
            f"Unpack the archive there, or give a .npz file."
        ) from error
    labels = np.asarray(cifar.targets, dtype=np.int64)
    return Source(name, split, labels, tuple(cifar.classes), arrays=cifar.data, constants=CIFAR_CONSTANTS[name])


def _medmnist_parts(data: str) -> tuple[str, int] | None:
    """`pathmnist_64` as name and side in pixels; None for what is not of MedMNIST's two-dimensional sets."""
    name, _, size = data.partition("_")
    size = size or "28"
    return (name, int(size)) if name in MEDMNIST and size in map(str, MEDMNIST_SIZES) else None


def _medmnist(data: str, root: Path, split: str, download: bool) -> Source:
    """Through the package `medmnist`, which reads `root/pathmnist.npz` or downloads it."""
    name, size = _medmnist_parts(data)
    try:
        import medmnist
    except ImportError as error:
        raise ValueError(
            f"--data {data} needs the package medmnist: pip install medmnist, or give the set's .npz file."
        ) from error
    about = medmnist.INFO[name]
    there = (root / f"{data}.npz").exists()
    if download and not there:
        root.mkdir(parents=True, exist_ok=True)
    try:
        reader = getattr(medmnist, about["python_class"])
        found = reader(split=split, root=str(root), size=size, download=download and not there)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(f"--data {data} is not under --data-root {root} and could not be had ({error}).") from error
    names = tuple(about["label"][key] for key in sorted(about["label"], key=int))
    return Source(data, split, np.asarray(found.labels)[:, 0].astype(np.int64), names, arrays=to_rgb(found.imgs))

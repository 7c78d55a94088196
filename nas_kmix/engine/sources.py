"""Where images come from: digits, CIFAR through torchvision, `.npz` files and image folders.

`open_source` returns a `Source`: labels and class names in memory, pixels as one array (N, H, W, 3) or behind file
paths that `read` decodes one at a time. Only the named split is opened.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kmix.engine import files
from nas_kmix.engine.folders import SplitFolderError, list_images, meant_by, subfolders, unusable

# Whatever a file is called, only these are decoded: Pillow hands PostScript, for one, to a program of its own.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Another library version may decode a lossy file to other pixels, so it is recognised by its bytes.
LOSSY_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp"})
# The constants that the published training scripts use.
CIFAR_CONSTANTS = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}
Constants = tuple[tuple[float, ...], tuple[float, ...]]
Cut = Callable[[Image.Image], Image.Image]  # what to decode of a file that is only opened


class BadImageError(Exception):
    """A file that cannot be decoded; the message names it and the cause."""


@dataclass(frozen=True)
class Source:
    """One split before it is resized. Either `arrays` (N, H, W, 3) uint8 or `paths` below `folder` is set."""

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    arrays: np.ndarray | None = None
    folder: Path | None = None
    paths: tuple[str, ...] | None = None
    constants: Constants | None = None
    left_out: str = ""
    """What else lies in the class folders: how many files of which suffixes."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def part(self, indices: np.ndarray) -> Source:
        """These images alone, in this order."""
        if self.arrays is None:
            pixels: dict[str, Any] = {"paths": tuple(self.paths[index] for index in indices.tolist())}
        else:
            pixels = {"arrays": self.arrays[indices]}
        return replace(self, labels=self.labels[indices], **pixels)

    def place(self, index: int) -> str:
        """Where an image is in the set: its path below the folder, or its number."""
        return f"image {index}" if self.paths is None else self.paths[index]

    def describe(self, index: int) -> str:
        return self.place(index) if self.folder is None else str(self.folder / self.place(index))

    def read(self, index: int, cut: Cut | None = None) -> np.ndarray:
        """Native RGB pixels (H, W, 3), read-only; of a file, those of what `cut` takes of it. Raises BadImageError."""
        if self.arrays is not None:
            return self.arrays[index]
        path = os.path.join(self.folder, self.paths[index])
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.mode == "F" or image.mode.startswith("I"):
                    raise ValueError(f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
                part = image if cut is None else cut(image)
                return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
        except Exception as error:  # a damaged file may raise nearly anything
            raise BadImageError(f"{path}: {error or type(error).__name__}") from error

    def content(self, index: int) -> str:
        """16 hex digits of a hash of the image's RGB pixels, or of the file's bytes if its format is lossy.

        Bytes are not decoded, so a broken JPEG has a hash too. Raises BadImageError.
        """
        if self.paths is not None and Path(self.paths[index]).suffix.lower() in LOSSY_SUFFIXES:
            try:
                payload = (self.folder / self.paths[index]).read_bytes()
            except OSError as error:
                raise BadImageError(f"{self.folder / self.paths[index]}: {error.strerror}") from error
        else:
            pixels = np.ascontiguousarray(self.read(index))
            payload = f"{pixels.shape[0]}x{pixels.shape[1]} ".encode() + pixels.tobytes()
        return hashlib.blake2b(payload, digest_size=8).hexdigest()

    def native_sizes(self) -> Counter[tuple[int, int]]:
        """The number of images of each size (H, W). Reads file headers only; unreadable files are not counted."""
        if self.arrays is not None:
            return Counter({self.arrays.shape[1:3]: len(self.arrays)})
        sizes: Counter[tuple[int, int]] = Counter()
        for path in self.paths:
            try:
                with Image.open(self.folder / path, formats=IMAGE_FORMATS) as image:
                    sizes[image.height, image.width] += 1
            except Exception:  # a damaged file may raise nearly anything; `read` says what is wrong
                continue
        if not sizes:
            raise ValueError(f"{self.name}: no image can be read; repair the files. The first is {self.describe(0)}.")
        return sizes

    def identity(self) -> bytes:
        """Hash of the images: of their pixels, or of the files' names and sizes."""
        digest = hashlib.sha256()
        if self.arrays is not None:
            for pixels in self.arrays if self.arrays.dtype == object else (self.arrays,):
                digest.update(np.ascontiguousarray(pixels))
            return digest.digest()
        for path in self.paths:
            file = self.folder / path
            digest.update(f"{path} {file.stat().st_size if file.exists() else None}\n".encode())  # a broken link
        return digest.digest()


def open_source(data: str, root: Path, split: str, *, download: bool = True, own_classes: bool = False) -> Source:
    """Open `split` (train | val | test) of what `--data` names. Raises ValueError naming the path and the remedy.

    CIFAR is downloaded if it is not under `root` yet and `download` allows it. A folder's classes are those of its
    training images or, with `own_classes`, of the split.
    """
    if (data == "digits" or data in CIFAR_CONSTANTS) and split not in ("train", "test"):
        raise ValueError(f"--data {data} has the splits train and test, not {split!r}.")
    if data == "digits":
        return _digits(split)
    if data in CIFAR_CONSTANTS:
        return _cifar(data, root, split, download)
    path = Path(data)
    if path.suffix == ".npz":
        return _npz(path, split)
    if path.is_dir():
        return _folder(path, split, own_classes)
    raise _missing(data)


def _missing(data: str) -> ValueError:
    return ValueError(
        f"--data {data}: there is no such folder. Give digits, cifar10, cifar100, a folder with train/CLASS/* or a "
        f".npz file."
    )


def located(data: str) -> str:
    """`--data` for the record: the absolute path of a folder or file, so that it is found from another folder, too."""
    return data if data == "digits" or data in CIFAR_CONSTANTS else os.path.abspath(os.path.expanduser(data))


def splits_of(data: str) -> tuple[str, ...]:
    """Which of train, val and test `--data` has, as far as names tell; `open_source` says what is wrong with it.

    Raises ValueError where there is nothing of that name.
    """
    splits, path = ("train", "val", "test"), Path(data)
    if data == "digits" or data in CIFAR_CONSTANTS:
        return ("train", "test")
    if path.is_dir():
        return tuple(split for split in splits if (path / split).is_dir())
    if not path.exists():
        raise _missing(data)
    names = files.npz_names(path)
    return tuple(split for split in splits if f"{split}_images" in names)


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


def _npz(path: Path, split: str) -> Source:
    """MedMNIST's layout: `{split}_images` (N, H, W) or (N, H, W, 3) uint8, `{split}_labels` (N,) or (N, 1)."""
    wanted = (f"{split}_images", f"{split}_labels")
    try:
        arrays = files.read_npz(path, (*wanted, "class_names"))
    except ValueError as error:
        raise ValueError(f"--data {error}") from error
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"--data {path} lacks the array {missing[0]}; it has {', '.join(files.npz_names(path))}.")
    images, labels = (arrays[name] for name in wanted)
    names = arrays.get("class_names")
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not grey_or_rgb or 0 in images.shape[1:3]:
        raise ValueError(
            f"--data {path}: {split}_images must be uint8 (N, H, W) or (N, H, W, 3), not {images.dtype} {images.shape}."
        )
    labels = labels[:, 0] if labels.shape == (len(images), 1) else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or len(images) == 0:
        raise ValueError(
            f"--data {path}: {split}_labels must be {len(images)} integers, not {labels.dtype} {labels.shape}."
        )
    labels = labels.astype(np.int64)
    names = None if names is None else _class_names(path, names)
    # Without names every class must occur; otherwise a stray label in the millions would make as many classes.
    classes = len(np.unique(labels)) if names is None else len(names)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"--data {path}: {split}_labels must lie in [0, {classes}), the number of "
            f"{'different labels' if names is None else 'class_names'}; they run from {labels.min()} to {labels.max()}."
        )
    names = tuple(map(str, range(classes))) if names is None else names
    return Source(path.name, split, labels, names, arrays=to_rgb(images))


def _class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise ValueError(f"--data {path}: class_names must be a list of strings, not {names.dtype} {names.shape}.")
    try:
        found = tuple(name.decode() if isinstance(name, bytes) else name for name in names.tolist())
        "".join(found).encode()
    except ValueError as error:
        raise ValueError(f"--data {path}: class_names are not Unicode text ({error}); write them again.") from error
    if len(set(found)) < len(found):
        raise ValueError(f"--data {path}: class_names has a name twice; give every class its own.")
    return found


def _folder(folder: Path, split: str, own_classes: bool) -> Source:
    """`folder/split/CLASS/*`, classes and files in sorted order; the classes are those of `train` if it is there."""
    classes = folder / ("train" if (folder / "train").is_dir() and not own_classes else split)
    if not classes.is_dir():
        meant = meant_by(folder, classes.name)
        raise ValueError(f"--data {folder} has no subfolder {classes.name}; images belong in {classes}/CLASS/{meant}.")
    names = subfolders(classes)
    if not names:
        raise unusable(classes)
    unknown = sorted({*subfolders(folder / split)} - {*names}) if (folder / split).is_dir() else []
    if strays := list_images(folder, [f"{split}/{name}" for name in unknown]).paths:
        raise SplitFolderError(
            f"{folder / strays[0]} belongs to no class of {classes}; rename its folder, or remove it."
        )
    found = list_images(folder, [f"{split}/{name}" for name in names if (folder / split / name).is_dir()])
    if not found.paths:
        raise unusable(folder / split, found.left_out)
    there = np.flatnonzero([(folder / split / name).is_dir() for name in names])
    options = {"folder": folder, "paths": found.paths, "left_out": found.left_out}
    return Source(folder.resolve().name, split, there[found.labels], names, **options)


def open_class_folders(folder: Path) -> Source:
    """`folder/CLASS/*` without splits, as ImageNet-A and ImageNet-O are laid out. Raises ValueError naming the path."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    names = subfolders(folder)
    if "train" in names:
        raise ValueError(f"{folder} holds splits, not classes; name one of them, e.g. {folder / 'train'}.")
    found = list_images(folder, names)
    if not found.paths:
        raise unusable(folder, found.left_out)
    options = {"folder": folder, "paths": found.paths, "left_out": found.left_out}
    return Source(folder.resolve().name, "all", found.labels, names, **options)


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Greyscale (N, H, W) or (N, H, W, 1) is repeated to three channels."""
    images = images[..., None] if images.ndim == 3 else images
    return np.ascontiguousarray(images if images.shape[3] == 3 else images.repeat(3, axis=3))

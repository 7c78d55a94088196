"""Images and labels for every stage: `load_data` turns `--data` into one split, an `ImageData`.

An `ImageData` holds labels and class names and hands out batches of uint8 images (N, 3, S, S) on the device. A set that
fits in memory is one resident tensor; a larger image folder streams through a DataLoader. `sources` opens each kind of
data, `decoding` reads the files, and `bad_files` keeps track of those that cannot be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nas_kmix.engine import augment
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.datasets import open_source
from nas_kmix.engine.decoding import Decoder, Plan, decode_all, open_loader
from nas_kmix.engine.folders import say_left_out
from nas_kmix.engine.photographs import PhotoCrops
from nas_kmix.engine.sources import Source
from nas_kmix.engine.workers import check_room, read

CENTRE_SHARE = 0.875  # of the shorter side, for evaluation above 64 px: 224 of 256 pixels
CIFAR_STEM_LIMIT = 64  # pixels: up to here images keep their native size and networks start at full resolution


@dataclass(frozen=True)
class DataConfig:
    """Which images to read, and how."""

    data: str = "digits"
    """digits | cifar10 | cifar100 | a MedMNIST name, e.g. pathmnist | FOLDER with train/CLASS/* or CLASS/* |
    FILE.npz in MedMNIST's layout | hf:FOLDER, saved by Hugging Face's save_to_disk."""
    data_root: Path = Path("data")
    """Folder in which CIFAR and MedMNIST are looked for, and into which they are downloaded."""
    split_seed: int = 0
    """Seed by which a set without splits, such as a FOLDER with CLASS/*, is divided into train and test."""
    image_size: int | None = None
    """Side in pixels: resize the shorter side, crop the centre. Default: native up to 64 px; required above."""
    max_resident_gb: float = 4.0
    """A folder that decodes to more than this is streamed; scoring then draws partners from a pool."""
    max_bad_share: float = 0.1
    """Largest share of a split's files that may be unreadable; with more, the command stops."""

    def __post_init__(self):
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"--max-bad-share must lie in [0, 1], not {self.max_bad_share}.")
        if self.image_size is not None and self.image_size < 4:
            raise ValueError(f"--image-size {self.image_size} is too small; use 32 or more.")


class InputFormat(Protocol):
    """How to prepare images: like a training split, or like the images that a trained network has seen."""

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """images: uint8 (N, 3, S, S); labels: int64 (N,), both on the device; indices: int64 (N,), which rows they are."""

    images: Tensor
    labels: Tensor
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of labelled images. `images` is the resident tensor (N, 3, S, S), None where the set streams.

    mean, std: constants of `normalise`, per channel and in [0, 1]; empty if nothing is normalised. workers: processes
    that read a streamed set. bad: the unreadable files known so far.
    """

    source: Source
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    images: Tensor | None
    workers: int = 0
    resize: int | None = None
    """Side in pixels to which the shorter side is resized before the centre is cropped; default: `image_size`."""
    bad: BadFiles = field(default_factory=BadFiles)
    _loaders: dict[PhotoCrops | None, tuple[Plan, torch.utils.data.DataLoader]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __len__(self) -> int:
        return len(self.source.labels)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), class indices."""
        return self.source.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    @property
    def resident(self) -> bool:
        return self.images is not None

    @property
    def stem(self) -> str:
        """How a network should start on images of this size: `cifar` up to 64 px, `imagenet` above."""
        return _stem_for(self.image_size)

    @cached_property
    def _device_labels(self) -> Tensor:
        return torch.as_tensor(self.labels, device=self.device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what later stages depend on: labels, class names and pixels (of files: names and sizes)."""
        digest = hashlib.sha256(f"{self.image_size} {self.class_names}".encode())
        digest.update(self.labels.tobytes())
        digest.update(self.source.identity())
        return digest.hexdigest()

    def good(self) -> np.ndarray:
        """Indices of all images not known to be bad, ascending."""
        return np.setdiff1d(np.arange(len(self)), np.fromiter(self.bad, dtype=np.int64, count=len(self.bad)))

    def batches(
        self,
        index_batches: Iterable[np.ndarray],
        *,
        crops: PhotoCrops | None = None,
        epoch: int = 0,
        persistent: bool = False,
    ) -> Iterator[Batch]:
        """Read batches of indices in order. Bad files are left out; an empty batch is not skipped.

        With `crops`, a streamed set gives crops of whole photographs instead of their centres. If `persistent`, it
        keeps its worker processes for the next persistent pass with the same crops; such passes must not overlap.
        """
        if self.images is not None:
            for indices in index_batches:
                keep = indices if not self.bad else indices[~np.isin(indices, list(self.bad))]
                at = torch.as_tensor(keep, device=self.device)
                yield Batch(self.images.index_select(0, at), self._device_labels[at], keep)
            return
        kept = self._loaders.get(crops) if persistent else None
        plan, loader = kept or self._loader(crops, persistent)
        plan.batches = [[(index, epoch) for index in indices.tolist()] for indices in index_batches]
        # Other processes on the machine may hold theirs already, and check for themselves.
        check_room(max(map(len, plan.batches), default=0), self.image_size, self.workers, processes=1)
        for images, indices, failures in read(loader):
            self.bad.add(failures)
            images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
            yield Batch(images, self._device_labels[torch.as_tensor(indices, device=self.device)], indices)

    def _loader(self, crops: PhotoCrops | None, persistent: bool) -> tuple[Plan, torch.utils.data.DataLoader]:
        decoder = Decoder(self.source, self.image_size, self.resize, crops)
        pin_memory = self.device.type == "cuda"
        found = open_loader(decoder, workers=self.workers, pin_memory=pin_memory, persistent=persistent)
        if persistent:
            self._loaders[crops] = found
        return found

    def fetch(self, indices: np.ndarray) -> Batch:
        """Read one batch."""
        return next(self.batches([np.asarray(indices, dtype=np.int64)]))

    def normalise(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 to float32 with this set's published or measured constants; into `out` if given."""
        return augment.normalise(images, self.mean, self.std, out)


def load_data(
    config: DataConfig,
    *,
    split: str = "train",
    device: torch.device | str = "cpu",
    workers: int = 0,
    like: InputFormat | None = None,
    same_classes: bool = True,
    strict: bool = False,
) -> ImageData:
    """Load one split without reading any other.

    For another split than train, `like` is the training split or a trained classifier: the split takes its size and
    normalisation, may lack images of a class, and above 64 px takes the centres of larger images, 224 of 256 px. The
    classes must be the same unless `same_classes` is False. A `strict` set raises ValueError for an unreadable file,
    now or when it is reached. Raises ValueError for missing or malformed data, an empty or single class, too many
    unreadable files, and sizes that need `--image-size`.
    """
    options = {"own_classes": not same_classes, "split_seed": config.split_seed}
    source = open_source(config.data, config.data_root, split, **options)
    say_left_out(source.name, split, source.left_out)
    if like is None and source.num_classes < 2:
        raise ValueError(
            f"--data {config.data} has the single class {source.class_names[0]!r}; two or more are needed."
        )
    if like is None:
        _refuse_empty_class(source, source.labels, config, "add some, or leave the class out")
    elif same_classes and source.class_names != like.class_names:
        counts = source.num_classes, len(like.class_names)
        unnamed = source.name.endswith(".npz") and counts[0] != counts[1]
        remedy = "; name all classes in the archive's class_names" if unnamed else ""
        raise ValueError(
            f"--data {config.data}: the {split} images have other classes than the training images "
            f"({counts[0]} and {counts[1]}){remedy}."
        )
    size = _image_size(source, config) if like is None else like.image_size
    resize = wider(size) if like is not None else None
    bad, images = BadFiles(len(source.labels), config.max_bad_share, strict=strict), None
    if source.arrays is not None or len(source.labels) * 3 * size * size <= config.max_resident_gb * 1e9:
        images = decode_all(source, size, resize, threads=workers, bad=bad).to(device)
    data = ImageData(source, size, (), (), torch.device(device), images, workers, resize, bad)
    if like is not None:
        for _ in () if data.resident else augment.sampled(data, 1_000):
            pass  # those that cannot be read are found now, and not after an epoch of training
        return replace(data, mean=like.mean, std=like.std)
    mean, std = source.constants or augment.measure_constants(data)  # which finds unreadable files of streamed sets
    _refuse_empty_class(source, source.labels[data.good()], config, f"repair the files; the first is {bad.first()}")
    return replace(data, mean=mean, std=std)


def prepared_for_evaluation(data: ImageData, indices: np.ndarray) -> ImageData:
    """Images held out of a training split, prepared like a val split: above 64 px, as centres of larger images.

    The result holds only `indices`, renumbered from 0; up to 64 px, where nothing differs, it is `data` itself.
    """
    if data.stem == "cifar":
        return data
    source = replace(data.source.part(indices), split="val")
    bad, images = BadFiles(len(indices), data.bad.most, strict=data.bad.strict), None
    resize = wider(data.image_size)
    if data.resident:
        images = decode_all(source, data.image_size, resize, threads=data.workers, bad=bad).to(data.device)
    return replace(data, source=source, images=images, resize=resize, bad=bad)


def wider(size: int) -> int | None:
    """The side to which images are resized for evaluation before the centre crop; None up to 64 px."""
    return round(size / CENTRE_SHARE) if _stem_for(size) == "imagenet" else None


def open_data(config: DataConfig) -> ImageData:
    """Open the training split without decoding or downloading it, to look at single images (`fetch`).

    It has no normalisation. Raises ValueError if the data are gone.
    """
    source = open_source(config.data, config.data_root, "train", download=False, split_seed=config.split_seed)
    return ImageData(source, _image_size(source, config), (), (), torch.device("cpu"), None)


def _refuse_empty_class(source: Source, labels: np.ndarray, config: DataConfig, remedy: str) -> None:
    counts = np.bincount(labels, minlength=source.num_classes)
    if (counts == 0).any():
        name = source.class_names[int(counts.argmin())]
        raise ValueError(f"--data {config.data}: class {name!r} has no readable {source.split} images; {remedy}.")


def _stem_for(size: int) -> str:
    return "cifar" if size <= CIFAR_STEM_LIMIT else "imagenet"


def _image_size(source: Source, config: DataConfig) -> int:
    if config.image_size is not None:
        return config.image_size
    sizes = source.native_sizes()
    (height, width) = sizes.most_common(1)[0][0]
    if len(sizes) == 1 and height == width <= CIFAR_STEM_LIMIT:
        return height
    several = "of several sizes, often " if len(sizes) > 1 else ""
    raise ValueError(
        f"--data {config.data}: images are {several}{height}x{width}; only squares of one size up to "
        f"{CIFAR_STEM_LIMIT} px are taken as they are. Choose a side with --image-size."
    )

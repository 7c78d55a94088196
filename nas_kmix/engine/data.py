"""Images and labels for every stage: `load_data` turns `--data` into one split, an `ImageData`.

An `ImageData` holds labels and class names and hands out batches of uint8 images (N, 3, S, S) on the device. A set that
fits is one resident tensor; a larger image folder streams through a DataLoader. Where each kind of source comes from
is in `sources.py`; augmentation is in `augment.py`. A file that cannot be read is never replaced: its index goes to
`bad` with a sentence, and batches simply lack it.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from nas_kmix.engine import augment, sources
from nas_kmix.engine.photographs import PhotoTransform
from nas_kmix.engine.sources import BadImageError, Source

CENTRE_SHARE = 0.875  # of the shorter side that evaluation above 64 px looks at: 224 of 256 pixels
CIFAR_STEM_LIMIT = 64  # pixels: up to here images keep their native size and networks start at full resolution


@dataclass(frozen=True)
class DataConfig:
    """What to read and how it is augmented."""

    data: str = "digits"
    """digits | cifar10 | cifar100 | FOLDER with train/CLASS/* | FILE.npz in MedMNIST's layout."""
    data_root: Path = Path("data")
    """Where CIFAR is looked for and downloaded to."""
    image_size: int | None = None
    """Side in pixels: the shorter side is resized, the centre cropped. Native up to 64, required above."""
    flip: bool = True
    """Mirror training images at random. Digits and letters should not be."""
    crop_padding: int = 4
    """Random crop of images padded by so many pixels (up to 64 px; above, RandomResizedCrop is used)."""
    max_resident_gb: float = 4.0
    """A folder that decodes to more than this streams from its files; its scoring then uses a pool of partners."""

    def __post_init__(self):
        if self.image_size is not None and self.image_size < 4:
            raise ValueError(f"--image-size {self.image_size} is too small; 32 or more is sensible.")
        if self.crop_padding < 0:
            raise ValueError(f"--crop-padding must be 0 or more, not {self.crop_padding}.")


class Preparation(Protocol):
    """How images were prepared that others shall be like: a training split, or what a trained network has seen."""

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """images: uint8 (N, 3, S, S); labels: int64 (N,), both on the device; indices: int64 (N,), which rows they are."""

    images: Tensor
    labels: Tensor
    indices: np.ndarray


@dataclass
class ImageData:
    """One split of labelled images. `images` is the resident tensor (N, 3, S, S), None where the set streams."""

    source: Source
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    images: Tensor | None
    workers: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    """Indices of files that could not be read, each with a sentence; grows while a streamed set is read."""
    strict: bool = False
    """Raise ValueError at the first such file of a streamed set."""
    resize: int | None = None
    """Side in pixels to which the shorter side is resized before the centre is cropped; default: `image_size`."""
    _loaders: dict[PhotoTransform | None, tuple[_Plan, torch.utils.data.DataLoader]] = field(
        default_factory=dict, init=False, repr=False, compare=False
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
        return "cifar" if self.image_size <= CIFAR_STEM_LIMIT else "imagenet"

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
        transform: PhotoTransform | None = None,
        epoch: int = 0,
        persistent: bool = False,
    ) -> Iterator[Batch]:
        """Read the given batches of indices in order. Bad files are left out; an empty batch is not skipped.

        A streamed set gives crops of the whole photographs instead of their centres with a `transform`, and keeps its
        worker processes from one such pass to the next if `persistent`; passes of one kind then cannot overlap.
        """
        if self.images is not None:
            for indices in index_batches:
                keep = indices if not self.bad else indices[~np.isin(indices, list(self.bad))]
                at = torch.as_tensor(keep, device=self.device)
                yield Batch(self.images.index_select(0, at), self._device_labels[at], keep)
            return
        plan, loader = self._loaders.get(transform) or self._loader(transform, persistent)
        plan.batches = [[(index, epoch) for index in indices.tolist()] for indices in index_batches]
        for images, indices, failures in loader:
            self.bad.update(failures)
            if self.strict and failures:
                raise ValueError(f"{next(iter(failures.values()))}; repair or remove it, or go on with --skip-bad.")
            at = torch.as_tensor(indices, device=self.device)
            yield Batch(images.to(self.device, non_blocking=True), self._device_labels[at], indices)

    def _loader(self, transform: PhotoTransform | None, persistent: bool) -> tuple[_Plan, torch.utils.data.DataLoader]:
        plan = _Plan()
        loader = torch.utils.data.DataLoader(
            _Decoder(self.source, self.image_size, self.resize, transform),
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_main_process,
            pin_memory=self.device.type == "cuda",
            persistent_workers=persistent and self.workers > 0,
            generator=torch.Generator(),  # otherwise every pass would draw its workers' seeds from the global one
        )
        if persistent:
            self._loaders[transform] = plan, loader
        return plan, loader

    def fetch(self, indices: np.ndarray) -> Batch:
        """Read one batch."""
        return next(self.batches([np.asarray(indices, dtype=np.int64)]))

    def normalise(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 to float32 with this set's published or measured constants; into `out` if given."""
        return augment.normalise(images, self.mean, self.std, out)

    def content(self, index: int) -> str:
        """A short hash that recognises this image in another copy of the set (see `Source.content`)."""
        return self.source.content(index)


def load_data(
    config: DataConfig,
    *,
    split: str = "train",
    device: torch.device | str = "cpu",
    workers: int = 0,
    like: Preparation | None = None,
    same_classes: bool = True,
) -> ImageData:
    """Load one split; nothing of any other split is read.

    `like` is the training split where another one is loaded, or a trained classifier: its size and normalisation are
    taken over, a class may lack images, and above 64 px the centre of a larger image is taken, 224 of 256 px. It must
    have the `same_classes`, unless that is False. Raises ValueError (with the path and what to do) for missing or
    malformed data, an empty class, a single class, or sizes that need `--image-size`.
    """
    source = sources.open_source(config.data, config.data_root, split, own_classes=not same_classes)
    if like is None and source.num_classes < 2:
        raise ValueError(
            f"--data {config.data} has the single class {source.class_names[0]!r}; two or more are needed."
        )
    if like is None:
        _refuse_empty_class(source, source.labels, config, "add some, or remove the class")
    elif same_classes and source.class_names != like.class_names:
        counts = source.num_classes, len(like.class_names)
        remedy = (
            "; name all classes in the archive's class_names"
            if source.name.endswith(".npz") and counts[0] != counts[1]
            else ""
        )
        raise ValueError(
            f"--data {config.data}: the {split} images have other classes than the training images "
            f"({counts[0]} and {counts[1]}){remedy}."
        )
    size = _image_size(source, config) if like is None else like.image_size
    data = ImageData(source, size, (0.0,) * 3, (1.0,) * 3, torch.device(device), None, workers)
    if like is not None and data.stem == "imagenet":
        data.resize = round(size / CENTRE_SHARE)
    if source.arrays is not None or len(source.labels) * 3 * size * size <= config.max_resident_gb * 1e9:
        data.images = _decode_all(data).to(device)
    if like is not None:
        return replace(data, mean=like.mean, std=like.std)
    if data.resident:
        first_bad = next(iter(data.bad.values()), "")
        _refuse_empty_class(source, source.labels[data.good()], config, f"repair the files; the first is {first_bad}")
    mean, std = source.constants or _measure_constants(data)
    return replace(data, mean=mean, std=std)


def prepared_for_evaluation(data: ImageData, indices: np.ndarray) -> ImageData:
    """Images held out of a training split, prepared as the split val is: above 64 px, by the centres of larger ones.

    The result holds the `indices` alone, numbered from 0; up to 64 px, where nothing differs, it is `data` itself.
    """
    if data.stem == "cifar":
        return data
    source = replace(data.source.part(indices), split="val")
    part = replace(data, source=source, images=None, bad={}, resize=round(data.image_size / CENTRE_SHARE))
    if data.resident:
        part.images = _decode_all(part).to(data.device)
    return part


def open_data(config: DataConfig) -> ImageData:
    """The training split without decoding or downloading it, to look at single images (`fetch`).

    Nothing normalises them. Raises ValueError where the data are not there any more.
    """
    source = sources.open_source(config.data, config.data_root, "train", download=False)
    return ImageData(source, _image_size(source, config), (), (), torch.device("cpu"), None)


def _refuse_empty_class(source: Source, labels: np.ndarray, config: DataConfig, remedy: str) -> None:
    counts = np.bincount(labels, minlength=source.num_classes)
    if (counts == 0).any():
        name = source.class_names[int(counts.argmin())]
        raise ValueError(f"--data {config.data}: class {name!r} has no readable {source.split} images; {remedy}.")


def augment_batch(
    images: Tensor,
    data: ImageData,
    config: DataConfig,
    *,
    rng: np.random.Generator,
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    lighting: float = 0.0,
    cutout: int = 0,
) -> Tensor:
    """The training transform: crop (up to 64 px) or RandomResizedCrop, flip, normalise. uint8 in, float32 out.

    RandomResizedCrop acts on the centre square that every set is reduced to, not on the whole photograph. Colours are
    jittered before normalising; lighting acts, and Cutout blanks a square of so many pixels, after it; see `augment`.
    """
    if data.stem == "cifar":
        images = augment.random_crop(images, config.crop_padding, rng=rng)
    else:
        images = augment.random_resized_crop(images, rng=rng)
    if config.flip:
        images = augment.random_flip(images, rng=rng)
    if any(color_jitter):
        images = augment.color_jitter(images, color_jitter, rng=rng)
    return augment_pixels(data.normalise(images), data, rng=rng, lighting=lighting, cutout=cutout)


def augment_pixels(
    images: Tensor, data: ImageData, *, rng: np.random.Generator, lighting: float, cutout: int
) -> Tensor:
    """What is done to normalised images (N, 3, S, S): lighting, then Cutout."""
    if lighting:
        images = augment.lighting(images, lighting, data.std, rng=rng)
    return augment.cutout(images, cutout, rng=rng) if cutout else images


def epoch_batches(indices: np.ndarray, batch_size: int, steps: int, *, seed: tuple[int, ...]) -> list[np.ndarray]:
    """`steps` batches of a shuffled pass over `indices`, followed by further shuffled passes where it is short.

    A function of `seed` alone, e.g. (seed, stream, epoch). The last batch of a single pass may be smaller.
    """
    passes = math.ceil(((steps - 1) * batch_size + 1) / len(indices))
    rng = np.random.default_rng(list(seed))
    order = np.concatenate([rng.permutation(indices) for _ in range(passes)])
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


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


def _to_square(image: Tensor, size: int, resize: int | None) -> Tensor:
    """uint8 (3, H, W) to (3, size, size): the shorter side resized to `resize` or size, then the centre."""
    if resize is not None or image.shape[1:] != (size, size):
        image = TF.center_crop(TF.resize(image, resize or size, antialias=True), size)
    return image


class _Decoder(torch.utils.data.Dataset):
    """Reads single files for a DataLoader; a failure travels to the main process as a sentence."""

    def __init__(self, source: Source, size: int, resize: int | None, transform: PhotoTransform | None = None):
        self.source, self.size, self.resize, self.transform = source, size, resize, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Tensor | str]:
        """`item` is an index and the epoch that it is read in."""
        index, epoch = item
        try:
            image = torch.from_numpy(np.ascontiguousarray(self.source.read(index))).permute(2, 0, 1)
        except BadImageError as error:
            return index, str(error)
        if self.transform is not None:
            return index, self.transform(image, index, epoch).contiguous()
        return index, _to_square(image, self.size, self.resize).contiguous()


class _Plan:
    """What a DataLoader is to read, put in before each pass: batches of (index, epoch)."""

    def __init__(self):
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _collate(rows: list[tuple[int, Tensor | str]]) -> tuple[Tensor, np.ndarray, dict[int, str]]:
    good = [(index, image) for index, image in rows if not isinstance(image, str)]
    failures = {index: message for index, message in rows if isinstance(message, str)}
    images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return images, np.array([index for index, _ in good], dtype=np.int64), failures


def _leave_signals_to_main_process(worker: int) -> None:
    """Ctrl-C and job schedulers signal whole process groups. The main process finishes its step, for which it needs the
    workers, and then ends them; should it be killed, they notice and end themselves."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _decode_all(data: ImageData) -> Tensor:
    """All images as one tensor (N, 3, S, S); rows of bad files stay black and are named in `data.bad`."""
    native = data.source.arrays is not None and data.source.arrays.shape[1:3] == (data.image_size,) * 2
    if native and data.resize is None:
        return torch.from_numpy(data.source.arrays).permute(0, 3, 1, 2).contiguous()
    images = torch.zeros(len(data), 3, data.image_size, data.image_size, dtype=torch.uint8)
    decode = _Decoder(data.source, data.image_size, data.resize).__getitem__
    with ThreadPoolExecutor(max_workers=max(1, data.workers)) as pool:  # Pillow decodes outside Python's lock
        for index, image in pool.map(decode, ((index, 0) for index in range(len(data)))):
            if isinstance(image, str):
                data.bad[index] = image
            else:
                images[index] = image
    if len(data.bad) == len(data):
        raise ValueError(f"{data.source.name}: not one image can be read; repair the files. The first is {data.bad[0]}")
    return images


def _measure_constants(data: ImageData, sample: int = 20_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in [0, 1] over the images, at most `sample` evenly spaced ones."""
    indices = data.good()
    indices = indices[:: math.ceil(len(indices) / sample)]
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for batch in data.batches(np.array_split(indices, math.ceil(len(indices) / 256))):
        pixels = batch.images.cpu().to(torch.float64) / 255.0
        total += pixels.sum(dim=(0, 2, 3)).numpy()
        squares += pixels.square().sum(dim=(0, 2, 3)).numpy()
        count += pixels.numel() // 3
    if count == 0:
        first_bad = next(iter(data.bad.values()))
        raise ValueError(f"{data.source.name}: not one image can be read; repair the files. The first is {first_bad}")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A constant channel carries nothing; dividing by its zero deviation would make it carry NaN.
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())

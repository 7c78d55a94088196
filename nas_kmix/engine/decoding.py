"""From image files to uint8 tensors: all at once for a set that stays in memory, batch by batch for one that streams.

A `Source` in, squares (3, S, S) out. What cannot be decoded comes out as a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.photographs import PhotoTransform
from nas_kmix.engine.sources import BadImageError, Source
from nas_kmix.engine.workers import LOOK_EVERY, PREFETCH, prepare_worker, stacked


class Decoder(torch.utils.data.Dataset):
    """Reads single files; a failure reaches the main process as a sentence.

    The shorter side is resized to `resize` (default: `size`) and the centre cropped to `size`, unless `transform`
    crops the image.
    """

    def __init__(self, source: Source, size: int, resize: int | None, transform: PhotoTransform | None = None):
        self.source, self.size, self.resize, self.transform = source, size, resize, transform
        _torchvision()  # before worker processes start, each of which would import it again

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Tensor | str]:
        """`item` is (index, epoch)."""
        index, epoch = item
        try:
            image = torch.from_numpy(np.ascontiguousarray(self.source.read(index))).permute(2, 0, 1)
        except BadImageError as error:
            return index, str(error)
        if self.transform is not None:
            return index, self.transform(image, index, epoch).contiguous()
        return index, self._square(image).contiguous()

    def _square(self, image: Tensor) -> Tensor:
        if self.resize is not None or image.shape[1:] != (self.size, self.size):
            TF = _torchvision()
            image = TF.center_crop(TF.resize(image, self.resize or self.size, antialias=True), self.size)
        return image


def _torchvision() -> ModuleType:
    from torchvision.transforms.v2 import functional  # late, since it takes as long to import as torch itself

    return functional


def decode_all(source: Source, size: int, resize: int | None, *, threads: int, bad: BadFiles) -> Tensor:
    """All images as one tensor (N, 3, S, S); rows of bad files stay black. Raises ValueError if all are bad."""
    if source.arrays is not None and source.arrays.shape[1:3] == (size, size) and resize is None:
        return torch.from_numpy(source.arrays).permute(0, 3, 1, 2).contiguous()
    count = len(source.labels)
    images, failures = torch.zeros(count, 3, size, size, dtype=torch.uint8), {}
    decode = Decoder(source, size, resize).__getitem__
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:  # Pillow releases the GIL while it decodes
        for index, image in pool.map(decode, ((index, 0) for index in range(count))):
            if isinstance(image, str):
                failures[index] = image
            else:
                images[index] = image
    bad.add(failures)
    if len(failures) == count:
        raise ValueError(f"{source.name}: no image can be read; repair the files. The first is {bad.first()}")
    return images


class Plan:
    """The batches of (index, epoch) that a DataLoader reads, set before each pass."""

    def __init__(self):
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def open_loader(
    decoder: Decoder, *, workers: int, pin_memory: bool, persistent: bool
) -> tuple[Plan, torch.utils.data.DataLoader]:
    """A loader of (images (N, 3, S, S), indices (N,), sentences of bad files by index), and the plan that it reads."""
    plan = Plan()
    loader = torch.utils.data.DataLoader(
        decoder,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=prepare_worker,
        prefetch_factor=PREFETCH if workers > 0 else None,
        timeout=LOOK_EVERY if workers > 0 else 0,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator(),  # otherwise every pass would draw its workers' seeds from the global one
    )
    return plan, loader


def _collate(rows: list[tuple[int, Tensor | str]]) -> tuple[Tensor, np.ndarray, dict[int, str]] | str:
    """A sentence where a worker has no room for the batch."""
    good = [(index, image) for index, image in rows if not isinstance(image, str)]
    failures = {index: message for index, message in rows if isinstance(message, str)}
    images = stacked([image for _, image in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    if isinstance(images, str):
        return images
    return images, np.array([index for index, _ in good], dtype=np.int64), failures

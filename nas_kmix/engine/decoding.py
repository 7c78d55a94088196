"""From image files to uint8 tensors: all at once for a set that stays in memory, batch by batch for one that streams.

A `Source` in, squares out. What cannot be decoded comes out as a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.photographs import PhotoCrops
from nas_kmix.engine.sources import BadImageError, Cut, Source
from nas_kmix.engine.workers import LOOK_EVERY, PREFETCH, empty_batch, prepare_worker

TOGETHER = 8  # crops decoded before they are resized; in turn, either would find the caches full of the other's data


class Decoder(torch.utils.data.Dataset):
    """Reads batches of files; a failure reaches the main process as a sentence.

    The shorter side is resized to `resize` (default: `size`) and the centre cropped to `size`, unless there are `crops`
    to be cut.
    """

    def __init__(self, source: Source, size: int, resize: int | None, crops: PhotoCrops | None = None):
        self.source, self.size, self.resize, self.crops = source, size, resize, crops
        _torchvision()  # before worker processes start, each of which would import it again

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> tuple[Tensor, np.ndarray, dict[int, str]] | str:
        """Of (index, epoch): images (N, S, S, 3), indices (N,), and sentences of bad files by index.

        It is a sentence alone where a worker has no room for the batch.
        """
        images = empty_batch(len(items), self.size, self.size, 3)
        if isinstance(images, str):
            return images
        good, failures, together = [], {}, 1 if self.crops is None else TOGETHER
        for start in range(0, len(items), together):
            for index, square in self.squares(items[start : start + together]):
                if isinstance(square, str):
                    failures[index] = square
                else:
                    images[len(good)] = square.permute(1, 2, 0)
                    good.append(index)
        return images[: len(good)], np.array(good, dtype=np.int64), failures

    def squares(self, items: Sequence[tuple[int, int]]) -> list[tuple[int, Tensor | str]]:
        """Of each (index, epoch), the index and uint8 (3, S, S) or a sentence. All are held at native size at once."""
        cuts = [None if self.crops is None else partial(self.crops.cut, draws=self.crops.draw(*item)) for item in items]
        pixels = [(index, self._read(index, cut)) for (index, _), cut in zip(items, cuts, strict=True)]
        return [(index, part if isinstance(part, str) else self._square(part)) for index, part in pixels]

    def _read(self, index: int, cut: Cut | None) -> np.ndarray | str:
        try:
            return self.source.read(index, cut)
        except BadImageError as error:
            return str(error)

    def _square(self, pixels: np.ndarray) -> Tensor:
        if self.crops is not None:
            return self.crops.resize(pixels)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
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
    decoder = Decoder(source, size, resize)
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:  # Pillow releases the GIL while it decodes
        for ((index, image),) in pool.map(decoder.squares, ([(index, 0)] for index in range(count))):
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
    """A loader of (images (N, S, S, 3), indices (N,), sentences of bad files by index), and the plan that it reads."""
    plan = Plan()
    loader = torch.utils.data.DataLoader(
        decoder,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=prepare_worker,
        prefetch_factor=PREFETCH if workers > 0 else None,
        timeout=LOOK_EVERY if workers > 0 else 0,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator(),  # otherwise every pass would draw its workers' seeds from the global one
    )
    return plan, loader


def _as_is(batch: Any) -> Any:
    """The decoder makes whole batches."""
    return batch

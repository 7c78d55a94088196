"""A split of labelled images before it is resized: labels and class names in memory, pixels in an array or in files.

`datasets` opens one; `decoding` makes tensors of it.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kmix.engine.folders import composed
from nas_kmix.engine.pixels import rgb_of

# Whatever a file is called, only these are decoded: Pillow hands PostScript, for one, to a program of its own.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Another library version may decode a lossy file to other pixels, so it is recognised by its bytes.
LOSSY_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp"})
Constants = tuple[tuple[float, ...], tuple[float, ...]]
Cut = Callable[[Image.Image], Image.Image]  # what to decode of a file that is only opened


class BadImageError(Exception):
    """A file that cannot be decoded; the message names it and the cause."""


@dataclass(frozen=True)
class Source:
    """One split before it is resized.

    Its pixels are in `arrays` (N, H, W, 3) uint8; or in files, at `paths` below `folder`, or `encoded` under the names
    `paths`.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    arrays: np.ndarray | None = None
    folder: Path | None = None
    paths: tuple[str, ...] | None = None
    encoded: Sequence[bytes] | None = None
    constants: Constants | None = None
    left_out: str = ""
    """What else lies in the class folders: how many files of which suffixes."""
    note: str = ""
    """How a set that has no splits of its own was divided."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def part(self, indices: np.ndarray) -> Source:
        """These images alone, in this order."""
        if self.arrays is None:
            pixels: dict[str, Any] = {"paths": tuple(self.paths[index] for index in indices.tolist())}
            if self.encoded is not None:
                pixels["encoded"] = self.encoded[indices]
        else:
            pixels = {"arrays": self.arrays[indices]}
        return replace(self, labels=self.labels[indices], **pixels)

    def place(self, index: int) -> str:
        """Where an image is in the set: its path below the folder, or its number."""
        return f"image {index}" if self.paths is None else self.paths[index]

    def describe(self, index: int) -> str:
        return self.place(index) if self.folder is None else str(self.folder / self.place(index))

    def read(self, index: int, cut: Cut | None = None) -> np.ndarray:
        """Native RGB pixels (H, W, 3), read-only, transparent ones on white; of a file, those that `cut` takes of it.

        Raises BadImageError.
        """
        if self.arrays is not None:
            return self.arrays[index]
        try:
            with Image.open(self._file(index), formats=IMAGE_FORMATS) as image:
                if image.mode == "F" or image.mode.startswith("I"):
                    raise ValueError(f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
                return rgb_of(image if cut is None else cut(image))
        except MemoryError:  # no fault of the file
            raise
        except Exception as error:  # a damaged file may raise nearly anything
            raise BadImageError(f"{self.describe(index)}: {error or type(error).__name__}") from error

    def _file(self, index: int) -> Path | io.BytesIO:
        return self.folder / self.paths[index] if self.encoded is None else io.BytesIO(self.encoded[index])

    def content(self, index: int) -> str:
        """16 hex digits of a hash of the image's RGB pixels, or of the file's bytes if its format is lossy.

        Bytes are not decoded, so a broken JPEG has a hash too. Raises BadImageError.
        """
        if self.paths is not None and Path(self.paths[index]).suffix.lower() in LOSSY_SUFFIXES:
            try:
                file = self._file(index)
                payload = file.read_bytes() if isinstance(file, Path) else file.getvalue()
            except OSError as error:
                raise BadImageError(f"{self.describe(index)}: {error.strerror}") from error
        else:
            pixels = np.ascontiguousarray(self.read(index))
            payload = f"{pixels.shape[0]}x{pixels.shape[1]} ".encode() + pixels.tobytes()
        return hashlib.blake2b(payload, digest_size=8).hexdigest()

    def native_sizes(self) -> Counter[tuple[int, int]]:
        """The number of images of each size (H, W). Reads file headers only; unreadable files are not counted."""
        if self.arrays is not None:
            return Counter({self.arrays.shape[1:3]: len(self.arrays)})
        sizes: Counter[tuple[int, int]] = Counter()
        for index in range(len(self.paths)):
            try:
                with Image.open(self._file(index), formats=IMAGE_FORMATS) as image:
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
        for index, path in enumerate(self.paths):
            if self.encoded is None:
                file = self.folder / path
                size = file.stat().st_size if file.exists() else None  # a broken link
            else:
                size = len(self.encoded[index])
            digest.update(f"{composed(path)} {size}\n".encode())
        return digest.digest()

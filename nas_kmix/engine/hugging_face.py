"""Data sets of Hugging Face's `datasets` on the disk, as `Dataset.save_to_disk` leaves them.

The package is needed only here: pip install datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas_kmix.engine import files
from nas_kmix.engine.folders import SplitFolderError
from nas_kmix.engine.sources import Source
from nas_kmix.engine.undivided import divided

ALIASES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
LABEL_COLUMNS = ("label", "labels", "fine_label")  # in this order, where several columns hold classes


class Encoded(Sequence[bytes]):
    """The files of a table's single column of images, read one by one; an array of indices gives a part of them."""

    def __init__(self, table: Any, rows: np.ndarray):
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray):
            return Encoded(self._table, self._rows[index])
        (image,) = self._table[int(self._rows[index])].values()
        if image is None:
            return b""  # which cannot be decoded
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def is_single(folder: Path) -> bool:
    """Whether the data set is a single split, which is then divided."""
    return (folder / "state.json").is_file()


def splits_of(folder: Path) -> tuple[str, ...]:
    """Those of train, val and test that the data set has, or that it is divided into."""
    if is_single(folder):
        return ("train", "test")
    try:
        there = files.read_json(folder / "dataset_dict.json")["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--data hf:{folder} is not a folder that Hugging Face's save_to_disk has written ({error})."
        ) from error
    return tuple(split for split, names in ALIASES.items() if set(names) & set(there))


def open_split(folder: Path, split: str, split_seed: int) -> Source:
    """A split, its images still encoded. Raises ValueError naming the folder and the remedy."""
    there = splits_of(folder)
    if split not in there:
        raise ValueError(f"--data hf:{folder} has the splits {', '.join(there)}, not {split!r}.")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--data hf:{folder} needs the package datasets: pip install datasets.") from error
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        table = found[next(name for name in ALIASES[split] if name in found)]
        return _source(datasets, table, folder, split)
    whole = _source(datasets, found, folder, split)
    rows = [str(row) for row in range(len(whole.labels))]
    return divided(whole, rows, split, split_seed, f"--data hf:{folder}")


def _source(datasets: Any, table: Any, folder: Path, split: str) -> Source:
    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [name for name in LABEL_COLUMNS if name in labels] or labels
    if len(images) != 1 or not labels:
        raise ValueError(
            f"--data hf:{folder}: one column of images and one of class labels are needed, not {', '.join(features)}; "
            f"cast them with cast_column to datasets.Image and datasets.ClassLabel."
        )
    found = list(table[labels[0]])
    classes = np.array([-1 if label is None else label for label in found], dtype=np.int64)
    if classes.min(initial=0) < 0:
        raise SplitFolderError(f"hf:{folder}: the {split} images have no labels.")
    files_alone = table.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    encoded = Encoded(files_alone, np.arange(len(classes)))
    paths = tuple(f"{split}-{index:06}{_suffix(encoded, index)}" for index in range(len(encoded)))
    options = {"folder": folder, "paths": paths, "encoded": encoded}
    return Source(folder.resolve().name, split, classes, tuple(features[labels[0]].names), **options)


def _suffix(encoded: Encoded, index: int) -> str:
    """By what the file holds: whether its format is lossy tells how it is recognised."""
    try:
        file = encoded[index]
    except OSError:  # said when the image is read
        return ".png"
    if file[:2] == b"\xff\xd8":
        return ".jpg"
    return ".webp" if file[8:12] == b"WEBP" else ".png"

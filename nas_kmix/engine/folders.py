"""What belongs to an image folder: its class folders, their images, and how many other files were left out.

Hidden entries and what operating systems leave in folders are ignored at every level. Linked folders are followed.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from nas_kmix.engine.distributed import is_main
from nas_kmix.engine.progress import Progress

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff"})
# Some hold copies of the images: __MACOSX of archives made on a Mac, @eaDir of a network disk.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
LOOK_ALIKES = {
    "train": frozenset({"train", "training", "trains", "trn"}),
    "val": frozenset({"val", "valid", "validation", "validate", "vals", "dev", "eval"}),
    "test": frozenset({"test", "testing", "tests", "tst"}),
}


class SplitFolderError(ValueError):
    """A split's folder is not made of class folders with images; the message names it."""


@dataclass(frozen=True)
class Listing:
    """paths: images, sorted, relative to the data's folder; labels: int64, one for each; left_out: counts of
    the other files, e.g. `8 files: 5 .gif, 3 without suffix`, or empty.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    left_out: str


def composed(name: str) -> str:
    """The name in Unicode's form NFC, where a letter and its accent are one character; Macs may write two."""
    return unicodedata.normalize("NFC", name)


def subfolders(folder: Path) -> tuple[str, ...]:
    """Their names, sorted in their composed form. Raises ValueError if two have the same."""
    names = sorted((p.name for p in folder.iterdir() if not _ignored(p.name) and p.is_dir()), key=composed)
    for one, other in pairwise(names):
        if composed(one) == composed(other):
            raise ValueError(
                f"{folder} holds the folders {one!a} and {other!a}, whose names look alike; merge or rename one."
            )
    return tuple(names)


def list_images(folder: Path, classes: Iterable[str]) -> Listing:
    """The images at any depth below each class's subfolder; the labels are the classes' numbers."""
    paths, labels, others = [], [], Counter()
    classes = tuple(classes)
    for label, name in enumerate(classes):
        found = []
        _walk(folder / name, Path(name), (), found, others)
        found.sort(key=lambda path: [composed(part) for part in path.parts])
        paths += [path.as_posix() for path in found]
        labels += [label] * len(found)
    for path in paths:
        kinds = set() if path.isprintable() else set(map(unicodedata.category, path))
        if kinds & {"Cs", "Cc"}:  # surrogates are how Python shows bytes that are no UTF-8
            reason = "that is not Unicode text" if "Cs" in kinds else "with a control character"
            raise ValueError(f"{folder} holds {path!a}, a name {reason}; rename that file or folder.")
    for parent in sorted({(folder / name).parent for name in classes}):
        if count := len(loose_images(parent)):
            others["images beside the class folders"] += count
    return Listing(tuple(paths), np.array(labels, dtype=np.int64), _told(others))


def annotated(folder: Path, split: str) -> dict[str, str]:
    """The images of `folder/val/images` and their classes, if `folder/val/val_annotations.txt` lists them.

    By paths below `folder`, sorted; so Tiny-ImageNet has its validation images. Empty without such a list, or where the
    images have been moved to class folders.
    """
    listing = folder / split / f"{split}_annotations.txt"
    if not listing.is_file() or not any((folder / split / "images").glob("*")):
        return {}
    try:
        rows = [line.split("\t") for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SplitFolderError(f"{listing} is not UTF-8 text ({error}); save it as such.") from error
    if not rows or any(len(row) < 2 for row in rows):
        raise SplitFolderError(f"{listing} must hold lines of a file name, a tab and a class.")
    return {f"{split}/images/{name}": label for name, label, *_ in sorted(rows)}


def loose_images(folder: Path) -> list[Path]:
    """Images directly in the folder, which belong to no class."""
    return sorted(p for p in folder.iterdir() if _is_image(p.name) and not _ignored(p.name) and p.is_file())


def look_alikes(folder: Path, split: str) -> list[str]:
    """Subfolders that somebody may have meant by `split`, but that are not called so."""
    return [name for name in subfolders(folder) if name != split and name.lower() in LOOK_ALIKES[split]]


def meant_by(folder: Path, split: str) -> str:
    """A clause that names such subfolders, empty where there are none."""
    names = look_alikes(folder, split)
    return f"; {folder / names[0]} is not read, rename it to {split} if it is meant" if names else ""


def unusable(split: Path, left_out: str = "") -> SplitFolderError:
    """Says what is wrong with the folder of a split."""
    if not split.is_dir():
        meant = meant_by(split.parent, split.name) if split.name in LOOK_ALIKES and split.parent.is_dir() else ""
        return SplitFolderError(f"{split} holds no images: there is no such folder{meant}.")
    if loose := loose_images(split):
        return SplitFolderError(
            f"{split} has images but not in class folders, e.g. {loose[0].name}; images belong in {split}/CLASS/"
            f"{f', and a class called {split.name} needs another name' if split.name in LOOK_ALIKES else ''}."
        )
    if not subfolders(split):
        return SplitFolderError(f"{split} has no class folders; images belong in {split}/CLASS/.")
    others = f"; it has {left_out}" if left_out else ""
    return SplitFolderError(f"{split} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){others}.")


def say_left_out(name: str, split: str, left_out: str) -> None:
    """Say what lies in the class folders of a split and is not read."""
    if left_out and is_main():
        Progress.say(f"{name}, {split}: left out {left_out}")


def _walk(folder: Path, relative: Path, above: tuple[str, ...], found: list[Path], others: Counter[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _ignored(entry.name):
                continue
            if entry.is_dir():
                _walk(folder / entry.name, relative / entry.name, (*above, real), found, others)
            elif not entry.is_file() and os.path.exists(entry.path):
                others["special files"] += 1  # who opens a pipe waits for ever
            elif _is_image(entry.name):  # a broken link, too: it is a file that cannot be read
                found.append(relative / entry.name)
            else:
                others[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _told(others: Counter[str]) -> str:
    """`8 files: 5 .gif, 3 without suffix`, or nothing."""
    if not others:
        return ""
    kinds = [f"{count} {kind}" for kind, count in others.most_common(6)]
    more = ", …" if len(others) > len(kinds) else ""
    return f"{others.total()} file{'s' if others.total() > 1 else ''}: {', '.join(kinds)}{more}"

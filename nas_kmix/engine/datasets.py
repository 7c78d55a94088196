"""From `--data` to a `Source`: named sets, `.npz` files, image folders of several layouts, Hugging Face data sets.

Only the split that is asked for is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from nas_kmix.engine import files, hugging_face
from nas_kmix.engine.folders import (
    LOOK_ALIKES,
    SplitFolderError,
    annotated,
    composed,
    list_images,
    meant_by,
    subfolders,
    unusable,
)
from nas_kmix.engine.named_sets import is_named, open_named, splits_of_named
from nas_kmix.engine.pixels import to_rgb
from nas_kmix.engine.sources import Source
from nas_kmix.engine.undivided import divided

HUGGING_FACE = "hf:"


def open_source(
    data: str, root: Path, split: str, *, download: bool = True, own_classes: bool = False, split_seed: int = 0
) -> Source:
    """Open `split` (train | val | test) of what `--data` names. Raises ValueError naming the path and the remedy.

    A named set is downloaded if it is not under `root` yet and `download` allows it. A folder's classes are those of
    its training images or, with `own_classes`, of the split. A set without splits is divided by `split_seed`.
    """
    if is_named(data):
        return open_named(data, root, split, download=download)
    if data.startswith(HUGGING_FACE):
        return hugging_face.open_split(Path(data.removeprefix(HUGGING_FACE)), split, split_seed)
    path = Path(data)
    if path.suffix == ".npz":
        return _npz(path, split)
    if path.is_dir():
        return _without_splits(path, split, split_seed) if is_flat(path) else _folder(path, split, own_classes)
    raise _missing(data)


def _missing(data: str) -> ValueError:
    what = "this is no folder" if os.path.exists(data) else "there is no such folder"
    return ValueError(
        f"--data {data}: {what}. Give digits, cifar10, cifar100, a name of MedMNIST, a folder with "
        f"train/CLASS/* or CLASS/*, a .npz file, or hf:FOLDER."
    )


def located(data: str) -> str:
    """`--data` for the record: the absolute path of a folder or file, so that it is found from another folder, too."""
    if is_named(data):
        return data
    kind = HUGGING_FACE if data.startswith(HUGGING_FACE) else ""
    return kind + os.path.abspath(os.path.expanduser(data.removeprefix(kind)))


def is_divided(data: str) -> bool:
    """Whether --data is there without splits, so that `split_seed` divides it."""
    if data.startswith(HUGGING_FACE):
        return hugging_face.is_single(Path(data.removeprefix(HUGGING_FACE)))
    return not is_named(data) and Path(data).is_dir() and is_flat(Path(data))


def splits_of(data: str) -> tuple[str, ...]:
    """Which of train, val and test `--data` has, as far as names tell; `open_source` says what is wrong with it.

    Raises ValueError where there is nothing of that name.
    """
    splits, path = ("train", "val", "test"), Path(data)
    if is_named(data):
        return splits_of_named(data)
    if data.startswith(HUGGING_FACE):
        return hugging_face.splits_of(Path(data.removeprefix(HUGGING_FACE)))
    if path.is_dir():
        return ("train", "test") if is_flat(path) else tuple(split for split in splits if (path / split).is_dir())
    if not path.exists():
        raise _missing(data)
    names = files.npz_names(path)
    return tuple(split for split in splits if f"{split}_images" in names)


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
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or len(images) == 0:
        raise ValueError(
            f"--data {path}: {split}_labels must be {len(images)} integers, not {labels.dtype} {labels.shape}."
        )
    labels = labels.astype(np.int64)
    if names is not None:
        names = _class_names(path, names)
    # Without names every class must occur; otherwise a stray label in the millions would make as many classes.
    classes = len(np.unique(labels)) if names is None else len(names)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"--data {path}: {split}_labels must lie in [0, {classes}), the number of "
            f"{'different labels' if names is None else 'class_names'}; they run from {labels.min()} to {labels.max()}"
            f"{'. If some classes have no image here, add an array class_names' if names is None else ''}."
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


def is_flat(folder: Path) -> bool:
    """Whether the folder holds class folders with images, CLASS/*, and nothing that is meant as a split."""
    names = subfolders(folder)
    meant = any(name.lower() in alike for name in names for alike in LOOK_ALIKES.values())
    return not meant and any(list_images(folder, [name]).paths for name in names)


def check_run_folder(out: Path, data: str) -> None:
    """Raise ValueError for a run folder that would be taken for a class of --data."""
    folder = Path(data)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()) and is_flat(folder):
        raise ValueError(f"--out {out} lies in --data {data}, whose folders are its classes; choose another --out.")


def _without_splits(folder: Path, split: str, split_seed: int) -> Source:
    """`folder/CLASS/*`, of which a share of every class is the test split."""
    names, name = subfolders(folder), folder.resolve().name
    found = list_images(folder, names)
    options = {"folder": folder, "paths": found.paths, "left_out": found.left_out}
    whole = Source(name, split, found.labels, tuple(map(composed, names)), **options)
    return divided(whole, found.paths, split, split_seed, f"--data {folder}")


def _folder(folder: Path, split: str, own_classes: bool) -> Source:
    """`folder/split/CLASS/*`, classes and files in sorted order; the classes are those of `train` if it is there.

    Or, as in Tiny-ImageNet, `folder/val/images/*` with their classes in `folder/val/val_annotations.txt`.
    """
    listed = annotated(folder, split)
    classes = folder / ("train" if (folder / "train").is_dir() and not own_classes else split)
    if not classes.is_dir():
        meant = meant_by(folder, classes.name)
        raise ValueError(f"--data {folder} has no subfolder {classes.name}; images belong in {classes}/CLASS/{meant}.")
    listed_alone = listed and classes.name == split
    names = tuple(map(composed, sorted(set(listed.values())) if listed_alone else subfolders(classes)))
    if not names:
        raise unusable(classes)
    if listed:
        return _annotated(folder, split, names, {path: composed(name) for path, name in listed.items()})
    there = {composed(name): name for name in subfolders(folder / split)} if (folder / split).is_dir() else {}
    unknown = [there[name] for name in sorted(there.keys() - {*names})]
    if strays := list_images(folder, [f"{split}/{name}" for name in unknown]).paths:
        raise SplitFolderError(
            f"{folder / strays[0]} belongs to no class of {classes}; rename its folder, or keep it elsewhere."
        )
    found = list_images(folder, [f"{split}/{there[name]}" for name in names if name in there])
    if not found.paths:
        raise unusable(folder / split, found.left_out)
    numbers = np.flatnonzero([name in there for name in names])
    options = {"folder": folder, "paths": found.paths, "left_out": found.left_out}
    return Source(folder.resolve().name, split, numbers[found.labels], names, **options)


def _annotated(folder: Path, split: str, names: tuple[str, ...], listed: dict[str, str]) -> Source:
    """The images that a list names, by path, with their classes."""
    if unknown := sorted(set(listed.values()) - set(names)):
        raise SplitFolderError(
            f"{folder / split} lists images of the class {unknown[0]}, which is no class of the training images."
        )
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[name] for name in listed.values()], dtype=np.int64)
    return Source(folder.resolve().name, split, labels, names, folder=folder, paths=tuple(listed))


def open_class_folders(folder: Path) -> Source:
    """`folder/CLASS/*` without splits, as ImageNet-A and ImageNet-O are laid out. Raises ValueError naming the path."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'this is no folder' if folder.exists() else 'there is no such folder'}.")
    names = subfolders(folder)
    if "train" in names:
        raise ValueError(f"{folder} holds splits, not classes; name one of them, e.g. {folder / 'train'}.")
    found = list_images(folder, names)
    if not found.paths:
        raise unusable(folder, found.left_out)
    options = {"folder": folder, "paths": found.paths, "left_out": found.left_out}
    return Source(folder.resolve().name, "all", found.labels, tuple(map(composed, names)), **options)

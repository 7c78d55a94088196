"""Which classifiers an analysis reads, and on which images: the RUNs and the data flags of its command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from nas_kmix.analysis.classifiers import Classifier, load_classifier
from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, ImageData, load_data, open_data
from nas_kmix.engine.datasets import HUGGING_FACE, is_divided, located, splits_of
from nas_kmix.engine.distributed import is_main
from nas_kmix.engine.named_sets import is_named
from nas_kmix.engine.progress import Progress

SUBSET = 1  # random stream: which images are taken


@dataclass(frozen=True)
class InputConfig:
    """Images to analyse the networks on."""

    data: str | None = None
    """Data set, as in a training. Default: the one in the config.json beside the first RUN's checkpoint."""
    data_root: Path = Path("data")
    """Folder in which CIFAR is looked for, and into which it is downloaded."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Split to use; auto: test if there is one, else val."""
    images: int = 1000
    """Number of images, drawn by the seed; 0 takes all."""
    max_bad_share: float = 0.1
    """Largest share of the files that may be unreadable; with more, the command stops."""

    def __post_init__(self):
        if self.images < 0:
            raise ValueError(f"--images must be 0 or more, not {self.images}.")


def checkpoint_of(run: Path) -> Path:
    """The file that RUN stands for: itself, or a folder's network after the last epoch.

    Raises ValueError where there is none, or where its training is not finished.
    """
    if not run.is_dir():
        return run
    if (run / "last.pt").exists():
        if not (run / "result.json").exists():
            raise ValueError(f"{run} holds an unfinished training; finish it, or name {run / 'last.pt'} itself.")
        return run / "last.pt"
    if (run / "scorer.pt").exists():
        return run / "scorer.pt"
    raise ValueError(f"{run} holds neither last.pt nor scorer.pt; name a run folder or a checkpoint.")


def open_runs(runs: Sequence[Path]) -> dict[str, Classifier]:
    """The classifiers by the names that figures and tables give them: a folder's name, or `folder-file`.

    Raises ValueError for no run, for two of one name, and for networks that take other classes or sizes.
    """
    if not runs:
        raise ValueError("Name at least one RUN: the folder of a training, or a checkpoint.")
    found: dict[str, Classifier] = {}
    for i, run in enumerate(runs):
        path = run.resolve()
        name = path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
        if run in runs[:i]:
            raise ValueError(f"{run} is named twice.")
        if name in found:
            raise ValueError(f"{run} and {found[name].path} would both be called {name}; rename a folder.")
        found[name] = load_classifier(checkpoint_of(run))
    first, *others = found.values()
    for other in others:
        check_same_task(first, other)
    return found


def check_same_task(first: Classifier, second: Classifier) -> None:
    """Raise ValueError unless both networks have the same classes and image size."""
    if (first.class_names, first.image_size) != (second.class_names, second.image_size):
        raise ValueError(
            f"{first.path} and {second.path} were trained on other classes or image sizes; compare them one by one."
        )


def load_images(
    config: InputConfig, like: Classifier, *others: Classifier, device: torch.device, workers: int
) -> ImageData:
    """The split to analyse `like` and `others` on, at the image size and in the normalisation of `like`.

    Raises ValueError.
    """
    recorded = recorded_input(like.path)
    data, split_seed = (located(config.data) if config.data else _data_here(recorded, like.path)), recorded.split_seed
    split = config.split
    if split == "auto":
        split = next((name for name in ("test", "val") if name in splits_of(data)), None)
        if split is None:
            raise ValueError(f"--data {data} has neither val nor test images; choose --split train to use those.")
    options = {"split_seed": split_seed, "image_size": like.image_size, "max_bad_share": config.max_bad_share}
    chosen = DataConfig(data=data, data_root=config.data_root, **options)
    for network in (like, *others) if split == "test" else ():
        warn_of_training_images(chosen, network)
    return like.prepare(load_data(chosen, split=split, device=device, workers=workers, like=like))


def warn_of_training_images(config: DataConfig, like: Classifier) -> None:
    """Say if a set without splits has other training images than the network had, as after files were added.

    It is taken for the set that the network was trained on if the run's record names this folder, or if the recorded
    data are gone and the classes are the same.
    """
    if like.fingerprint is None or not is_divided(config.data):
        return
    train, recorded = open_data(replace(config, image_size=like.image_size)), recorded_input(like.path)
    there = recorded.data is not None and (is_named(recorded.data) or os.path.exists(_path_of(recorded.data)))
    ours = same_place(recorded.data, config.data) if there else train.class_names == like.class_names
    if ours and train.fingerprint != like.fingerprint and is_main():
        other_seed = recorded.data is not None and recorded.split_seed != config.split_seed
        remedy = f"add --split-seed {recorded.split_seed}" if other_seed else "keep images to test on in test/CLASS/*"
        Progress.say(
            f"warning: --data {config.data} has other training images than {like.path} was trained on, so that some of "
            f"its test images may be among those; {remedy}"
        )


def same_place(one: str, other: str) -> bool:
    """Whether two --data are one folder, by whatever links they name it."""
    return os.path.realpath(_path_of(one)) == os.path.realpath(_path_of(other))


def _path_of(data: str) -> str:
    return data.removeprefix(HUGGING_FACE)


def subset(data: ImageData, images: int, *, seed: int) -> np.ndarray:
    """Ascending indices of `images` readable images, drawn without replacement; all if 0 or if there are no more."""
    good = data.good()
    if not 0 < images < len(good):
        return good
    return np.sort(np.random.default_rng([seed, SUBSET]).choice(good, size=images, replace=False))


class RecordedInput(NamedTuple):
    """What a network was trained on, as far as the config.json beside its checkpoint tells."""

    data: str | None
    split_seed: int


def recorded_input(checkpoint: Path) -> RecordedInput:
    """`--data` and `--split-seed` of the run that trained the network. The seed decides which images test."""
    try:
        flags = files.read_json(checkpoint.parent / "config.json")["input"]
        return RecordedInput(str(flags["data"]), int(flags.get("split_seed", 0)))  # which older runs lack
    except (ValueError, KeyError, TypeError):
        return RecordedInput(None, 0)


def _data_here(recorded: RecordedInput, checkpoint: Path) -> str:
    data = recorded.data
    if data is None:
        raise ValueError(
            f"{checkpoint.parent / 'config.json'} does not say what {checkpoint.name} was trained on; give it with "
            "--data."
        )
    if located(data) != data and not Path(data).exists():  # a relative path of another folder
        raise ValueError(f"{checkpoint.name} was trained on {data}, which is not here; name it with --data.")
    return data

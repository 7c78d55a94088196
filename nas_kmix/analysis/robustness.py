"""Measure how robust trained networks are: under attack, on hard natural images, and on images of unknown classes.

    python -m nas_kmix.analysis.robustness runs/plain runs/dcutmix --attack fgsm pgd                  # white-box
    python -m nas_kmix.analysis.robustness runs/plain runs/dcutmix --attack pgd --substitute runs/other-seed  # grey-box
    python -m nas_kmix.analysis.robustness runs/net --natural imagenet-a --ood imagenet-o --ood-folders mistaken

A RUN is the folder of a training (its last.pt) or a checkpoint, also the scorer.pt of a search. Attacks move pixels in
[0, 1] within L-infinity balls. Without --substitute each network is attacked through its own gradients (white-box).
With it the examples are made on the substitute and shown to all networks: grey-box if the architectures are the same,
black-box if they differ (the paper's Table 4). --natural takes CLASS/* folders of the network's own classes, matched by
name, such as ImageNet-A; --ood takes images of other classes, such as ImageNet-O (Table 3 of the supplement).

Prints a table with one line per RUN and, with --out, writes it as CSV.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from nas_kmix.analysis.attacks import PixelClassifier, fgsm, pgd, random_starts
from nas_kmix.analysis.classifiers import Classifier, load_classifier
from nas_kmix.analysis.measures import (
    Attack,
    all_logits,
    attacked_accuracy,
    natural_accuracy,
    of_known_classes,
    ood_aupr,
)
from nas_kmix.analysis.runs import InputConfig, check_same_task, checkpoint_of, load_images, open_runs, subset
from nas_kmix.engine import cli, files
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.cli import Flat, parse_flags
from nas_kmix.engine.compute import DeviceConfig, pick_device
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.datasets import open_class_folders

START = 2  # random stream, beside runs.SUBSET


def _grey_levels(texts: list[str]) -> float:
    """`8` or `8/255`; a share of the unit interval would be taken for a radius that no attack succeeds in."""
    number, slash, whole = texts[0].partition("/")
    value = float(number)
    if slash and float(whole) != 255:
        raise ValueError(f"{texts[0]} is not a fraction of 255; write e.g. 8/255")
    if not slash and 0 < value < 1:
        raise ValueError(
            f"{texts[0]} is less than one grey level of 255; if it is a share of [0, 1], write {255 * value:.3g}/255, "
            f"otherwise {texts[0]}/255"
        )
    return value


GreyLevels = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|N/255",
        instance_from_str=_grey_levels,
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [f"{value:g}/255"],
    ),
]


@dataclass(frozen=True)
class AttackConfig:
    """The attacks; pixels count in grey levels of 0 to 255. The default, eps = 8, is that of the paper's Table 4."""

    attack: tuple[Literal["fgsm", "pgd"], ...] = ()
    """Attacks to run: fgsm, pgd or both."""
    eps: GreyLevels = 8.0
    """Radius of the L-infinity ball, how far a pixel may move, in grey levels of 0 to 255: 8 or 8/255."""
    step: GreyLevels = 2.0
    """Step size of PGD, in grey levels: 2 or 2/255."""
    steps: int = 10
    """Number of steps of PGD, from a random start."""

    def __post_init__(self):
        if not (0.0 < self.eps <= 255.0 and self.step > 0.0 and self.steps >= 1):
            raise ValueError("--eps must be above 0 and at most 255, --step above 0 and --steps at least 1.")


@dataclass(frozen=True)
class Config:
    """Which networks, attacks and images."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders or checkpoints, one line of the table each."""
    substitute: Path | None = None
    """Make the adversarial examples on this run or checkpoint instead of on each network itself."""
    natural: Path | None = None
    """A folder CLASS/* of hard images of known classes."""
    ood: Path | None = None
    """A folder CLASS/* of images that belong to none of the classes."""
    ood_folders: Literal["shown", "mistaken"] = "shown"
    """What the folders of --ood are named after. shown: what the images show; folders of a known class are left out.
    mistaken: the known class that the images are mistaken for, as in ImageNet-O; they are compared with the images of
    these classes."""
    out: Path | None = None
    """Also write the table to this file, as CSV."""
    seed: int = 0
    """Seed of the choice of images and of the starts of PGD."""
    batch_size: int = 100
    input: Annotated[InputConfig, Flat] = field(default_factory=InputConfig)
    attacks: Annotated[AttackConfig, Flat] = field(default_factory=AttackConfig)
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)


def make_attack(name: str, config: AttackConfig, *, seed: int) -> Attack:
    """One of the two attacks as a function of network, pixels and batch."""
    eps, step = config.eps / 255, config.step / 255

    def attack(model: PixelClassifier, pixels: Tensor, batch: Batch) -> Tensor:
        if name == "fgsm":
            return fgsm(model, pixels, batch.labels, eps=eps)
        start = random_starts(batch.indices, tuple(pixels.shape[1:]), seed=(seed, START)).to(pixels.device)
        return pgd(model, pixels, batch.labels, eps=eps, step=step, steps=config.steps, start=start)

    return attack


def run(config: Config) -> list[dict[str, Any]]:
    """A row for each RUN: its accuracies in [0, 1] and counts, by the names of the columns.

    Raises ValueError (bad input, with the remedy) and OSError.
    """
    _check_flags(config)
    device = pick_device(config.device)
    classifiers = open_runs(config.runs)
    models = {name: _pixel_classifier(classifier, device) for name, classifier in classifiers.items()}
    data = load_images(config.input, *classifiers.values(), device=device, workers=config.device.workers)
    rows = {name: {"run": name} for name in classifiers}
    # Both folders are opened, and refused, before the attacks take their time.
    natural = None if config.natural is None else _folder(config.natural, data, known=True)
    ood = None if config.ood is None else _folder(config.ood, data, known=config.ood_folders == "mistaken")
    if config.attacks.attack:
        _attack(config, classifiers, models, data, rows)
    if natural is not None:
        for name, model in models.items():
            among_all, among_present = natural_accuracy(model, natural, batch_size=config.batch_size)
            rows[name] |= {"natural_accuracy": among_all, "natural_accuracy_of_its_classes": among_present}
            rows[name] |= {"natural_images": len(natural.good()), "natural_classes": len(np.unique(natural.labels))}
    if ood is not None:
        _detect(config, models, data, ood, rows)
    if config.out is not None:
        files.write_text(config.out, to_csv(list(rows.values())))
    return list(rows.values())


def _check_flags(config: Config) -> None:
    if not config.attacks.attack and config.natural is None and config.ood is None:
        raise ValueError("Choose what to measure: --attack fgsm, --attack pgd, --natural FOLDER or --ood FOLDER.")
    if config.substitute is not None and not config.attacks.attack:
        raise ValueError("--substitute makes adversarial examples; choose how with --attack fgsm or --attack pgd.")
    if config.batch_size < 1 or config.seed < 0:
        raise ValueError("--batch-size must be at least 1 and --seed at least 0.")
    files.check_place("--out", config.out)
    if config.device.amp != "off":
        raise ValueError("Attacks need the gradients' full precision; leave --amp out.")


def _attack(
    config: Config,
    classifiers: Mapping[str, Classifier],
    models: Mapping[str, PixelClassifier],
    data: ImageData,
    rows: Mapping[str, dict[str, Any]],
) -> None:
    """Add the attacks' columns to `rows`."""
    other = None if config.substitute is None else load_classifier(checkpoint_of(config.substitute))
    substitute = None
    if other is not None:
        check_same_task(other, next(iter(classifiers.values())))
        substitute = _pixel_classifier(other, data.device)
    indices = subset(data, config.input.images, seed=config.seed)
    attacks = {name: make_attack(name, config.attacks, seed=config.seed) for name in config.attacks.attack}
    found = attacked_accuracy(models, data, indices, attacks, substitute=substitute, batch_size=config.batch_size)
    for name, classifier in classifiers.items():
        rows[name] |= {"threat": threat(classifier, other), "substitute": "" if other is None else str(other.path)}
        rows[name] |= {"eps": f"{config.attacks.eps:g}/255", "images": len(indices)}
        rows[name] |= {f"{kind}_accuracy": accuracy for kind, accuracy in found[name].items()}


def threat(target: Classifier, substitute: Classifier | None) -> str:
    """white, grey or black: what the attacker knows of the target."""
    if substitute is None or substitute.path.resolve() == target.path.resolve():
        return "white"
    return "grey" if target.same_architecture(substitute) else "black"


def _detect(
    config: Config,
    models: Mapping[str, PixelClassifier],
    data: ImageData,
    outside: ImageData,
    rows: Mapping[str, dict[str, Any]],
) -> None:
    """Add the columns of out-of-distribution detection to `rows`."""
    inside = data.good()
    if config.ood_folders == "mistaken":
        inside = inside[np.isin(data.labels[inside], outside.labels)]
    for name, model in models.items():
        seen, _ = all_logits(model, data, inside, batch_size=config.batch_size)
        unseen, _ = all_logits(model, outside, outside.good(), batch_size=config.batch_size)
        rows[name] |= {"ood_aupr": ood_aupr(seen, unseen), "in_images": len(seen), "ood_images": len(unseen)}


def _pixel_classifier(classifier: Classifier, device: torch.device) -> PixelClassifier:
    return PixelClassifier(classifier.model, classifier.mean, classifier.std).to(device).eval()


def _folder(folder: Path, like: ImageData, *, known: bool) -> ImageData:
    """The images in `folder` of the classes of `like`, or of all others, read from their files and prepared alike."""
    source = of_known_classes(open_class_folders(folder), like.class_names, known=known)
    return replace(like, source=source, images=None, bad=BadFiles(len(source.labels), like.bad.most))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A header and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned columns, accuracies in percent."""
    shown = [
        {k: f"{100 * v:.2f} %" if isinstance(v, float) else str(v) for k, v in row.items() if v != ""} for row in rows
    ]
    widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
    lines = [{name: name for name in widths}, *shown]
    return "\n".join("  ".join(line[name].ljust(width) for name, width in widths.items()).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`; after Ctrl-C nothing is written."""
    return cli.exit_code(lambda: print(table(run(parse_flags(Config, argv, __doc__)))))


if __name__ == "__main__":
    sys.exit(main())

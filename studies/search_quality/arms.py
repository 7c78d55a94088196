"""The cells of the study, as plain data: what is trained, on which images, for how long, and what is read off it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

SEEDS, UNTRAINED_SEEDS = range(4), range(20)


@dataclass(frozen=True)
class Setting:
    """One search: the weights alone for `rest_steps`, then alpha too for `arch_steps`."""

    channels: int = 16
    layers: int = 5
    partial: int = 4
    size: int = 16
    """Pixels to which the augmented 32-pixel images are averaged."""
    batch: int = 32
    weight_images: int = 2500
    """Class-balanced random images for the weights; 2,500 others are for the architecture."""
    lr: float = 0.025
    schedule: Literal["cosine", "constant"] = "cosine"
    """SGD's rate: half a cosine to zero over all steps, or constant."""
    rest_steps: int = 2400
    """Steps of the weights alone."""
    read_every: int = 200
    """Resting steps between readings of the gradient by alpha and beta."""
    forks: tuple[int, ...] = ()
    """Resting steps after which a bilevel search sets out from a copy of the state."""
    arch_steps: int = 150
    arch_lr: float = 6e-3
    read_arch_every: int = 25
    """Architecture steps between readings of alpha and beta."""
    initialisations: int = 0
    """Instead of training: the gradient at so many untrained supernets, one batch each."""


@dataclass(frozen=True)
class Cell:
    """A line of results.jsonl: one arm and one seed."""

    arm: str
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.seed}"


BASE = Setting()
TURN = {
    "base": BASE,
    "32px": replace(BASE, size=32),
    "8px": replace(BASE, size=8),
    "8cells": replace(BASE, layers=8),
    "C8": replace(BASE, channels=8),
    "K2": replace(BASE, partial=2),
    "batch64": replace(BASE, batch=64),
    "constant": replace(BASE, schedule="constant"),
    "lr.05": replace(BASE, lr=0.05),
    "1250": replace(BASE, weight_images=1250),
    "10000": replace(BASE, weight_images=10_000),
    "untrained": replace(BASE, rest_steps=0, initialisations=16),
    "8cells-untrained": replace(BASE, layers=8, rest_steps=0, initialisations=16),
    "10000-long": replace(BASE, weight_images=10_000, rest_steps=7800, read_every=600),
}
"""Part 1, the turn: one factor at a time from the base. The last sees its images 25 times, the base 31 times."""


SEARCH = {
    "8cells": replace(BASE, schedule="constant", read_every=400, forks=(1600, 2400), layers=8, arch_steps=100),
    "8cells-batch64": replace(
        BASE,
        schedule="constant",
        read_every=500,
        rest_steps=1500,
        forks=(1000, 1500),
        layers=8,
        batch=64,
        arch_steps=100,
    ),
    "5cells": replace(BASE, rest_steps=4000, schedule="constant", forks=(1200, 2400, 4000)),
    "32px": replace(BASE, rest_steps=2000, schedule="constant", forks=(1200, 2000), size=32),
}
"""Part 2, bilevel searches. At a constant rate one resting supernet serves several lengths of the rest."""


def cells(start: str = "") -> Iterator[Cell]:
    """All cells whose names begin with `start`."""
    for part, arms in (("turn", TURN), ("search", SEARCH)):
        for arm, setting in arms.items():
            for seed in UNTRAINED_SEEDS if setting.initialisations else SEEDS:
                cell = Cell(f"{part}/{arm}", seed, setting)
                if cell.name.startswith(start):
                    yield cell

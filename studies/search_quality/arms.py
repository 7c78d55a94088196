"""The cells of the study, as plain data: what is trained, on which images, for how long, and what is read off it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

SEEDS = range(4)


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
    schedule: Literal["cosine", "constant", "floor"] = "cosine"
    """SGD's rate: half a cosine to zero over all steps; constant; half a cosine over the rest, to a tenth of `lr`,
    which alpha then moves at."""
    rest_steps: int = 2400
    arch_steps: int = 0
    arch_lr: float = 6e-3
    read_every: int = 200
    """Steps between readings: of the mean gradient of alpha and beta while they rest, of themselves once they move."""
    read_from: int = 0
    """The first step at which the gradient is read."""
    initialisations: int = 0
    """Instead of training: the gradient at so many untrained supernets, one batch each."""
    proxy: str = ""
    """Instead of random images: the two halves of this proxy (see `proxies.py`)."""


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
    "8cells-batch64": replace(BASE, layers=8, batch=64),
    "8cells-constant": replace(BASE, layers=8, schedule="constant"),
    "long": replace(BASE, rest_steps=6000, read_every=500),
    "8cells-long": replace(BASE, layers=8, rest_steps=6000, read_every=500),
}
"""Part 1, the turn: one factor at a time from the base, and what the two ends of the story need besides."""


def cells(part: str = "") -> Iterator[Cell]:
    """All cells whose names begin with `part`, arm by arm of the same importance, seed by seed."""
    for cell in (*_turn(), *_search()):
        if cell.name.startswith(part):
            yield cell


def _turn() -> Iterator[Cell]:
    for arm, setting in TURN.items():
        for seed in SEEDS:
            yield Cell(f"turn/{arm}", seed, setting)


SEARCH = {
    "5cells": replace(BASE, arch_steps=400, read_every=25),
    "8cells": replace(BASE, layers=8, arch_steps=400, read_every=25),
}
RATES = (6e-4, 2e-3, 6e-3)
REST_STEPS = (1200, 2000, 4000)


def _search() -> Iterator[Cell]:
    """Part 2: bilevel searches from the two cheapest settings that turn."""
    for rest_steps in REST_STEPS:
        for arch_lr in RATES:
            for schedule in ("constant", "floor", "cosine"):
                for arm, base in SEARCH.items():
                    setting = replace(
                        base, rest_steps=rest_steps, read_from=rest_steps, arch_lr=arch_lr, schedule=schedule
                    )
                    for seed in SEEDS:
                        yield Cell(f"search/{arm}/{rest_steps}/{schedule}/{arch_lr:g}", seed, setting)

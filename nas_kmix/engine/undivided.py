"""A set without splits is divided class by class: a fifth of each class is for testing, the rest for training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nas_kmix.engine.folders import composed
from nas_kmix.engine.sources import Source

TEST_SHARE = 0.2


def divided(whole: Source, names: Sequence[str], split: str, seed: int, data: str) -> Source:
    """The train or the test split of `whole`, with a note on how it was drawn.

    An image's place among those of its class follows from the seed and its name, and the first fifth is for testing.
    So other images shift the boundary alone: a few training images may still become test images as a class grows.
    `data` names the set in a refusal.
    """
    if split not in ("train", "test"):
        raise ValueError(f"{data} has no splits of its own and is divided into train and test, not {split!r}.")
    tests = _test_images(whole.labels, names, seed)
    note = (
        f"{whole.name} has no splits: {tests.sum():,} of its {len(tests):,} images, {100 * TEST_SHARE:.0f} % of each "
        f"class drawn by --split-seed {seed}, are for testing"
    )
    part = whole.part(np.flatnonzero(tests == (split == "test")))
    return replace(part, split=split, note=note)


def _test_images(labels: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    """bool (N,); a class of two or more images has some on both sides, and the only one of a class is for training."""
    places = np.array([_place(name, seed) for name in names], dtype=np.uint64)
    tests = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(TEST_SHARE * len(members)), 1), len(members) - 1)
        tests[members[np.argsort(places[members], kind="stable")[:count]]] = True
    return tests


def _place(name: str, seed: int) -> int:
    """A random number in [0, 2**64) that depends on name and seed alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {composed(name)}".encode(), digest_size=8).digest(), "big")

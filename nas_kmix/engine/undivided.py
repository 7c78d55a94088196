"""A set without splits is divided class by class: a fifth of each class is for testing, the rest for training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nas_kmix.engine.sources import Source

TEST_SHARE = 0.2
SPLIT = 13  # random stream


def divided(whole: Source, split: str, seed: int, data: str) -> Source:
    """The train or the test split of `whole`, with a note on how it was drawn; `data` names the set in a refusal."""
    if split not in ("train", "test"):
        raise ValueError(f"{data} has no splits of its own and is divided into train and test, not {split!r}.")
    tests = _test_images(whole.labels, seed)
    note = (
        f"{whole.name} has no splits: {tests.sum():,} of its {len(tests):,} images, {100 * TEST_SHARE:.0f} % of each "
        f"class drawn by --split-seed {seed}, are for testing"
    )
    part = whole.part(np.flatnonzero(tests == (split == "test")))
    return replace(part, split=split, note=note)


def _test_images(labels: np.ndarray, seed: int) -> np.ndarray:
    """bool (N,); a class of two or more images has some on both sides, and the only one of a class is for training."""
    tests = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.random.default_rng([seed, SPLIT, label]).permutation(np.flatnonzero(labels == label))
        count = min(max(round(TEST_SHARE * len(members)), 1), len(members) - 1)
        tests[members[:count]] = True
    return tests

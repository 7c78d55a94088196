"""The result of scoring, `scores.npz`: every loss of every image, and the measures that rank the images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData

Measure = Literal["cv", "mean", "std"]
FORMAT = "nas_kmix/scores"
RELIABILITY_SPLITS = 20


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One row per scored image, ascending in `index`; images that could not be read have none.

    index, label: int64 (N,); losses: float32 (N, M), the loss at every draw; key: what they depend on (`scoring_key`);
    bad: a sentence for every unreadable file, by index.
    """

    index: np.ndarray
    label: np.ndarray
    losses: np.ndarray
    key: Mapping[str, Any] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreTable) and self.hash() == other.hash() and self.key == other.key

    __hash__ = None

    @property
    def mean(self) -> np.ndarray:
        """float64 (N,), m(L_i)."""
        return self.losses.mean(axis=1, dtype=np.float64)

    @property
    def std(self) -> np.ndarray:
        """float64 (N,), sigma(L_i), with M - 1 in the denominator."""
        return self.losses.astype(np.float64).std(axis=1, ddof=1)

    @property
    def cv(self) -> np.ndarray:
        """float64 (N,), the coefficient of variation std / mean; 0 where every loss is 0."""
        return _cv(self.losses)

    def measure(self, name: Measure) -> np.ndarray:
        """float64 (N,), the measure of that name."""
        return getattr(self, name)

    def hash(self) -> str:
        return files.hash_arrays(self.index, self.label, self.losses)

    def reliability(self, measure: Measure = "cv") -> float:
        """How well the ranking by `measure` would repeat with new draws: 1 exactly, 0 not at all.

        Spearman's correlation between the values from two random halves of the draws, averaged over 20 splits and
        stepped up to all M draws by the Spearman-Brown formula 2r / (1 + r). NaN for fewer than four draws or
        three images, or if all values are the same. Too high for `partners="fixed"`, where the halves share partners.
        """
        draws = self.losses.shape[1]
        if draws < 4 or len(self.losses) < 3:
            return float("nan")
        rng = np.random.default_rng(0)
        correlations = []
        for _ in range(RELIABILITY_SPLITS):
            order = rng.permutation(draws)
            halves = order[: draws // 2], order[draws // 2 : draws // 2 * 2]
            values = [replace(self, losses=self.losses[:, half]).measure(measure) for half in halves]
            if any(np.ptp(value) == 0 for value in values):
                return float("nan")
            correlations.append(stats.spearmanr(*values).statistic)
        r = float(np.mean(correlations))
        return 2 * r / (1 + r) if r > 0 else r  # the formula holds for positive correlations

    @staticmethod
    def merge(tables: list[ScoreTable]) -> ScoreTable:
        """Merge shards, at least one, in any order. Raises ValueError for an image scored twice."""
        index = np.concatenate([table.index for table in tables])
        order = np.argsort(index, kind="stable")
        if (np.diff(index[order]) == 0).any():
            raise ValueError("The shards overlap: an image was scored twice.")
        label = np.concatenate([table.label for table in tables])
        losses = np.concatenate([table.losses for table in tables])
        bad = {index: message for table in tables for index, message in table.bad.items()}
        return ScoreTable(index[order], label[order], losses[order], tables[0].key, bad)

    def save(self, path: Path | str) -> None:
        """Write `index, label, mean, std, cv, losses` and, as JSON, `meta` (format, key, bad) as .npz, atomically."""
        measures = {"mean": self.mean, "std": self.std, "cv": self.cv}
        arrays = {"index": self.index, "label": self.label, **measures, "losses": self.losses}
        meta = {"format": FORMAT, "key": self.key, "bad": {str(index): text for index, text in self.bad.items()}}
        files.write_npz(Path(path), {**arrays, "meta": np.array(json.dumps(meta))})

    @classmethod
    def load(cls, path: Path | str) -> ScoreTable:
        """Read what `save` wrote. Raises ValueError naming the file."""
        arrays = files.read_npz(Path(path))
        missing = {"index", "label", "losses", "meta"} - arrays.keys()
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it is not a scores.npz of nas_kmix.")
        try:
            meta = json.loads(str(arrays["meta"]))
            if meta["format"] != FORMAT or not isinstance(meta["key"], dict):
                raise ValueError("its meta does not describe scores")
            bad = {int(index): str(message) for index, message in meta["bad"].items()}
            return cls(arrays["index"], arrays["label"], arrays["losses"], meta["key"], bad).checked()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a scores.npz of nas_kmix ({error}); score the images again.") from error

    def belongs_to(self, data: ImageData) -> bool:
        """Whether these are images of `data`, judging by its fingerprint and the labels."""
        inputs = self.key.get("inputs")
        same = isinstance(inputs, Mapping) and inputs.get("data") == data.fingerprint
        known = max(self.index[-1], *self.bad, -1) < len(data)
        return same and known and np.array_equal(self.label, data.labels[self.index])

    def checked(self) -> ScoreTable:
        """The table itself. Raises ValueError if its rows contradict each other."""
        n = len(self.index) if self.index.ndim == 1 else 0
        if n == 0 or self.label.shape != (n,) or self.losses.ndim != 2 or len(self.losses) != n:
            raise ValueError("its arrays are of different lengths")
        if self.index.dtype.kind != "i" or self.label.dtype.kind != "i" or self.losses.dtype.kind != "f":
            raise ValueError("its arrays are of the wrong type")
        if self.index[0] < 0 or (np.diff(self.index) <= 0).any():
            raise ValueError("its indices do not ascend")
        if not np.isfinite(self.losses).all():
            raise ValueError("it holds losses that are not finite")
        if min(self.bad, default=0) < 0:
            raise ValueError("it lists unreadable images with negative indices")
        return self


def verdict(reliability: float) -> str:
    """What a `ScoreTable.reliability` means, in a word or two."""
    if math.isnan(reliability):
        return "unknown"
    return "mostly noise" if reliability < 0.5 else "fair" if reliability < 0.8 else "good"


def _cv(losses: np.ndarray) -> np.ndarray:
    losses = losses.astype(np.float64)
    mean, std = losses.mean(axis=1), losses.std(axis=1, ddof=1)
    return np.divide(std, mean, out=np.zeros_like(std), where=mean != 0)

"""The result of scoring, `scores.npz`: every loss of every image, and the measures that rank the images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData

Column = Literal["mixed_entropy", "entropy", "el2n", "bald", "variation_ratio", "k_centre", "forgetting"]
Measure = Literal["cv", "mean", "std", "residual", Column]
COLUMNS: dict[Column, str] = dict.fromkeys(get_args(Column), "--scoring.baselines")
COLUMNS |= {"el2n": "", "forgetting": "--scorer.forgetting"}
"""The measures that do not follow from the losses, and the flags that ask for them; EL2N needs none."""
DETERMINED = ("el2n", "entropy", "k_centre", "forgetting")
"""The measures that have no random draws."""
NOT_HARDNESS = ("cv", "std", "residual", "k_centre")
"""The measures of which a high value does not mean a hard image."""
TITLES: dict[Measure, str] = {
    "cv": "CV",
    "mean": "mean loss",
    "std": "standard deviation",
    "residual": "CV less what the mean explains",
    "mixed_entropy": "predictive entropy under mixing",
    "entropy": "predictive entropy",
    "el2n": "EL2N",
    "bald": "BALD",
    "variation_ratio": "variation ratio",
    "k_centre": "k-centre order",
    "forgetting": "forgetting count",
}
FORMAT = "nas_kmix/scores"
RELIABILITY_SPLITS = 20
FAIR, GOOD = 0.5, 0.8  # reliabilities from which a ranking is called so


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One row per scored image, ascending in `index`; images that could not be read have none.

    index, label: int64 (N,); losses: float32 (N, M), the loss at every draw; key: what they depend on (`scoring_key`);
    bad: files that could not be read, by index, each with a sentence; columns: float64 (N,) by name, the measures that
    do not follow from the losses, where they were asked for (`COLUMNS`).
    """

    index: np.ndarray
    label: np.ndarray
    losses: np.ndarray
    key: Mapping[str, Any] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)
    columns: Mapping[Column, np.ndarray] = field(default_factory=dict)

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

    @property
    def residual(self) -> np.ndarray:
        """float64 (N,), what is left of the CV once a straight line through the mean has explained its part.

        Each class has its own line, by least squares. The CV falls where the mean rises (rank correlation -.4 on
        CIFAR-100), so that a high CV is in part an easy image; the residual is not (below .04).
        """
        mean, rest = self.mean, self.cv.copy()
        for label in np.unique(self.label):
            rows = np.flatnonzero(self.label == label)
            line = np.column_stack([np.ones(len(rows)), mean[rows]])
            rest[rows] -= line @ np.linalg.lstsq(line, rest[rows], rcond=None)[0]
        return rest

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The names that `measure` knows here."""
        return tuple(name for name in TITLES if name in self.columns or name not in COLUMNS)

    def measure(self, name: Measure) -> np.ndarray:
        """float64 (N,), the values of that name. Raises ValueError where they were not asked for."""
        if name not in self.measures:
            how = f" with {COLUMNS[name]}, which measures it" if COLUMNS[name] else ", or choose another --measure"
            raise ValueError(f"These scores have no {name}; make them anew{how}.")
        return self.columns[name] if name in self.columns else getattr(self, name)

    def hash(self) -> str:
        columns = (self.columns[name] for name in sorted(self.columns))
        return files.hash_arrays(self.index, self.label, self.losses, *columns)

    def reliability(self, measure: Measure = "cv") -> float:
        """How well the ranking by `measure` would repeat with new draws: 1 exactly, 0 not at all.

        1 for measures without draws, where the table has them. For the others, Spearman's correlation between the
        values from two random halves of the draws, averaged over 20 splits and stepped up to all M draws by the
        Spearman-Brown formula: 2r / (1 + r) for an even M. NaN for fewer than four draws, where the values are all the
        same, and for measures that have draws but do not follow from the losses. With `partners="fixed"` the halves
        share their partners, and this is too high.
        """
        draws = self.losses.shape[1]
        if measure in DETERMINED:
            return 1.0 if measure in self.columns else float("nan")
        if draws < 4 or len(self.losses) < 3 or measure in self.columns:
            return float("nan")
        from scipy import stats  # late, since it takes half as long to import as torch

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
        longer = draws / (draws // 2)  # than a half
        return longer * r / (1 + (longer - 1) * r) if r > 0 else r  # the formula holds for positive correlations

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
        names = tables[0].columns
        columns = {name: np.concatenate([table.columns[name] for table in tables])[order] for name in names}
        return ScoreTable(index[order], label[order], losses[order], tables[0].key, bad, columns)

    def save(self, path: Path | str) -> None:
        """Write `index, label`, all measures, `losses` and, as JSON, `meta` (format, key, bad) as .npz, atomically."""
        measures = {name: self.measure(name) for name in self.measures}
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
            columns = {name: arrays[name] for name in COLUMNS if name in arrays}
            return cls(arrays["index"], arrays["label"], arrays["losses"], meta["key"], bad, columns).checked()
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
        for name, values in self.columns.items():
            if values.shape != (n,) or values.dtype.kind != "f" or not np.isfinite(values).all():
                raise ValueError(f"its {name} is not one finite number per image")
        if not np.isfinite(self.losses).all():
            raise ValueError("it holds losses that are not finite")
        if min(self.bad, default=0) < 0:
            raise ValueError("it lists unreadable images with negative indices")
        return self


def verdict(reliability: float) -> str:
    """What a `ScoreTable.reliability` means, in a word or two."""
    if math.isnan(reliability):
        return "unknown"
    return "mostly noise" if reliability < FAIR else "fair" if reliability < GOOD else "good"


def draws_needed(reliability: float, draws: int, wanted: float = GOOD) -> str:
    """How many draws would raise the reliability of `draws` to `wanted`, by the Spearman-Brown formula, in words."""
    if reliability <= 0.0:
        return "no number of draws would do"
    factor = wanted * (1 - reliability) / (reliability * (1 - wanted))
    return f"about {math.ceil(draws * factor):,} would do" if factor < 100 else "hundreds of times as many would do"


def _cv(losses: np.ndarray) -> np.ndarray:
    losses = losses.astype(np.float64)
    mean, std = losses.mean(axis=1), losses.std(axis=1, ddof=1)
    return np.divide(std, mean, out=np.zeros_like(std), where=mean != 0)

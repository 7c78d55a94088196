"""The arms of the study: how an image is scored, by which measure, and how images are selected by it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

SEEDS = (1, 2, 3)
FRESH_SEEDS = (4, 5, 6, 11, 12, 13)
"""Of what the test images confirm; nothing was chosen by them."""
RATIOS = (0.05, 0.1, 0.2)
HALF = 0.5

PRESETS_SCORER = "small-20"
SCORERS = {
    PRESETS_SCORER: "",
    "dropout": "--scorer.dropout .5 --scorer.forgetting --scorer.val-share 0",
    **{
        f"{network}-{epochs}": f"--scorer.backbone {network} --scorer.epochs {epochs}"
        for network, epochs in product(("tiny", "small"), (2, 5, 10, 30))
    },
}
"""Flags of the classifiers that score, beside those of --preset cpu."""
PAPER = "--scoring.partners fresh --scoring.loss mixed"
DEFAULT_SCORING = "anchor"
SCORINGS = {
    "paper": PAPER,
    "anchor": "--scoring.partners common --scoring.loss anchor --scoring.baselines",
    **{f"paper-phi-{phi}": f"{PAPER} --scoring.phi-anchor {phi}" for phi in (0.1, 0.3, 0.7, 0.9)},
    **{f"anchor-draws-{draws}": f"--scoring.draws {draws}" for draws in (5, 20, 40)},
    **{f"paper-draws-{draws}": f"{PAPER} --scoring.draws {draws}" for draws in (5, 20, 40)},
    **{
        f"{loss}-{partners}": f"--scoring.loss {loss} --scoring.partners {partners}"
        for loss, partners in product(("mixed", "minus_entropy", "anchor"), ("fresh", "fixed", "common"))
        if (loss, partners) not in (("mixed", "fresh"), ("anchor", "common"))
    },
}
"""Flags by which one scorer scores. `paper` and `anchor` are mixed-fresh and anchor-common."""


@dataclass(frozen=True)
class Arm:
    """A measure of one scoring by one scorer, and the options of `nas_kmix.sampling.select`."""

    measure: str
    options: tuple[tuple[str, Any], ...]
    scoring: str = DEFAULT_SCORING
    scorer: str = PRESETS_SCORER


def arm(
    measure: str, method: str, *, scoring: str = DEFAULT_SCORING, scorer: str = PRESETS_SCORER, **options: Any
) -> Arm:
    return Arm(measure, (("method", method), *options.items()), scoring, scorer)


def mean_coverage(**source: str) -> Arm:
    """Coverage over the mean loss under mixing."""
    return arm("mean", "coverage", drop_hardest=0.7, **source)


def high_cv(scoring: str = "paper", interval: int = 4) -> Arm:
    """The paper's selection."""
    return arm("cv", "interval", scoring=scoring, interval=interval)


DEFAULT = "el2n-coverage"
RIVALS = {
    "random": arm("mean", "random"),
    "random-unbalanced": arm("mean", "random", balanced=False),
    "paper": high_cv(),
    "cv-top": arm("cv", "top", scoring="paper"),
    "cv-anchor": high_cv("anchor"),
    "std-top": arm("std", "top", scoring="paper"),
    "easiest": arm("mean", "bottom"),
    "hardest": arm("mean", "top"),
    "residual": arm("residual", "top"),
    "coverage": arm("mean", "coverage", drop_hardest=0.3),
    "coverage-.5": arm("mean", "coverage", drop_hardest=0.5),
    "coverage-.7": mean_coverage(),
    "histogram": arm("entropy", "histogram"),
    "mixed-entropy": arm("mixed_entropy", "top"),
    "el2n": arm("el2n", "top"),
    "el2n-coverage-.3": arm("el2n", "coverage", drop_hardest=0.3),
    DEFAULT: arm("el2n", "coverage", drop_hardest=0.5),
    "el2n-coverage-.7": arm("el2n", "coverage", drop_hardest=0.7),
    "k-centre": arm("k_centre", "top"),
    "bald": arm("bald", "top", scorer="dropout"),
    "variation-ratio": arm("variation_ratio", "top", scorer="dropout"),
    "forgetting": arm("forgetting", "top", scorer="dropout"),
}
FEW = ("random", "paper", "coverage", "coverage-.7", DEFAULT)
"""The arms at t = .5."""
CONFIRMED = ("random", "paper", "coverage-.7", DEFAULT)
"""The arms that the test images confirm."""
ABLATION = {
    **{f"interval-{step}": high_cv(interval=step) for step in (2, 8, 16, 20)},  # 1 is cv-top, 4 is paper
    "cv-bottom": arm("cv", "bottom", scoring="paper"),
    **{name: high_cv(name) for name in SCORINGS if name.startswith("paper-")},
    **{name: mean_coverage(scoring=name) for name in SCORINGS if not name.startswith("paper")},
}
"""Arms that differ from the paper's (interval, anchor's share, draws) or from coverage-.7 (draws, loss, partners)."""

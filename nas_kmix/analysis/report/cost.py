"""Section `cost`: the ledger of a run, and what its search would have cost on all images."""

from __future__ import annotations

from dataclasses import dataclass

from nas_kmix.analysis.report.charts import legend, share_bar
from nas_kmix.analysis.report.markup import Markup, figure, gallery, join, number, percent, sentence, table
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine.progress import duration

SHARES = (("Seconds", "wall_s"), ("Images forward", "images_forward"), ("Images backward", "images_backward"))


def section(record: Record) -> Markup:
    """Ledger and speed-up of one run."""
    if record.trains:
        return show(record, ledger=_ledger)
    return show(record, ledger=_ledger, speed_up=_speed_up)


@dataclass(frozen=True)
class SpeedUp:
    """A search on a proxy against PC-DARTS's search on all images; seconds.

    full: the estimate for the latter: 50 epochs on all images, the first 15 with a fixed architecture, at this search's
    images per second. search, selecting (scoring and selection), scorer and finals: what the stages took.
    """

    full: float
    search: float
    selecting: float
    scorer: float
    finals: float

    @property
    def without_scorer(self) -> float:
        """The speed-up if scoring and selection are billed and the scorer is taken as given."""
        return self.full / (self.selecting + self.search)

    @property
    def all_in(self) -> float:
        return self.full / self.all_stages

    @property
    def all_stages(self) -> float:
        return self.scorer + self.selecting + self.search + self.finals


def speed_up(record: Record) -> SpeedUp:
    """Raises ValueError where there was no proxy, or the search has not ended."""
    proxy, costs = record.proxy, record.costs
    search = costs["search"]
    if not (search.wall_s > 0 and search.images_forward > 0):
        raise ValueError(f"{record.path('cost.json')} bills no search.")
    passes = 50 * len(proxy.weights) + 35 * len(proxy.arch)
    return SpeedUp(
        full=search.wall_s * passes * proxy.n / len(proxy.indices) / search.images_forward,
        search=search.wall_s,
        selecting=costs["scoring"].wall_s + costs["selection"].wall_s,
        scorer=costs["scorer"].wall_s,
        finals=costs["finals"].wall_s if "finals" in costs else 0.0,  # which older runs lack
    )


def all_in_seconds(record: Record) -> float:
    """Seconds of all stages."""
    return sum(cost.wall_s for cost in record.costs.values())


def _ledger(record: Record) -> Markup:
    costs = {name: cost for name, cost in record.costs.items() if cost.wall_s > 0}
    if not costs:
        raise ValueError(f"{record.path('cost.json')} bills nothing.")
    rows = [
        (name, number(c.wall_s), duration(c.wall_s), f"{c.images_forward:,}", f"{c.images_backward:,}", _gib(c))
        for name, c in costs.items()
    ]
    sums = [sum(getattr(c, field) for c in costs.values()) for _, field in SHARES]
    rows.append(("total", number(sums[0]), duration(sums[0]), f"{sums[1]:,}", f"{sums[2]:,}", ""))
    head = ("stage", "seconds", "time", "images forward", "images backward", "peak memory, GiB")
    bars = []
    for title, field in SHARES:
        parts = {name: float(getattr(c, field)) for name, c in costs.items()}
        if sum(parts.values()) > 0:
            text = ", ".join(f"{name} {percent(v / sum(parts.values()))}" for name, v in parts.items())
            bars.append(figure(title, share_bar(f"{title} by stage: {text}", parts), text))
    note = "Peak memory is what the process had held by the end of the stage. Reading the data is not billed."
    ledger = table(head, rows, caption="Ledger")
    return join([ledger, sentence(note, "note"), legend(list(costs), lines=False), gallery(*bars)])


def _gib(cost) -> str:
    return f"{cost.peak_rss_bytes / 2**30:.2f}"


def _speed_up(record: Record) -> Markup:
    found, proxy = speed_up(record), record.proxy
    rows = [
        ("search alone, the paper's way of counting", found.search, found.full / found.search),
        ("with scoring and selection, the scorer given", found.selecting + found.search, found.without_scorer),
        ("all in, the scorer's training and the finals too", found.all_stages, found.all_in),
    ]
    rows = [(name, number(seconds), f"{ratio:.2f}×") for name, seconds, ratio in rows]
    estimate = (
        f"PC-DARTS's 50 epochs on all {proxy.n:,} images, at this search's images per second, would have cost about "
        f"{duration(found.full)} ({number(found.full)} s): this search took {number(found.search)} s for "
        f"{record.costs['search'].images_forward:,} image passes over its {len(proxy.indices):,} images"
    )
    if found.scorer == 0 and record.given_scorer is not None:
        estimate += f". The scorer, {record.given_scorer}, came from elsewhere; what its training cost is not known"
    elif found.scorer == 0:
        estimate += ". No scorer was trained for it, or its cost is not recorded"
    if record.config["search"].get("rest_steps") is not None:
        estimate += (
            ". The length of this search is set in steps (--rest-steps, --arch-steps), and as many steps on all images "
            "would cost the same: the speed-up is that of a shorter search, not of the proxy"
        )
    return join(
        [
            table(
                ("what is billed", "seconds", "estimated speed-up"),
                rows,
                caption="Estimated speed-up over a full search, which was not run",
            ),
            sentence(f"{estimate}. A ratio below 1 means that the proxy costs more than it saves.", "note"),
        ]
    )

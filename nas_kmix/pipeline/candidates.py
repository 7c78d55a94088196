"""What competes in the finals: genotypes and where each comes from. The records of a search in, `candidates.json` out.

The first candidate is the *entry*: the genotype of the first seed after its last architecture step. It is named before
anything is compared. Random controls have multiply-adds close to the median of the searched genotypes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from darts_space import PRIMITIVES, Genotype, Network, build_network, cost, random_genotype, widest
from darts_space.cell import CONCAT, NODES, Edge
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData

FILE = "candidates.json"
FORMAT, VERSION = "nas_kmix/candidates", 1
CHECKPOINTS = 3  # latest records of each search that compete besides its last one
NEAR = 0.10  # how far a control's multiply-adds may lie from the median
FAR = 0.25  # how far a candidate's may lie at the common width
DRAWS = 10_000  # until the nearest of them must do
CONTROLS = 41  # random stream

Origin = Literal["bilevel", "random", "given"]


@dataclass(frozen=True)
class Candidate:
    """A genotype and its origin: `seed` (from 0) and `arch_step` of a search, or the `text` that a user gave."""

    genotype: Genotype
    origin: Origin
    seed: int | None = None
    arch_step: int | None = None
    text: str | None = None

    @property
    def searched(self) -> bool:
        """Whether a search found it, rather than a user or chance."""
        return self.origin == "bilevel"

    @property
    def title(self) -> str:
        """Its origin in a few words."""
        if self.searched:
            return f"bilevel search, seed {self.seed}, architecture step {self.arch_step}"
        return "random" if self.origin == "random" else f"given: {self.text}"

    def to_json(self) -> dict[str, Any]:
        known = {name: getattr(self, name) for name in ("seed", "arch_step", "text")}
        known = {name: value for name, value in known.items() if value is not None}
        return {"origin": self.origin, **known, "genotype": self.genotype.to_json()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Candidate:
        if raw["origin"] not in get_args(Origin):
            raise ValueError(f"there is no origin {raw['origin']!r}")
        known = {name: raw.get(name) for name in ("seed", "arch_step", "text")}
        return cls(Genotype.from_json(raw["genotype"]), raw["origin"], **known)


def of_records(records: Sequence[Sequence[tuple[int, Genotype]]]) -> list[Candidate]:
    """The candidates of a search with one or several seeds: the last record of each, then earlier ones that differ.

    `records` hold (architecture step, genotype) by seed. A record from before the architecture moved is none.
    """
    last = [Candidate(rows[-1][1], "bilevel", seed, rows[-1][0]) for seed, rows in enumerate(records)]
    found = _distinct(last)
    for seed, rows in enumerate(records):
        earlier = [Candidate(genotype, "bilevel", seed, step) for step, genotype in reversed(rows[:-1]) if step > 0]
        new = [one for one in _distinct([*found, *earlier]) if one not in found]
        found += new[:CHECKPOINTS]
    return found


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Without those whose network came before."""
    first: dict[frozenset, Candidate] = {}
    for one in candidates:
        first.setdefault(one.genotype.entries, one)
    return list(first.values())


def identity(candidates: Sequence[Candidate]) -> str:
    """SHA-256 of the genotypes and origins, in their order."""
    document = [(one.origin, one.genotype.to_json()) for one in candidates]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


# -- the file ----------------------------------------------------------------------------------------------------------


def save(path: Path, candidates: Sequence[Candidate], provenance: Mapping[str, Any]) -> None:
    """Write `candidates.json`, one candidate per line."""
    lines = ",\n".join(f"    {json.dumps({'candidate': i, **one.to_json()})}" for i, one in enumerate(candidates))
    head = f'  "format": "{FORMAT}",\n  "version": {VERSION},\n  "candidates": [\n{lines}\n  ],'
    origin = json.dumps(dict(provenance), indent=2, sort_keys=True).replace("\n", "\n  ")
    files.write_text(path, f'{{\n{head}\n  "provenance": {origin}\n}}\n')


def load(path: Path) -> tuple[list[Candidate], dict[str, Any]]:
    """The candidates in `path`, and their provenance. Raises ValueError naming the file."""
    raw = files.read_json(path)
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is not a list of candidates of this version; {files.REMOVE_OURS}.")
    with files.damage_named(path, files.REMOVE_OURS):
        candidates = [Candidate.from_json(one) for one in raw["candidates"]]
        if not candidates or not candidates[0].searched:
            raise ValueError("its first candidate is not a search's")
        return candidates, dict(raw["provenance"])


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The small networks in which genotypes are compared: all but their cells and width."""

    kind: str
    layers: int
    num_classes: int
    input_size: int

    @classmethod
    def of(cls, data: ImageData, layers: int) -> Shape:
        return cls(data.stem, layers, data.num_classes, data.image_size)

    def network(self, genotype: Genotype, channels: int, generator: torch.Generator) -> Network:
        shape = {"kind": self.kind, "layers": self.layers, "num_classes": self.num_classes, "channels": channels}
        return build_network({**shape, "genotype": genotype.to_json(), "auxiliary": False}, generator=generator)

    def macs(self, genotype: Genotype, channels: int) -> int:
        """Multiply-adds of one image."""
        return _macs(self, genotype, channels)

    def nearest_width(self, genotype: Genotype, macs: int) -> int:
        """The even number of channels whose multiply-adds come nearest to `macs`."""
        options = {"kind": self.kind, "layers": self.layers, "num_classes": self.num_classes}
        try:
            below = widest(genotype, macs, input_size=self.input_size, **options)
        except ValueError:  # even two channels are too many
            return 2
        return min((below, below + 2), key=lambda width: abs(self.macs(genotype, width) - macs))


@lru_cache(maxsize=4096)
def _macs(shape: Shape, genotype: Genotype, channels: int) -> int:
    with torch.device("meta"):  # counted without computing anything
        return cost(shape.network(genotype, channels, torch.Generator("cpu")), shape.input_size)["macs"]


@lru_cache(maxsize=16)
def _prices(shape: Shape, channels: int) -> tuple[int, dict[tuple[str, str, bool], int]]:
    """The multiply-adds of a network whose edges are all skip connections from inputs of the cell, and what others add.

    Multiply-adds are a sum over edges. That of an edge depends on its cell, its operation, and whether it comes from a
    node inside the cell: those from the inputs of a reduction cell halve the resolution.
    """
    skips = [("skip_connect", i % 2) for i in range(2 * NODES)]

    def macs(**cells: Sequence[Edge]) -> int:
        edges = {"normal": skips, "reduce": skips, **cells}
        return shape.macs(Genotype(edges["normal"], CONCAT, edges["reduce"], CONCAT), channels)

    base = macs()
    return base, {
        (cell, operation, inside): macs(**{cell: [*skips[:-2], ("skip_connect", 1), (operation, 2 * inside)]}) - base
        for cell in ("normal", "reduce")
        for operation in PRIMITIVES[1:]
        for inside in (False, True)
    }


def _sum_of_edges(shape: Shape, genotype: Genotype, channels: int) -> int:
    """What `Shape.macs` counts, a thousand times as fast."""
    base, prices = _prices(shape, channels)
    cells = {"normal": genotype.normal, "reduce": genotype.reduce}
    return base + sum(prices[cell, name, index > 1] for cell, edges in cells.items() for name, index in edges)


def random_controls(
    count: int, macs: float, shape: Shape, channels: int, *, taken: Iterable[Genotype] = (), rng: np.random.Generator
) -> list[Genotype]:
    """`count` uniformly random genotypes within 10 % of `macs` multiply-adds at this width, none of them `taken`.

    Where few random genotypes are as small or as large, the nearest of 10,000 take the missing places.
    """
    known = {one.entries for one in taken}
    drawn: dict[Genotype, float] = {}
    near: list[Genotype] = []
    for _ in range(DRAWS):
        if len(near) == count:
            return near
        genotype = random_genotype(rng)
        if genotype.entries not in known:
            known.add(genotype.entries)
            drawn[genotype] = abs(_sum_of_edges(shape, genotype, channels) / macs - 1)
            near += [genotype] if drawn[genotype] <= NEAR else []
    others = sorted((one for one in drawn if one not in near), key=drawn.__getitem__)
    return (near + others)[:count]


def with_controls(
    searched: Sequence[Candidate],
    given: Mapping[str, Genotype],
    *,
    controls: int,
    shape: Shape,
    channels: int,
    seed: int,
) -> list[Candidate]:
    """All candidates of the finals: the searched ones, those that the user gave, by their texts, and random controls.

    The controls' multiply-adds lie within 10 % of the searched ones' median, where such genotypes exist.
    """
    found = _distinct([*searched, *(Candidate(one, "given", text=text) for text, one in given.items())])
    macs = float(np.median([shape.macs(one.genotype, channels) for one in searched]))
    rng, taken = np.random.default_rng([seed, CONTROLS]), [one.genotype for one in found]
    drawn = random_controls(controls, macs, shape, channels, taken=taken, rng=rng)
    return [*found, *(Candidate(genotype, "random") for genotype in drawn)]


@dataclass(frozen=True)
class Entrants:
    """All candidates and, for each, the channels of its network and its multiply-adds for one image.

    far_controls: how many random controls could not be drawn near the searched genotypes' multiply-adds; provenance:
    what the search depended on, as in `candidates.json`.
    """

    candidates: Sequence[Candidate]
    channels: Sequence[int]
    macs: Sequence[int]
    far_controls: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, found: Sequence[Candidate], shape: Shape, channels: int, provenance: Mapping[str, Any] | None = None
    ) -> Entrants:
        """One width for all, except where a candidate costs over 25 % more or less than the median."""
        macs = [shape.macs(one.genotype, channels) for one in found]
        median = float(np.median(macs))
        widths = [
            channels if abs(own / median - 1) <= FAR else shape.nearest_width(one.genotype, round(median))
            for one, own in zip(found, macs, strict=True)
        ]
        costs = [shape.macs(one.genotype, width) for one, width in zip(found, widths, strict=True)]
        middle = float(np.median([own for one, own in zip(found, macs, strict=True) if one.searched]))
        random = [own for one, own in zip(found, macs, strict=True) if one.origin == "random"]
        far = sum(abs(own / middle - 1) > NEAR for own in random)
        return cls(found, widths, costs, far, provenance or {})

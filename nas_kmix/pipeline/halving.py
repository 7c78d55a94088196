"""Successive halving (Jamieson & Talwalkar 2016) with an entry and controls that are never left out.

In:  accuracies of candidates, rung by rung, in whatever order they come.
Out: which candidate may train at which rung, and at the end the winner.

After each rung the better half of the contenders goes on. The entry goes on in any case, and so do the controls, which
do not contend: without them nothing could be said of the search.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

Turn = tuple[int, int]
"""A candidate's number and a rung, from 0."""


@dataclass
class Halving:
    """`contenders` and `controls` are numbers of candidates, each once; the entry is the first contender."""

    contenders: Sequence[int]
    controls: Sequence[int]
    rungs: int
    accuracies: dict[Turn, float] = field(default_factory=dict)
    _begun: set[Turn] = field(default_factory=set)

    @property
    def entry(self) -> int:
        return self.contenders[0]

    def record(self, turn: Turn, accuracy: float) -> None:
        """Note what a candidate reached in a rung. A candidate that diverged is given an accuracy of 0."""
        self.accuracies[turn] = accuracy
        self._begun.add(turn)

    def turns(self) -> list[Turn]:
        """The turns that may begin now, each returned once. Empty if the rest waits for results, or all is done."""
        found = []
        for rung in range(self.rungs):
            for candidate in sorted({*self.in_rung(rung), self.entry, *self.controls}):
                before = rung == 0 or (candidate, rung - 1) in self.accuracies
                if before and (candidate, rung) not in self._begun:
                    found.append((candidate, rung))
        self._begun.update(found)
        return found

    def in_rung(self, rung: int) -> Collection[int]:
        """The contenders of a rung; none as long as the rung before has not ended."""
        return set(self.contenders) if rung == 0 else self.kept(rung - 1)

    def kept(self, rung: int) -> set[int]:
        """The contenders that go on after a rung; none before it has ended. After the last one, the winner."""
        contending = self.in_rung(rung)
        if not contending or any((candidate, rung) not in self.accuracies for candidate in contending):
            return set()
        ranked = sorted(contending, key=lambda candidate: (-self.accuracies[candidate, rung], candidate))
        if rung == self.rungs - 1:
            return {ranked[0]}
        return {*ranked[: math.ceil(len(ranked) / 2)], self.entry}

    @property
    def winner(self) -> int | None:
        """The best contender of the last rung, the first of equal ones; None before that rung has ended."""
        return next(iter(self.kept(self.rungs - 1)), None)

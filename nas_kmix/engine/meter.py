"""Running means of a training epoch that stay on the device until they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nas_kmix.engine.distributed import World

REMEDY = "Start again with --fresh and a lower learning rate, or with --amp off."
STEPS_BETWEEN_CHECKS = 50  # reading a value waits for the device


class NonFiniteLossError(Exception):
    """The loss became infinite or not a number; the message names the stage, the epoch and the step."""


class Meter:
    """Means of named per-batch sums over an epoch, with the first step whose loss was not finite.

    Nothing here waits for the device except `check`, `means` and `state_dict`. `remedy` ends the message of a loss that
    is not finite.
    """

    def __init__(self, device: torch.device, remedy: str = REMEDY):
        self._device, self._remedy = device, remedy
        self._dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._note = ""

    def add(self, step: int, n: int, **sums: Tensor) -> None:
        """Add sums over `n` images of step `step`."""
        for name, value in sums.items():
            value = value.detach().to(self._dtype)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + n
            newly_bad = (self._first_bad < 0) & ~torch.isfinite(value)
            self._first_bad = torch.where(newly_bad, step, self._first_bad)

    def check(self, stage: str, epoch: int) -> None:
        """Raise NonFiniteLossError if any loss so far was not finite (a sync point)."""
        step = int(self._first_bad)
        if step >= 0:
            raise NonFiniteLossError(
                f"{stage}: the loss was not finite at step {step + 1} of epoch {epoch + 1}. {self._remedy}"
            )

    def gather(self, world: World) -> None:
        """Add up the sums of all processes in rank 0; the others restart from zero."""
        if world.size == 1:
            return
        names = sorted(self._sums)
        totals = world.total(*(float(self._sums[name]) for name in names), *(self._counts[name] for name in names))
        (bad,) = world.highest(int(self._first_bad))
        for name, total, count in zip(names, totals[: len(names)], totals[len(names) :], strict=True):
            self._sums[name].fill_(total if world.main else 0.0)
            self._counts[name] = int(count) if world.main else 0
        self._first_bad.fill_(int(bad))

    def means(self) -> dict[str, float]:
        """Mean per image of every sum."""
        return {name: float(total) / max(1, self._counts[name]) for name, total in self._sums.items()}

    def note(self, stage: str, epoch: int, step: int) -> str:
        """The mean loss of the epoch in a few words, updated every 50 steps after a `check`."""
        if step % STEPS_BETWEEN_CHECKS == 0:
            self.check(stage, epoch)
            self._note = f", loss {self.means()['loss']:.3f}"
        return self._note

    def state_dict(self) -> dict[str, Mapping]:
        return {"sums": dict(self._sums), "counts": dict(self._counts), "first_bad": self._first_bad}

    def load_state_dict(self, state: Mapping) -> None:
        self._sums = {name: value.to(self._dtype).to(self._device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._first_bad = state["first_bad"].to(self._device)

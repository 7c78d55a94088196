"""The progress of a long stage: a bar on a terminal, a line per epoch, plain lines in between, an early estimate."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_PERIODS = 3.0  # of which a line tells; a search has many short ones
UPDATES_TO_ESTIMATE = 3


class Progress:
    """Counts the steps of one stage. After its first few steps it says how long the rest will take."""

    def __init__(self, label: str, total: int, *, done: int = 0, unit: str = "step", silent: bool = False):
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._first = done
        self._start = self._last_line = self._last_period = time.monotonic()
        self._updates = 0
        self._bar = None
        self._silent = silent
        if sys.stderr.isatty() and not silent:
            self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)
        resumed = f", resumed after {done}" if done else ""
        self._report(f"{label}: {total} {unit}s{resumed}")

    def update(self, steps: int = 1, note: str = "") -> None:
        """Count `steps`; `note` ends the line."""
        if steps == 0:  # nothing could be read
            return
        self.done += steps
        now = time.monotonic()
        self._updates += 1
        if self._updates == 1:  # the first step warms up caches and kernels: the estimate counts from its end
            self._first, self._start = self.done, now
        if self._bar is not None:
            self._bar.update(steps)
            if note:
                self._bar.set_postfix_str(note)
        if self.done >= self.total or self._updates == 1:
            return
        if self._updates == UPDATES_TO_ESTIMATE:
            self._report(f"{self.label}: about {self._left(now)}, judging by the first {self.unit}s")
        elif self._bar is None and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._report(f"{self.label}: {self.done}/{self.total}, {self._left(now)} left{', ' + note if note else ''}")

    def tell(self, text: str, *, always: bool = False) -> None:
        """Say what came of an epoch: of the last one, and of others if some seconds have passed, or `always`."""
        now, ended = time.monotonic(), self.done >= self.total
        if always or ended or now - self._last_period > SECONDS_BETWEEN_PERIODS:
            self._last_line = self._last_period = now
            left = "" if ended or self.done == self._first else f", {self._left(now)} left"
            self._report(f"{self.label}: {text}{left}")

    def _left(self, now: float) -> str:
        return duration((now - self._start) / (self.done - self._first) * (self.total - self.done))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, line: str) -> None:
        if not self._silent:
            self.say(line)

    @staticmethod
    def say(line: str) -> None:
        """Print a line without breaking a bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def measures(values: Mapping[str, float]) -> str:
    """`loss 0.412, accuracy 88.3 %, validation 91.2 %, test 90.8 %`: what people watch of a row of the log.

    A search has no validation accuracy; its validation loss stands there.
    """
    found = [f"loss {values['loss']:.3f}"]
    if "val_loss" in values and "val_accuracy" not in values:
        found.append(f"validation loss {values['val_loss']:.3f}")
    shares = {"accuracy": "accuracy", "val_accuracy": "validation", "test_accuracy": "test"}
    return ", ".join(
        found + [f"{title} {100 * values[name]:.1f} %" for name, title in shares.items() if name in values]
    )


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"

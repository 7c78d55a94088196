"""The progress of a long stage: a bar on a terminal, plain lines elsewhere, and an early estimate."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
UPDATES_TO_ESTIMATE = 3


class Progress:
    """Counts the steps of one stage. After its first few steps it says how long the rest will take."""

    def __init__(self, label: str, total: int, *, done: int = 0, unit: str = "step", silent: bool = False):
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._first = done
        self._start = self._last_line = time.monotonic()
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
        left = duration((now - self._start) / (self.done - self._first) * (self.total - self.done))
        if self._updates == UPDATES_TO_ESTIMATE:
            self._report(f"{self.label}: about {left}, judging by the first {self.unit}s")
        elif self._bar is None and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._report(f"{self.label}: {self.done}/{self.total}, {left} left{', ' + note if note else ''}")

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


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"

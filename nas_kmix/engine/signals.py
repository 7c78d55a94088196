"""Requests to stop, by SIGINT or SIGTERM.

A loop checks for one after each step. Code that waits for other processes does so inside `waiting()`, which ends the
wait.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SECONDS_TO_WAIT = 5.0  # after a signal, for what other processes are to give; Docker kills after ten

_waiting_since: float | None = None


class StoppedError(Exception):
    """A signal asked the run to stop; its state is `saved`, or that of its last checkpoint is all there is."""

    def __init__(self, signum: int, *, saved: bool = True):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.saved = signum, saved


class StopSignals:
    """Takes SIGINT and SIGTERM for a request from `install` to `restore`. In another than the main thread it does
    nothing: a notebook's or a test's signals are not ours then."""

    def __init__(self, *, speaks: bool):
        self.signum: int | None = None
        self._speaks = speaks
        self._since = 0.0
        self._old_handlers = {}

    def install(self) -> None:
        handlers = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
        if hasattr(signal, "SIGALRM"):  # Windows has none
            handlers[signal.SIGALRM] = self._on_alarm
        with suppress(ValueError):
            for signum, handler in handlers.items():
                self._old_handlers[signum] = signal.signal(signum, handler)

    def restore(self) -> None:
        if self.signum is not None and signal.SIGTERM in self._old_handlers and hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self.signum, self._since = signum, time.monotonic()
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
        if not self._speaks:
            return
        with suppress(OSError, RuntimeError):  # the terminal may be gone, or be in the middle of a write
            os.write(sys.stderr.fileno(), b"\nfinishing the step and saving; Ctrl-C again to stop at once\n")

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        """Every second after a signal: leave a wait that does not end, wherever it blocks."""
        if _waiting_since is not None and time.monotonic() - max(_waiting_since, self._since) >= SECONDS_TO_WAIT:
            raise StoppedError(self.signum, saved=False)


@contextmanager
def waiting() -> Iterator[None]:
    """Where the block waits for other processes; a signal raises StoppedError there after `SECONDS_TO_WAIT`."""
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None

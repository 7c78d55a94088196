"""Child processes of one thread each, which work through tasks and end with this process, even if it is killed.

In:  a picklable function, and its arguments one by one. Out: its results, as they come or in order.

Children are spawned, so they share no state with this process and write nothing of its run. A result therefore depends
on its task alone, not on the number of children.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LOOKS = 0.2  # for a request to stop

Name = TypeVar("Name")
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


class ChildError(OSError):
    """A child process was lost; the message says what to do."""


class Children(Generic[Name, Task, Outcome]):
    """Up to `jobs` children that call `function`. Use as a context manager, which kills them at its end.

    `function` is sent once to each child, so what all tasks need may be part of it. It must belong to a module that can
    be imported. Send arrays, not tensors: those would go through shared memory, of which containers have little.
    """

    def __init__(self, function: Callable[[Task], Outcome], jobs: int):
        self._function, self.jobs = function, jobs
        self._waiting: deque[tuple[Name, Task]] = deque()
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Name] = {}
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Children[Name, Task, Outcome]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5)
        for ours in (*self._idle, *self._busy):
            ours.close()

    @property
    def unfinished(self) -> int:
        """Number of tasks without a result."""
        return len(self._waiting) + len(self._busy)

    def submit(self, name: Name, task: Task) -> None:
        """Add a task; it begins as soon as a child is free. `name` comes back with its result."""
        self._waiting.append((name, task))
        self._hand_out()

    def ready(self, seconds: float) -> bool:
        """Whether a result has come, or comes within so many seconds; at once False where no child works."""
        return bool(self._busy) and bool(connection.wait(list(self._busy), seconds))

    def next(self, check: Callable[[], None] = lambda: None) -> tuple[Name, Outcome]:
        """Wait for the next result of any task. `check` is called in between and may raise.

        Raises what the function raised, and ChildError where a child was lost.
        """
        assert self._busy, "no task was submitted"
        while not (ready := connection.wait(list(self._busy), SECONDS_BETWEEN_LOOKS)):
            check()
        ours = ready[0]
        try:
            outcome, error = ours.recv()
        except (EOFError, ConnectionError):
            raise ChildError(
                "A child process has ended before its work was done (out of memory?): use fewer --jobs."
            ) from None
        name = self._busy.pop(ours)
        self._idle.append(ours)
        if error is not None:
            raise error
        self._hand_out()
        return name, outcome

    def _hand_out(self) -> None:
        while self._waiting and (self._idle or len(self._processes) < self.jobs):
            ours = self._idle.pop() if self._idle else self._start()
            name, task = self._waiting.popleft()
            self._busy[ours] = name
            with suppress(ConnectionError):  # it has ended, as `next` will say
                ours.send(task)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _signals_for_this_process_alone(), without_main_module():
            process.start()
        theirs.close()  # so that its end is the end of the pipe
        self._processes.append(process)
        with suppress(ConnectionError):  # it has ended, as `next` will say
            ours.send(self._function)
        return ours


def run_in_children(
    function: Callable[[Task], Outcome],
    tasks: Sequence[Task],
    *,
    jobs: int,
    check: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """The results of all tasks, in their order, computed by up to `jobs` children. Raises as `Children.next` does."""
    results: dict[int, Any] = {}
    with Children(function, jobs) as children:
        for i, task in enumerate(tasks):
            children.submit(i, task)
        while children.unfinished:
            i, results[i] = children.next(check)
    return [results[i] for i in range(len(tasks))]


@contextmanager
def _signals_for_this_process_alone() -> Iterator[None]:
    """Ctrl-C and job schedulers signal whole process groups; a child that is started here never sees that.

    It inherits the mask. This process gets what comes in meanwhile at the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which clears the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def without_main_module() -> Iterator[None]:
    """A child that is started in the block does not import the script that this process runs.

    Nothing of it is needed, and one without `if __name__ == "__main__"` would run again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# -- in a child --------------------------------------------------------------------------------------------------------


def _serve(theirs: Connection) -> None:
    """Take a function, then its tasks, and send results until the parent process ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()  # before seconds of imports
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave in the system
    with suppress(EOFError):  # the parent has ended
        function = theirs.recv()
        import torch

        torch.set_num_threads(1)
        while True:
            _answer(theirs, function, theirs.recv())


def _answer(theirs: Connection, function: Callable[[Any], Any], task: Any) -> None:
    try:
        result = (function(task), None)
    except Exception as error:
        result = (None, error)
    theirs.send(result)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, in whatever it is doing."""
    multiprocessing.parent_process().join()
    os._exit(1)

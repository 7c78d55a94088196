"""The child processes of all ranks as one crew, among which tasks are dealt out.

In:  tasks, the same ones in every process of a world. Out: their results as they come, the same ones in the same order
in every process.

All processes keep the same books, so each knows without asking who takes which task. A few times a second they tell
each other what has come. So none is left waiting for another, however long a task takes, and all stop together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic

from nas_kmix.engine.children import SECONDS_BETWEEN_LOOKS, Children, Name, Outcome, Task
from nas_kmix.engine.distributed import World


class Crew(Generic[Name, Task, Outcome]):
    """All processes of `world` make one, each of its own `children`, and call its methods in the same order."""

    def __init__(self, children: Children[Name, Task, Outcome], world: World):
        self._children, self._world = children, world
        self._free: list[int] = world.gather(children.jobs)  # by rank; machines may have different numbers
        self._waiting: deque[tuple[Name, Task]] = deque()
        self._takers: dict[Name, int] = {}
        self._results: deque[tuple[Name, Outcome]] = deque()

    @property
    def unfinished(self) -> int:
        """Number of tasks whose results `next` has not returned."""
        return len(self._waiting) + len(self._takers) + len(self._results)

    def submit(self, name: Name, task: Task) -> None:
        """Add a task; it begins as soon as a child is free. `name`, its own, comes back with its result."""
        self._waiting.append((name, task))
        self._deal()

    def next(self, check: Callable[[], None] = lambda: None) -> tuple[Name, Outcome]:
        """Wait for the next result of any task. `check` is called in between, by all processes, and may raise.

        Raises everywhere what `Children.next` raises in one of the processes.
        """
        assert self.unfinished, "no task was submitted"
        while not self._results:
            for found, error in self._world.gather(self._found()):  # this is a sync point
                if error is not None:
                    raise error
                for name, outcome in found:
                    self._free[self._takers.pop(name)] += 1
                    self._results.append((name, outcome))
            if not self._results:
                check()
            self._deal()
        return self._results.popleft()

    def _found(self) -> tuple[list[tuple[Name, Outcome]], Exception | None]:
        """What this process's children have finished within a moment, and the error of one of them."""
        found = []
        try:
            while self._children.ready(0.0 if found else SECONDS_BETWEEN_LOOKS):
                found.append(self._children.next())
        except Exception as error:
            return found, error
        return found, None

    def _deal(self) -> None:
        """Give waiting tasks to the process with the most children free, the first of equal ones."""
        while self._waiting and (most := max(self._free)) > 0:
            rank, (name, task) = self._free.index(most), self._waiting.popleft()
            self._free[rank] -= 1
            self._takers[name] = rank
            if rank == self._world.rank:
                self._children.submit(name, task)

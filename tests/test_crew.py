"""Tasks dealt out to the children of several ranks: each to one, and the same results in the same order everywhere.

The ranks are threads here and their children only pretend; test_finals_ranks.py has processes.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from crew_ranks import slowest_first
from ranks import needs_proc, run_ranks

from nas_kmix.engine.crew import Crew
from nas_kmix.engine.distributed import World

PATIENCE = 60  # seconds until threads that wait for each other fail their test


class Together:
    """Lets threads exchange what `World.gather` exchanges between processes."""

    def __init__(self, size):
        self._given, self._barrier = [None] * size, threading.Barrier(size, timeout=PATIENCE)

    def world(self, rank):
        return type("Thread", (World,), {"gather": self._gather})(rank, len(self._given))

    def _gather(self, given):
        rank = threading.current_thread().rank
        self._given[rank] = given
        self._barrier.wait()
        everyone = list(self._given)
        self._barrier.wait()
        return everyone


class Pretended:
    """Children that finish any of their tasks, or none, whenever they are looked at."""

    def __init__(self, jobs, seed, broken=()):
        self.jobs, self.taken, self.most, self._busy = jobs, [], 0, []
        self._rng, self._broken = random.Random(seed), broken

    def submit(self, name, task):
        self.taken.append(name)
        self._busy.append((name, task))
        self.most = max(self.most, len(self._busy))

    def ready(self, seconds):
        return bool(self._busy) and self._rng.random() < 0.5

    def next(self):
        name, task = self._busy.pop(self._rng.randrange(len(self._busy)))
        if name in self._broken:
            raise ValueError(f"{name} is broken")
        return name, task**2


def on_ranks(jobs, work, **options):
    """What `work(crew)` returns on every rank, and the children of each."""
    together, children = Together(len(jobs)), [Pretended(n, rank, **options) for rank, n in enumerate(jobs)]

    def one(rank):
        threading.current_thread().rank = rank
        return work(Crew(children[rank], together.world(rank)))

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(one, range(len(jobs)))), children


def twenty_tasks(crew):
    """Ten at first, and one more after every result as long as there are fewer than twenty."""
    for name in range(10):
        crew.submit(name, name)
    results = []
    while crew.unfinished:
        results.append(crew.next())
        if len(results) <= 10:
            crew.submit(9 + len(results), 9 + len(results))
    return results


@pytest.mark.parametrize("jobs", [[1], [3], [1, 1], [2, 1], [1, 2, 4], [2] * 5])
def test_every_task_is_taken_once_and_all_ranks_see_the_same_results(jobs):
    (first, *others), children = on_ranks(jobs, twenty_tasks)
    assert sorted(first) == [(n, n**2) for n in range(20)] and all(one == first for one in others)
    assert sorted(name for one in children for name in one.taken) == list(range(20))
    assert [one.most for one in children] == jobs  # busy, but never more than they are


@pytest.mark.parametrize(
    ("jobs", "taken"), [([1, 1], [[0], [1]]), ([2, 2], [[0, 2], [1, 3]]), ([1, 3], [[2], [0, 1, 3]]), ([9, 1], None)]
)
def test_the_rank_with_the_most_children_free_takes_the_next_task(jobs, taken):
    _, children = on_ranks(jobs, lambda crew: [crew.submit(n, n) for n in range(4)])
    assert [one.taken for one in children] == (taken or [[0, 1, 2, 3], []])


def test_an_error_in_one_rank_is_raised_in_all():
    def work(crew):
        with pytest.raises(ValueError, match="3 is broken"):
            twenty_tasks(crew)
        return True

    assert on_ranks([1, 2, 1], work, broken=(3,))[0] == [True] * 3


def test_all_ranks_look_equally_often_whether_to_stop():
    def looks(crew):
        count = 0

        def look():
            nonlocal count
            count += 1

        for name in range(6):
            crew.submit(name, name)
        while crew.unfinished:
            crew.next(look)
        return count

    found, _ = on_ranks([1, 2], looks)
    assert found[0] == found[1] > 0


@needs_proc
@pytest.mark.slow
def test_ranks_without_work_outlast_a_task_that_takes_longer_than_gloo_waits(server, tmp_path):
    run_ranks(server, 2, slowest_first, tmp_path, timedelta(seconds=6))
    assert [(tmp_path / name).read_text() for name in "01"] == ["[1.0, 0.5, 12.0]"] * 2

"""What each process runs in test_crew.py: one waits for the other for longer than gloo would."""

import time

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from nas_kmix.engine.children import Children
from nas_kmix.engine.crew import Crew
from nas_kmix.engine.distributed import joined


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def slowest_first(folder, patience):
    with joined(torch.device("cpu")) as world, Children(sleep, 1) as children:
        _set_pg_timeout(patience)  # half an hour by default
        crew = Crew(children, world)
        for seconds in (2 * patience.total_seconds(), 1.0, 0.5):
            crew.submit(seconds, seconds)
        found = []
        while crew.unfinished:
            found.append(crew.next()[1])
        (folder / str(world.rank)).write_text(str(found))

"""The processes that decode image files for a DataLoader: their room in shared memory, their loss, and their end.

Whatever becomes of the command, they end with it. What cannot be sent from a worker is never waited for.
"""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nas_kmix.engine.compute import cores
from nas_kmix.engine.distributed import is_main, local_processes
from nas_kmix.engine.progress import Progress
from nas_kmix.engine.signals import waiting

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108, nothing of ours is put there by name
PREFETCH = 2  # batches that every worker prepares ahead
HUNGRY = 0.5  # share of the time spent waiting for images, over a minute, from which it is worth a line
LOOK_EVERY = 60  # seconds without a batch until there is a warning
MORE_ROOM = "give the container more, e.g. docker run --shm-size=8g"
DEAD = "DataLoader worker (pid"  # how torch begins to say that a worker was lost, wherever this process is then

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
"""Those that this process has started."""
_passes: weakref.WeakSet[Any] = weakref.WeakSet()
"""torch's iterators over the data, which know their workers."""
_at_exit: list[util.Finalize] = []


class WorkerError(OSError):
    """Worker processes were lost or cannot do their work; the message says what to do."""


# -- in the main process -----------------------------------------------------------------------------------------------


def read(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches, from workers that end with this process.

    A slow disk is waited for, with a warning; a lost worker is not. Raises WorkerError, and StoppedError where a
    signal came in and no batch after it.
    """
    iterator, warned, before = _begin(loader), False, None
    while True:
        asked = time.monotonic()
        try:
            with waiting():
                batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if (sentence := explain(error)) is not None:
                raise WorkerError(sentence) from error
            if not str(error).startswith("DataLoader timed out"):
                raise
            pinning = getattr(iterator, "_pin_memory_thread", None)
            if pinning is not None and not pinning.is_alive():
                raise WorkerError("The thread that moves images to the GPU has ended; use --workers 0.") from error
            if not warned:
                Progress.say(
                    f"warning: no batch of images for {LOOK_EVERY} s: the disk is slow, or the worker processes are "
                    "stuck, and --workers 0 does without them"
                )
            warned = True
            continue
        if isinstance(batch, str):
            raise WorkerError(batch)
        now = time.monotonic()
        if before is not None:  # the first batch of a pass is always waited for
            _hunger.note(now - asked, now - before, loader.num_workers)
        before = now
        yield batch


@dataclass
class Hunger:
    """How much of the time goes into waiting for images; too much of it is said once."""

    waited: float = 0.0
    passed: float = 0.0
    said: bool = False

    def note(self, waited: float, passed: float, workers: int) -> None:
        """Of the seconds that have `passed` since the batch before, some were `waited`."""
        self.waited, self.passed = self.waited + waited, self.passed + passed
        if self.said or self.passed < LOOK_EVERY:
            return
        in_child = multiprocessing.parent_process() is not None  # one of several that read as they compute
        if self.waited > HUNGRY * self.passed and is_main() and not in_child:
            self.said, most = True, cores()
            remedy = "store smaller copies of the images, or use a faster disk"
            if workers < most:
                remedy = f"raise --workers, now {workers} for {most} cores"
            share = 100 * self.waited / self.passed
            Progress.say(f"warning: {share:.0f} % of the time is spent waiting for images to be read; {remedy}")
        self.waited = self.passed = 0.0


_hunger = Hunger()


def _begin(loader: DataLoader) -> Iterator[Any]:
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
        _passes.add(iterator)
        return iterator
    except OSError as error:
        room = "no room in shared memory" if error.errno == errno.ENOSPC else str(error.strerror or error)
        raise WorkerError(
            f"The worker processes cannot be started ({room}): use fewer --workers, or --workers 0"
            f"{f'; or {MORE_ROOM}' if error.errno == errno.ENOSPC else ''}."
        ) from error
    finally:  # also those of a start that failed half way
        _workers.update(set(multiprocessing.active_children()) - before)
        if not any(finalizer.still_active() for finalizer in _at_exit):
            # At exit multiprocessing asks its children to end and then waits without limit; this comes before.
            _at_exit[:] = [util.Finalize(None, end_workers, exitpriority=100)]


def end_workers() -> None:
    """Kill this process's workers, which leave the signals of a terminal or scheduler to it, and see them gone."""
    workers = [worker for worker in _workers if worker._parent_pid == os.getpid()]
    _workers.clear()
    with _deaths_expected():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
    for iterator in list(_passes):
        if workers and not getattr(iterator, "_shutdown", True):  # torch would write to workers that are gone
            iterator._shutdown = True
            for queue in iterator._index_queues:
                queue.cancel_join_thread()
                queue.close()
    _passes.clear()


@contextmanager
def _deaths_expected() -> Iterator[None]:
    """Without torch's handler, which raises an error wherever the main thread is when a worker has died."""
    try:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except (ValueError, AttributeError):  # another thread than the main one, or Windows
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def explain(error: BaseException) -> str | None:
    """A sentence for torch's error about a lost worker, which may come up anywhere; None for any other error."""
    if not isinstance(error, RuntimeError) or not str(error).startswith(DEAD):
        return None
    killed = "killed by signal: Killed" in str(error) or any(worker.exitcode == -9 for worker in _workers)
    cause = "was killed (out of memory?)" if killed else "has ended"
    return f"A worker process that decodes images {cause}: use fewer --workers, or --workers 0."


def check_room(batch_size: int, image_size: int, workers: int, *, processes: int | None = None) -> None:
    """Raise ValueError where the batches that the workers prepare ahead do not fit into shared memory.

    Containers often have 64 MB of it. `processes` share it, by default those that torchrun has started on this machine.
    """
    if workers == 0 or not SHARED_MEMORY.is_dir():
        return
    processes = processes or local_processes()
    batch = batch_size * 3 * image_size * image_size * processes
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = _needed(batch, workers)
    if needed <= free:
        return
    fitting = max((n for n in range(1, workers) if _needed(batch, n) <= free), default=0)
    fewer = f"--workers {fitting} or --workers 0" if fitting else "--workers 0"
    raise ValueError(
        f"{workers} worker processes with batches of {batch_size} images need {_in_mb(needed)} of shared memory, but "
        f"{SHARED_MEMORY} has {_in_mb(free)} free. Use {fewer}, or give the container more: "
        f"docker run --shm-size={max(1, -(-2 * needed // 10**9))}g."
    )


def _needed(batch: int, workers: int) -> int:
    return batch * (PREFETCH * workers + 1)  # one more is being used


def _in_mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


# -- in a worker -------------------------------------------------------------------------------------------------------


def prepare_worker(worker: int) -> None:
    """Ctrl-C and job schedulers signal whole process groups. The main process finishes its step, for which it needs the
    workers, and then ends them; should it be killed, they notice and end themselves."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(_end_instead_of_dropping)


def _end_instead_of_dropping(error: Exception, batch: object) -> None:
    """multiprocessing prints the error and drops the batch, for which the main process would wait for ever."""
    sys.stderr.write(f"a worker process cannot hand over its batch: {error}\n")
    sys.stderr.flush()
    os._exit(1)


def empty_batch(*shape: int) -> Tensor | str:
    """uint8 without values, in a worker already in shared memory; a sentence where that is full."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # `share_memory_` would copy what has no values
    except (RuntimeError, OSError) as error:
        return (
            f"The worker processes have no room in shared memory for a batch of {shape[0]} images ({error}): use "
            f"--workers 0, or {MORE_ROOM}."
        )
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)

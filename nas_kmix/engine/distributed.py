"""One job on several devices or machines, started by torchrun: which process this is, and what all agree on.

Without torchrun the world is a single process and every function here returns at once. CPUs exchange
decisions (gloo), devices exchange gradients through DistributedDataParallel (NCCL on GPUs).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from nas_kmix.engine.signals import waiting

PATIENCE = timedelta(minutes=30)  # gloo's default; torchrun ends the others long before where one has failed
LONGEST_WAIT = timedelta(days=365)  # at a barrier, where another process may have work of its own
SECONDS_BETWEEN_LOOKS = 0.05


def local_processes() -> int:
    """Processes that torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; only rank 0 writes files and prints."""

    rank: int = 0
    size: int = 1
    patient: distributed.ProcessGroup | None = None
    """All processes again, for waits of any length."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def deals_out(self, tasks: int) -> bool:
        """Whether several processes take whole tasks each, instead of sharing the work of every task."""
        return 1 < self.size <= tasks

    def share(self, n: int) -> slice:
        """This process's slice of `n` items; the sizes of the slices differ by at most one."""
        bounds = [n * rank // self.size for rank in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def highest(self, *values: float) -> list[float]:
        """The highest of each value in any process (a sync point)."""
        return self._reduce(values, distributed.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes (a sync point)."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def _reduce(self, values: tuple[float, ...], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(together, operation)
        return together.tolist()

    def gather(self, given: Any) -> list[Any]:
        """What each process gives, anything that can be pickled, in rank order (a sync point)."""
        everyone = [given] * self.size
        if self.size > 1:
            distributed.all_gather_object(everyone, given)
        return everyone

    def barrier(self) -> None:
        """Wait until every process gets here, however long another one works alone.

        Raises StoppedError where a signal comes in and the others do not follow.
        """
        if self.size == 1:
            return
        everyone = distributed.all_reduce(torch.zeros(1), group=self.patient, async_op=True)
        with waiting():
            while not everyone.is_completed():
                time.sleep(SECONDS_BETWEEN_LOOKS)
        everyone.wait()

    def align_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of rank 0."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """A module whose backward pass averages the gradients over the processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def is_main() -> bool:
    """Whether this process is rank 0 or alone, even before a world exists and after it has ended."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world in which torchrun started this process, or that of a single process.

    Raises ValueError for an environment that torchrun does not make, and OSError with one sentence if the processes do
    not find each other or one of them is lost.
    """
    size = _world_size()
    if size == 1:
        yield World()
        return
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=unused_part(store, rank, size), rank=rank, world_size=size)
    except (distributed.DistError, RuntimeError) as error:
        raise OSError(
            f"The processes of this job do not find each other ({_first_line(error)}): one of them has ended, the "
            f"address or port that torchrun was given is wrong, or this PyTorch lacks the backend."
        ) from error
    try:
        yield World(distributed.get_rank(), size, distributed.new_group(timeout=LONGEST_WAIT, backend="gloo"))
    except (distributed.DistError, RuntimeError) as error:
        if "connection" not in str(error).lower() and not isinstance(error, distributed.DistError):
            raise
        raise OSError(f"Another process of this job has ended ({_first_line(error)}); its own log says why.") from error
    finally:
        distributed.destroy_process_group()


def unused_part(store: distributed.Store, rank: int, size: int) -> distributed.Store:
    """A part of the store that the processes of this start alone write to (a sync point).

    torchrun keeps one store for all its restarts. It holds the addresses of processes that have ended, which the new
    ones would try to reach (pytorch issue 135712), and the number of the restart differs between machines. So rank 0
    makes up a name, and tells it to whoever asks with a word that nobody has asked with before.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"nas_kmix/asks/{rank}", word)
        name = store.get(f"nas_kmix/answers/{word}").decode()
        store.set(f"nas_kmix/knows/{name}/{rank}", "")
        return distributed.PrefixStore(name, store)
    name, absent = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while absent:
        if time.monotonic() > deadline:
            raise distributed.DistStoreError(f"process {min(absent)} has not come within {PATIENCE}")
        for other in tuple(absent):
            if store.check([f"nas_kmix/asks/{other}"]):  # the word may be one of an earlier start: ask again
                store.set(f"nas_kmix/answers/{store.get(f'nas_kmix/asks/{other}').decode()}", name)
            if store.check([f"nas_kmix/knows/{name}/{other}"]):
                absent.remove(other)
        time.sleep(0.02)
    return distributed.PrefixStore(name, store)


def _world_size() -> int:
    """How many processes the environment says there are. Raises ValueError where it contradicts itself."""
    found = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    size = found["WORLD_SIZE"] or "1"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"The environment has WORLD_SIZE={size}, which is no number of processes; unset it.")
    if int(size) == 1:
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"The environment has WORLD_SIZE={size} but no {', '.join(missing)}; start the processes with torchrun, or "
            f"unset WORLD_SIZE for a single one."
        )
    for name, limit in (("RANK", int(size)), ("MASTER_PORT", 1 << 16)):
        if not found[name].isdecimal() or int(found[name]) >= limit:
            raise ValueError(
                f"The environment has {name}={found[name]} and WORLD_SIZE={size}; {name} must be a number below "
                f"{limit}. Start the processes with torchrun, or unset WORLD_SIZE for a single one."
            )
    return int(size)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, if torchrun started one process per GPU; the only one that it sees, if there is one."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else int(os.environ["LOCAL_RANK"]))
    return device

"""The ledger of a run, cost.json: seconds, image passes and peak memory of every stage, over all invocations."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nas_kmix.engine import files

try:
    import resource
except ImportError:  # Windows: peak memory is not known there
    resource = None


@dataclass
class StageCost:
    """What one stage has cost over all invocations.

    skipped: this invocation did not run it, as its result exists or is not needed; peak_rss_bytes: the most memory the
    process had held by the end of the stage, earlier stages and the data included.
    """

    wall_s: float = 0.0
    images_forward: int = 0
    images_backward: int = 0
    peak_rss_bytes: int = 0
    skipped: bool = True


class Ledger:
    """The bills of `stages`, in the order in which they run; only a ledger that `writes` touches the file `path`."""

    def __init__(self, path: Path, stages: tuple[str, ...], *, writes: bool = True):
        self.costs = {stage: StageCost() for stage in stages}
        self._path, self._writes = path, writes
        self._billing: tuple[StageCost, float] | None = None

    @property
    def started(self) -> bool:
        """Whether this invocation has run a stage, so that the folder is no longer as it was found."""
        return any(not cost.skipped for cost in self.costs.values())

    def foreign_stages(self) -> list[str]:
        """Stages in the file that this ledger does not have; none if the file is missing or damaged."""
        try:
            return [str(stage) for stage in files.read_json(self._path)["stages"] if stage not in self.costs]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def read_back(self) -> None:
        """Load the bills of earlier invocations, also of a version with fewer stages; a damaged file counts as none."""
        with suppress(ValueError, KeyError, TypeError):
            recorded = files.read_json(self._path)["stages"]
            self.adopt(self._path, tuple(stage for stage in self.costs if stage in recorded))

    def clear(self) -> None:
        self.costs = {stage: StageCost() for stage in self.costs}

    @contextmanager
    def billing(self, stage: str) -> Iterator[StageCost]:
        """Bill the time of the block to `stage`; the caller adds image passes to the yielded cost.

        A nested stage pauses the bill of the outer one.
        """
        outer = self._billing
        if outer is not None:
            self.write()
        cost = self.costs[stage]
        cost.skipped = False
        self._billing = (cost, time.monotonic())
        try:
            yield cost
        finally:
            self.write()
            self._billing = None if outer is None else (outer[0], time.monotonic())

    def write(self) -> None:
        """Update the file, even in the middle of a stage, so that a killed run is still billed."""
        if self._billing is not None:
            cost, since = self._billing
            now = time.monotonic()
            cost.wall_s += max(0.0, now - since)  # a clock that is set back costs nothing
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, peak_rss_bytes())
            self._billing = (cost, now)
        total = {
            "wall_s": sum(cost.wall_s for cost in self.costs.values()),
            "images_forward": sum(cost.images_forward for cost in self.costs.values()),
            "images_backward": sum(cost.images_backward for cost in self.costs.values()),
            "peak_rss_bytes": max(cost.peak_rss_bytes for cost in self.costs.values()),
        }
        if self._writes:
            stages = {name: asdict(cost) for name, cost in self.costs.items()}
            files.write_json(self._path, {"stages": stages, "total": total})

    def adopt_from_run(self, given: Path, stage: str) -> bool:
        """Bill what `given`, the result of `stage` in another run's folder, cost there, with the stages before it.

        Returns False if that run's ledger does not say.
        """
        if given.parent.resolve() == self._path.parent.resolve():
            return True
        names = tuple(self.costs)
        return self.adopt(given.parent / self._path.name, names[: names.index(stage) + 1])

    def adopt(self, cost_json: Path, stages: tuple[str, ...]) -> bool:
        """Copy the bills of `stages` from another ledger; False if it does not have them."""
        try:
            recorded = files.read_json(cost_json)["stages"]
            adopted = {
                stage: StageCost(
                    wall_s=float(recorded[stage]["wall_s"]),
                    images_forward=int(recorded[stage]["images_forward"]),
                    images_backward=int(recorded[stage]["images_backward"]),
                    peak_rss_bytes=int(recorded[stage]["peak_rss_bytes"]),
                )
                for stage in stages
            }
        except (ValueError, KeyError, TypeError, OverflowError):
            return False
        if not all(0 <= value < math.inf for cost in adopted.values() for value in asdict(cost).values()):
            return False
        self.costs.update(adopted)
        return True


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory of the GPU that this process has held so far; without a GPU, the most main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory this process has held so far; 0 if the system does not say."""
    if sys.platform == "linux":  # where ru_maxrss starts from the parent's memory
        with suppress(OSError, StopIteration):
            status = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

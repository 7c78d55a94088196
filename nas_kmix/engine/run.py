"""One run: its folder, its lock, its ledger of cost, and the wish to stop.

A run goes through stages. Each ends in one self-describing file whose *key* (the stage's own config fields and the
hashes of its inputs) tells whether it can be used again; see `check_key`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import numpy as np
import torch

from nas_kmix.engine import files
from nas_kmix.engine.device import autocast, to_layout
from nas_kmix.engine.distributed import World
from nas_kmix.engine.events import EventFile
from nas_kmix.engine.progress import Progress

try:
    import fcntl
    import resource
except ImportError:  # Windows: a second run in one folder is not refused there, and peak memory not known
    fcntl = resource = None

LOCK = ".lock"
SECONDS_BETWEEN_CHECKPOINTS = 60.0

_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()
"""Those that this process holds."""


def _leave_locks_to_parent() -> None:
    """A data loader's worker outlives a killed run by seconds; with the lock, it would keep the next one out."""
    while _locks:
        _locks.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


class StoppedError(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StageMismatchError(ValueError):
    """A file of an earlier run stands where stage `stage` would write, made with other settings."""

    def __init__(self, message: str, stage: str):
        super().__init__(message)
        self.stage = stage


@dataclass
class StageCost:
    """What one stage has cost over all invocations.

    skipped: this invocation did not run it, as its result was there or not needed; peak_rss_bytes: the most memory the
    process had held by the end of the stage, earlier stages and the data included.
    """

    wall_s: float = 0.0
    images_forward: int = 0
    images_backward: int = 0
    peak_rss_bytes: int = 0
    skipped: bool = True


class Run:
    """An open run folder. Use as a context manager: it holds the lock and the signal handlers."""

    def __init__(
        self,
        folder: Path,
        *,
        stages: tuple[str, ...],
        device: torch.device | str = "cpu",
        amp: str = "off",
        channels_last: bool = False,
        checkpoints: str = "checkpoints",
        compared_by: tuple[str, ...] = (),
        world: World | None = None,
    ):
        """`checkpoints` is the subfolder of what stages resume from; "." where those files are results themselves.

        `compared_by` names the scalars by which TensorBoard compares runs, e.g. "search/val_loss".
        Of the processes of a `world` only rank 0 writes, and all read, so that they need the folder in common.
        """
        self.world = world or World()
        self.folder = Path(folder)
        self._checkpoints, self._compared_by = checkpoints, compared_by
        self.device, self.amp, self.channels_last = torch.device(device), amp, channels_last
        self.costs = {stage: StageCost() for stage in stages}
        self.records: dict[str, Any] = {}
        """JSON files that describe the run; written when its first stage starts, so that a refused command leaves those
        of the results in place."""
        self._signum: int | None = None
        self._lock: IO[str] | None = None
        self._new = False
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._events: EventFile | None = None
        self._checkpoint_time = time.monotonic()

    def __enter__(self) -> Run:
        self._refuse_folder_of_another_command()
        if self.world.main:
            self._take_folder()
        self.world.barrier()
        self._read_back()
        self._old_handlers = {}
        with suppress(ValueError):  # not the main thread: a notebook's or a test's own; signals are not ours then
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[signum] = signal.signal(signum, self._on_signal)
        return self

    def _refuse_folder_of_another_command(self) -> None:
        try:
            foreign = [stage for stage in files.read_json(self.path("cost.json"))["stages"] if stage not in self.costs]
        except (OSError, ValueError, KeyError, TypeError):
            return  # a new folder, or a damaged record of it
        if foreign:
            raise ValueError(
                f"--out {self.folder} holds the run of another command (stages {', '.join(foreign)}); choose another."
            )

    def _take_folder(self) -> None:
        try:
            self._new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115, __exit__ closes it
        except OSError as error:
            raise OSError(f"--out {self.folder} cannot be written to: {error.strerror}.") from error
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise ValueError(
                    f"--out {self.folder} is in use by another run; wait for it or choose another."
                ) from None
        _locks.add(self._lock)
        for place in ("", "checkpoints/", "seed-*/"):
            for leftover in self.folder.glob(f"{place}*{files.TEMPORARY_SUFFIX}"):  # of a run killed while writing
                leftover.unlink()

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)
        if self._lock is not None:
            if self._new and exc_info[0] is not None:
                self._remove_if_empty()
            _locks.discard(self._lock)
            self._lock.close()

    def _remove_if_empty(self) -> None:
        """A command that is refused before its first file leaves no folder behind."""
        with suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()

    def go_on_alone(self) -> bool:
        """End the common work of the processes: True in the one that does the rest by itself."""
        main, self.world = self.world.main, World() if self.world.main else self.world
        return main

    # -- stopping ------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self._signum = signum
        if not self.world.main:
            return
        with suppress(OSError, RuntimeError):  # the terminal may be gone, or be in the middle of a write
            os.write(sys.stderr.fileno(), b"\nfinishing the step and saving; Ctrl-C again to stop at once\n")

    @property
    def stopping(self) -> bool:
        return self._signum is not None

    def raise_if_stopping(self) -> None:
        """Raise StoppedError if a signal came in, to any process of the world; call it once the state is saved."""
        (signum,) = self.world.highest(self._signum or 0)
        if signum:
            raise StoppedError(int(signum))

    # -- results and checkpoints ---------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.folder / name

    def checkpoint_due(self) -> bool:
        """Whether to save in the middle of an epoch: a signal came in, or a minute has passed, in any process."""
        due = self.stopping or time.monotonic() - self._checkpoint_time > SECONDS_BETWEEN_CHECKPOINTS
        return bool(self.world.highest(due)[0])

    def save_checkpoint(self, name: str, key: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.write_cost()  # first: killed between the two, a run has paid for work that it repeats, never the reverse
        if self.world.main:
            files.save_tensors(self.path(f"{self._checkpoints}/{name}.pt"), {"key": dict(key), **state})
        self._checkpoint_time = time.monotonic()

    def load_checkpoint(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state to go on from, None where there is none. Raises StageMismatchError for one of another command."""
        path = self.path(f"{self._checkpoints}/{name}.pt")
        if not path.exists():
            return None
        state = files.load_tensors(path)  # on the CPU: whoever takes a tensor up moves it to its device
        check_key(path, state.get("key"), key)
        return state

    @contextmanager
    def resumed(self, name: str, key: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        """`load_checkpoint` for a block that takes the state up. Raises ValueError, too, where that cannot be done."""
        state = self.load_checkpoint(name, key)
        with files.damage_named(self.path(f"{self._checkpoints}/{name}.pt"), "remove it, or use --fresh"):
            yield state

    def remove_checkpoint(self, name: str) -> None:
        if self.world.main:
            self.path(f"{self._checkpoints}/{name}.pt").unlink(missing_ok=True)
            with suppress(OSError):
                self.path(self._checkpoints).rmdir()

    def clear(self, names: tuple[str, ...]) -> None:
        """Remove the results, checkpoints and records of an earlier run (`--fresh`); nothing else in the folder."""
        records = ("config.json", "env.json", "metrics.csv", "cost.json", "events.out.tfevents.*")
        for pattern in (*names, "checkpoints/*.pt", *records):
            for path in self.folder.glob(pattern) if self.world.main else ():
                path.unlink()
        self.world.barrier()
        self.costs = {stage: StageCost() for stage in self.costs}
        self._rows.clear()

    # -- records -------------------------------------------------------------------------------------------------

    def _read_back(self) -> None:
        """Take up the records of earlier invocations, so that a resumed run ends with complete ones."""
        if self.path("cost.json").exists():
            self.adopt_costs(self.path("cost.json"), tuple(self.costs))
        with suppress(OSError, csv.Error, KeyError, TypeError, ValueError):  # up to the first damage, if any
            for row in csv.DictReader(io.StringIO(self.path("metrics.csv").read_text(encoding="utf-8"))):
                if None in row:
                    break  # it has more values than there are columns
                self._rows[row["stage"], int(row["epoch"])] = {k: v for k, v in row.items() if v}

    def log(self, stage: str, epoch: int, **values: float) -> None:
        """Add a row to `metrics.csv` and to TensorBoard. A repeated epoch replaces its row."""
        if not self.world.main:
            return
        self._rows[stage, epoch] = {"stage": stage, "epoch": epoch, **{k: f"{v:.7g}" for k, v in values.items()}}
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows.values())
        files.write_text(self.path("metrics.csv"), table.getvalue())
        from torch.utils.tensorboard.summary import scalar  # takes seconds to import

        self._show(epoch, *(scalar(f"{stage}/{name}", value) for name, value in values.items()))

    def log_picture(self, stage: str, epoch: int, name: str, pixels: np.ndarray) -> None:
        """Show uint8 (H, W, 3) in TensorBoard."""
        if self.world.main:
            from torch.utils.tensorboard.summary import image

            self._show(epoch, image(f"{stage}/{name}", pixels, dataformats="HWC"))

    def _show(self, epoch: int, *summaries: Any) -> None:
        """Add to TensorBoard's events, the flags before the first. A run goes on without them: they are copies."""
        from torch.utils.tensorboard.summary import hparams

        try:
            if self._events is None:
                config = self.path("config.json")
                flags = flat(files.read_json(config)) if config.exists() else {}
                events = EventFile(self.folder)
                events.add(0, *hparams(flags, dict.fromkeys(self._compared_by, 0.0)))
                self._events = events
            self._events.add(epoch, *summaries)
        except (OSError, ValueError) as error:
            self.say(f"warning: TensorBoard misses {self.folder}, epoch {epoch} ({error})")

    @property
    def started(self) -> bool:
        """Whether a stage has been run, so that the folder is no longer as it was found."""
        return any(not cost.skipped for cost in self.costs.values())

    def write_records(self) -> None:
        for name, record in self.records.items() if self.world.main else ():
            files.write_json(self.path(name), record)
        self.records = {}

    def keep_records(self) -> None:
        """At the end: a command that entered no stage leaves those of the results as they are, but for where the images
        lie now, config.json's `input`."""
        if not self.records:
            return  # a stage has written them
        given = self.records["config.json"]
        with suppress(ValueError, TypeError):  # there is none, or it is damaged: written anew
            self.records["config.json"] = files.read_json(self.path("config.json")) | {"input": given["input"]}
        if self.path("env.json").exists():
            del self.records["env.json"]
        self.write_records()

    @contextmanager
    def stage(self, name: str) -> Iterator[StageCost]:
        """Bill the time of the block to stage `name`; image passes are added to what it yields.

        A stage inside another one interrupts the other's bill.
        """
        self.write_records()
        outer = self._billing
        if outer is not None:
            self.write_cost()
        cost = self.costs[name]
        cost.skipped = False
        self._billing = (cost, time.monotonic())
        try:
            yield cost
        finally:
            self.write_cost()
            self._billing = None if outer is None else (outer[0], time.monotonic())

    _billing: tuple[StageCost, float] | None = None

    def write_cost(self) -> None:
        """Bring `cost.json` up to date, in the middle of a stage too, so that a killed run is still billed."""
        if self._billing is not None:
            cost, since = self._billing
            now = time.monotonic()
            cost.wall_s += max(0.0, now - since)  # a clock that is set back costs nothing
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, peak_rss_bytes())
            self._billing = (cost, now)
        rows = {name: asdict(cost) for name, cost in self.costs.items()}
        total = {
            "wall_s": sum(cost.wall_s for cost in self.costs.values()),
            "images_forward": sum(cost.images_forward for cost in self.costs.values()),
            "images_backward": sum(cost.images_backward for cost in self.costs.values()),
            "peak_rss_bytes": max(cost.peak_rss_bytes for cost in self.costs.values()),
        }
        if self.world.main:
            files.write_json(self.path("cost.json"), {"stages": rows, "total": total})

    def adopt_costs(self, cost_json: Path, stages: tuple[str, ...]) -> bool:
        """Bill what `stages` cost in the run that their result was taken from; False where that is not recorded."""
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

    # -- networks ------------------------------------------------------------------------------------------------

    def autocast(self):
        return autocast(self.device, self.amp)

    def layout(self, tensor_or_model):
        return to_layout(tensor_or_model, self.channels_last)

    def say(self, line: str) -> None:
        """Print a line without breaking a progress bar."""
        if self.world.main:
            Progress.say(line)

    def progress(self, label: str, total: int, *, done: int = 0, unit: str = "step") -> Progress:
        return Progress(label, total, done=done, unit=unit, silent=not self.world.main)


def stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's result depends on, in JSON's own types, as it is stored in the result."""
    return json.loads(json.dumps({"stage": stage, "config": dict(config), "inputs": dict(inputs)}, default=str))


def check_key(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raise StageMismatchError naming every differing field if `path` was made by another command."""
    if not isinstance(found, Mapping) or found.get("stage") != wanted["stage"]:
        raise StageMismatchError(f"{path} was not made by the stage {wanted['stage']!r}.", wanted["stage"])
    differing = []
    for part in ("config", "inputs"):
        old, new = found.get(part), wanted[part]
        old = old if isinstance(old, Mapping) else {}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                differing.append(f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}")
    if differing:
        raise StageMismatchError(f"{path} was made with other settings: {'; '.join(differing)}.", wanted["stage"])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level of `part.name`, other values than numbers and truth values as text."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return found


def peak_rss_bytes() -> int:
    """The most memory this process has held so far; 0 where the system does not tell."""
    if sys.platform == "linux":  # where ru_maxrss begins with what the parent process held
        with suppress(OSError, StopIteration):
            status = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"

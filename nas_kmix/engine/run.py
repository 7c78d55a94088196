"""One run: its open folder, its lock, and requests to stop.

A run goes through stages (`pipeline.stage`). Its `ledger` holds what they cost, its `log` what they measure.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nas_kmix.engine import files
from nas_kmix.engine.compute import Compute, DeviceConfig, environment, pick_compute
from nas_kmix.engine.distributed import World, joined
from nas_kmix.engine.keys import check_key
from nas_kmix.engine.ledger import Ledger, StageCost
from nas_kmix.engine.log import Log, OnLog
from nas_kmix.engine.progress import Progress
from nas_kmix.engine.signals import StoppedError, StopSignals

try:
    import fcntl
except ImportError:  # Windows: a second run in one folder is not refused there
    fcntl = None

LOCK = ".lock"
MARKS = ("env.json", "cost.json")  # by which a folder of ours is told: the first files written, the last removed
RECORDS = ("config.json", "metrics.csv", "events.out.tfevents.*", "checkpoints/*.pt", *MARKS)
SECONDS_BETWEEN_CHECKPOINTS = 60.0

_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()
"""The locks that this process holds."""


def _leave_locks_to_parent() -> None:
    """A data loader's worker outlives a killed run by seconds; holding the lock, it would keep the next run out."""
    while _locks:
        _locks.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


def checkpoint_name(stage: str) -> str:
    """The file in the run folder that a stage resumes from, unless it resumes from its result."""
    return f"checkpoints/{stage.replace('/', '-')}.pt"


class Run:
    """An open run folder. Use as a context manager: it holds the lock and the signal handlers.

    Only rank 0 of `world` writes, but all processes read, so they must share the folder.
    """

    on_record: Callable[..., None]
    """Called after each record of a search with what it found (see `pipeline.one_search`); set by the command."""

    def __init__(
        self,
        folder: Path,
        *,
        stages: tuple[str, ...],
        compute: Compute | None = None,
        world: World | None = None,
        results: tuple[str, ...] = (),
        compared_by: tuple[str, ...] = (),
        records: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
        quiet: bool = False,
    ):
        """`results` are the names, or patterns, of the files that the stages write besides their checkpoints.

        `records` are the JSON files that describe the run, by name. They are written when the first stage starts, so
        that a refused command keeps those of existing results. A `quiet` run says only its warnings.
        """
        self.folder = Path(folder)
        self.world = world or World()
        self.compute = compute or Compute()
        self.ledger = Ledger(self.path("cost.json"), stages, writes=self.world.main)
        self.log = Log(self.folder, compared_by=compared_by, on_log=on_log, writes=self.world.main)
        self.on_record = lambda *_, **__: None
        self._results, self._records, self.quiet = results, dict(records or {}), quiet
        self._stop = StopSignals(speaks=self.world.main)
        self._lock: IO[str] | None = None
        self._new = False
        self._checkpoint_time = time.monotonic()

    # -- the folder ----------------------------------------------------------------------------------------------

    def check_folder(self) -> None:
        """Raise ValueError if it is a file, or a folder with another command's run or with files of no run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is no folder; choose another.")
        if foreign := self.ledger.foreign_stages():
            raise ValueError(
                f"--out {self.folder} holds the run of another command (stages {', '.join(foreign)} in "
                f"{self.path('cost.json')}); choose another folder."
            )
        if not any(self.path(name).exists() for name in MARKS) and (theirs := self._files()):
            raise ValueError(
                f"--out {self.folder} holds {theirs[0].relative_to(self.folder)}, but it seems that no run has written "
                f"it: there is neither {' nor '.join(MARKS)}. Choose another folder, so that it is kept."
            )

    def __enter__(self) -> Run:
        self.check_folder()
        if self.world.main:
            self._take_folder()
        self.world.barrier()
        self.ledger.read_back()
        self.log.read_back()
        self._stop.install()
        return self

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
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    self.say(
                        f"warning: the file system of --out {self.folder} has no locks ({error.strerror}), so a second "
                        "command in this folder is not refused; start none"
                    )
                else:
                    self._lock.close()
                    raise ValueError(
                        f"--out {self.folder} is in use by another run; wait for it or choose another."
                    ) from None
        _locks.add(self._lock)
        for place in ("", "checkpoints/", "seed-*/"):
            for leftover in self.folder.glob(f"{place}*{files.TEMPORARY_SUFFIX}"):  # of a run killed while writing
                leftover.unlink()

    def __exit__(self, *exc_info) -> None:
        self._stop.restore()
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

    def path(self, name: str) -> Path:
        return self.folder / name

    def clear(self) -> None:
        """Remove the results, checkpoints and records of an earlier run (`--fresh`); nothing else in the folder."""
        for path in self._files() if self.world.main else ():
            path.unlink()
        self.world.barrier()
        self.ledger.clear()
        self.log.clear()

    def _files(self) -> list[Path]:
        """The files in the folder that have the name of one that a run writes."""
        patterns = (*self._results, *(f"seed-*/{name}" for name in RECORDS), *RECORDS)
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    # -- stages --------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str) -> Iterator[StageCost]:
        """Bill the block to stage `name`; the caller adds image passes to the yielded cost."""
        self._write_records()
        with self.ledger.billing(name) as cost:
            yield cost

    def finish(self) -> None:
        """Complete the records once all stages are done.

        A command that ran no stage keeps the existing records and updates only config.json's `input`, where the images
        are now.
        """
        if self._records:
            given = self._records["config.json"]
            with suppress(ValueError, TypeError):  # missing or damaged: written again
                self._records["config.json"] = files.read_json(self.path("config.json")) | {"input": given["input"]}
            if self.path("env.json").exists():
                del self._records["env.json"]
            self._write_records()
        self.ledger.write()

    def _write_records(self) -> None:
        for name, record in self._records.items() if self.world.main else ():
            files.write_json(self.path(name), record)
        self._records = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process work in the block without the others, which wait for it."""
        world, self.world = self.world, World()
        try:
            yield
        finally:
            self.world = world

    def say(self, line: str) -> None:
        """Print a line without breaking a progress bar."""
        if self.world.main and (not self.quiet or line.startswith("warning:")):
            Progress.say(line)

    def progress(self, label: str, total: int, *, done: int = 0, unit: str = "step") -> Progress:
        return Progress(label, total, done=done, unit=unit, silent=self.quiet or not self.world.main)

    # -- stopping and going on -----------------------------------------------------------------------------------

    def raise_if_stopping(self) -> None:
        """Raise StoppedError if a signal came in, to any process of the world; call it once the state is saved."""
        (signum,) = self.world.highest(self._stop.signum or 0)
        if signum:
            raise StoppedError(int(signum))

    def checkpoint_due(self) -> bool:
        """Whether to save in the middle of an epoch: a signal came in, or a minute has passed, in any process."""
        waited = time.monotonic() - self._checkpoint_time
        due = self._stop.signum is not None or waited > SECONDS_BETWEEN_CHECKPOINTS
        return bool(self.world.highest(due)[0])

    def save_checkpoint(self, name: str, key: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Write the checkpoint `name`, a path below the folder."""
        self.ledger.write()  # first: if killed in between, a run is billed for work that it repeats, never the reverse
        if self.world.main:
            files.save_tensors(self.path(name), {"key": dict(key), **state})
        self._checkpoint_time = time.monotonic()

    @contextmanager
    def resumed(self, name: str, key: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        """The state that `save_checkpoint` wrote, for the block to restore; None if there is none.

        Raises StageMismatchError for a state with another key, ValueError for one that cannot be restored.
        """
        path, state = self.path(name), None
        if path.exists():
            # On the CPU: whoever restores a tensor moves it to its device.
            state = files.load_tensors(path, remedy=files.REMOVE_OURS)
            check_key(path, state.get("key"), key)
        with files.damage_named(path, files.REMOVE_OURS):
            yield state

    def remove_checkpoint(self, name: str) -> None:
        if self.world.main:
            self.path(name).unlink(missing_ok=True)
            with suppress(OSError):
                self.path(name).parent.rmdir()


@contextmanager
def open_run(
    folder: Path,
    config: Mapping[str, Any],
    device: DeviceConfig,
    *,
    stages: tuple[str, ...],
    **options: Any,
) -> Iterator[Run]:
    """Open a command's run in `folder`, on its device and among its processes; `options` are those of `Run`.

    `config` goes into config.json. Raises ValueError for a folder that is in use or another command's, and for a device
    that is not available; OSError for a folder that cannot be written to.
    """
    compute = pick_compute(device)
    records = {"env.json": environment(compute.device), "config.json": config}
    options |= {"stages": stages, "records": records}
    with joined(compute.device) as world, Run(folder, compute=compute, world=world, **options) as run:
        yield run

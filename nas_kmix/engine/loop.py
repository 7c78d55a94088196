"""The one skeleton of a resumable training loop: restore, step, measure, save, stop.

In:  a `Task`, which knows its network, its batches and what to do with them; a run that saves, bills and logs.
Out: the trained task. A task that is stopped or killed at any moment and run again ends with the same bits.

Training is a sequence of periods, usually epochs, of some steps each. After every period the task says what came of it,
which goes to the log and the terminal, and its state is saved. Within a period it is saved once a minute, and when a
signal asks the run to stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from nas_kmix.engine.ledger import peak_memory_bytes
from nas_kmix.engine.meter import REMEDY, Meter
from nas_kmix.engine.progress import measures
from nas_kmix.engine.run import Run, checkpoint_name


class Ended(NamedTuple):
    """What came of a period."""

    values: Mapping[str, float]
    """A row of the log; `step` among them if the stage counts its steps."""
    files: tuple[str, ...] = ()
    """Names of the files to save the state to, besides the checkpoint."""
    evaluated: bool = False
    """Whether the values include an evaluation, which the terminal shows however short the period was."""


class Task(Protocol):
    """What the loop trains. Everything random in it is a function of (seed, period, step)."""

    def start(self, period: int) -> None:
        """Set what holds throughout a period, such as the learning rate."""

    def batches(self, period: int, first_step: int) -> Iterator[Any]:
        """The batches of the period from `first_step` on; None stands for one that could not be read."""

    def step(self, batch: Any, period: int, step: int, meter: Meter) -> int:
        """Take one step, add its sums to `meter` (`loss` among them) and return its number of images.

        An image counts once for every forward and backward pass.
        """

    def end(self, period: int, means: Mapping[str, float]) -> Ended:
        """Evaluate and record the period, given its means per image."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the names `key`, `meter`, `epoch` and `step` are the loop's."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def run_loop(
    task: Task,
    periods: Sequence[int],
    *,
    name: str,
    key: Mapping[str, Any],
    run: Run,
    checkpoint: str | None = None,
    remedy: str = REMEDY,
) -> None:
    """Run `periods`, given by their steps, from the start or from the run's checkpoint.

    `name` appears in messages; the part before its slash is the stage that is billed. The state is saved in the file
    `checkpoint`, and only a task with the same `key` resumes from it. `remedy` says what to do about a loss that is not
    finite. Raises StoppedError (the state is saved), NonFiniteLossError, StageMismatchError, and ValueError for a
    damaged checkpoint.
    """
    checkpoint = checkpoint or checkpoint_name(name)
    meter = Meter(run.compute.device, remedy)
    first_period = first_step = 0
    with run.resumed(checkpoint, key) as state:
        if state is not None:
            task.load_state_dict(state)
            if run.world.main:  # its checkpoint holds the sums of all processes
                meter.load_state_dict(state["meter"])
            first_period, first_step = int(state["epoch"]), int(state["step"])

    def save(file: str, period: int, step: int) -> None:
        meter.gather(run.world)
        meter.check(name, period)  # a state that is not finite is never saved
        position = {"meter": meter.state_dict(), "epoch": period, "step": step}
        run.save_checkpoint(file, key, {**task.state_dict(), **position})

    progress = run.progress(name, sum(periods), done=sum(periods[:first_period]) + first_step)
    if first_period == len(periods):  # a finished training: nothing to do or to bill
        progress.close()
        return
    with run.stage(name.partition("/")[0]) as cost:
        for period in range(first_period, len(periods)):
            began, images_before = time.monotonic(), cost.images_forward
            task.start(period)
            for step, batch in enumerate(task.batches(period, first_step), start=first_step):
                if batch is None:
                    continue
                images = task.step(batch, period, step, meter)
                cost.images_forward += images
                cost.images_backward += images
                progress.update(note=f"epoch {period + 1}/{len(periods)}{meter.note(name, period, step)}")
                if run.checkpoint_due() and step + 1 < periods[period]:
                    save(checkpoint, period, step + 1)
                    run.raise_if_stopping()
            meter.gather(run.world)
            meter.check(name, period)
            speed = (cost.images_forward - images_before) / max(time.monotonic() - began, 1e-9)
            ended = task.end(period, meter.means())
            machine = {"images_per_second": speed, "memory_gib": peak_memory_bytes(run.compute.device) / 2**30}
            run.log.add(name, period, machine=machine, **ended.values)
            at = f"epoch {period + 1}/{len(periods)}"
            if "step" in ended.values:
                at = f"step {ended.values['step']}/{progress.total}"
            progress.tell(f"{at}, {measures(ended.values)}, {speed:,.0f} images/s", always=ended.evaluated)
            meter, first_step = Meter(run.compute.device, remedy), 0
            for file in (*ended.files, checkpoint):
                save(file, period + 1, 0)
            run.raise_if_stopping()
    progress.close()

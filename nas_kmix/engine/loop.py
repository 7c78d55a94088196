"""The one skeleton of a resumable training loop: restore, step, measure, save, stop.

In:  a `Task`, which knows its network, its batches and what to do with them; a run to save, bill and log in.
Out: the task, trained. Stopped or killed at any moment and run again, it ends with the same bits.

A training is a row of periods of some steps each, epochs as a rule. After every period the task logs and records what
it found, and its state is saved; within one it is saved once a minute, and when a signal asks the run to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from nas_kmix.engine.meter import Meter
from nas_kmix.engine.run import Run, checkpoint_name


class Task(Protocol):
    """What a loop goes through. Everything random in it is a function of (seed, period, step)."""

    def start(self, period: int) -> None:
        """Set what holds throughout a period, such as the learning rate."""

    def batches(self, period: int, first_step: int) -> Iterator[Any]:
        """The batches of the period from `first_step` on; None takes the place of one that could not be read."""

    def step(self, batch: Any, period: int, step: int, meter: Meter) -> int:
        """Take one step and add its sums to `meter`, `loss` among them; returns the images that it was taken on.

        An image counts once for each time that it went forward and backward through the network.
        """

    def end(self, period: int, means: Mapping[str, float]) -> Sequence[str]:
        """Log and record the period, whose means per image these are.

        Returns the names of the files in which the state is to be kept, beside the checkpoint.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; `key`, `meter`, `epoch` and `step` are the loop's."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


def run_loop(
    task: Task, periods: Sequence[int], *, name: str, key: Mapping[str, Any], run: Run, checkpoint: str | None = None
) -> None:
    """Go through `periods`, the steps of each, from the start or from the run's checkpoint.

    `name` stands in messages; what comes before its slash is the stage that is billed. The state is kept in the file
    `checkpoint`, and is only taken up by a task with the same `key`. Raises StoppedError (the state is saved),
    NonFiniteLossError, StageMismatchError, and ValueError for a damaged checkpoint.
    """
    checkpoint = checkpoint or checkpoint_name(name)
    meter = Meter(run.compute.device)
    first_period = first_step = 0
    with run.resumed(checkpoint, key) as state:
        if state is not None:
            task.load_state_dict(state)
            if run.world.main:  # whose checkpoint holds the sums of all processes
                meter.load_state_dict(state["meter"])
            first_period, first_step = int(state["epoch"]), int(state["step"])

    def save(file: str, period: int, step: int) -> None:
        meter.gather(run.world)
        meter.check(name, period)  # a state that is not finite is never saved
        position = {"meter": meter.state_dict(), "epoch": period, "step": step}
        run.save_checkpoint(file, key, {**task.state_dict(), **position})

    progress = run.progress(name, sum(periods), done=sum(periods[:first_period]) + first_step)
    if first_period == len(periods):  # nothing is done, and nothing billed: a finished training tells the same again
        progress.close()
        return
    with run.stage(name.partition("/")[0]) as cost:
        for period in range(first_period, len(periods)):
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
            copies = task.end(period, meter.means())
            meter, first_step = Meter(run.compute.device), 0
            for file in (*copies, checkpoint):
                save(file, period + 1, 0)
            run.raise_if_stopping()
    progress.close()

"""The log of a run: metrics.csv, TensorBoard's file, and whoever listens.

Every stage adds a row per epoch. metrics.csv holds what the same run would repeat bit for bit. TensorBoard and `on_log`
also get speed and memory, and TensorBoard the flags and pictures.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nas_kmix.engine import files
from nas_kmix.engine.events import EventFile
from nas_kmix.engine.progress import Progress

OnLog = Callable[[str, int, dict[str, float]], None]
"""Called with a stage, e.g. "train", a step and its values, for trackers of other programs.

The step is the number of the epoch, from 0, or, in a search, of steps so far. What it raises ends the run.
"""


class Log:
    """The log in `folder`; unless it `writes`, it ignores what it is given.

    `compared_by` names the scalars by which TensorBoard compares runs, e.g. "search/val_loss". `on_log` hears of every
    row that is added, and again of a row that a resumed run repeats.
    """

    def __init__(
        self,
        folder: Path,
        *,
        compared_by: tuple[str, ...] = (),
        on_log: OnLog | None = None,
        writes: bool = True,
    ):
        self._folder, self._compared_by, self._on_log, self._writes = folder, compared_by, on_log, writes
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._events: EventFile | None = None

    def read_back(self) -> None:
        """Load the rows of earlier invocations, up to the first damaged one."""
        with suppress(OSError, csv.Error, KeyError, TypeError, ValueError):
            text = (self._folder / "metrics.csv").read_text(encoding="utf-8")
            for row in csv.DictReader(io.StringIO(text)):
                if None in row:
                    break  # it has more values than there are columns
                self._rows[row["stage"], int(row["epoch"])] = {k: v for k, v in row.items() if v}

    def clear(self) -> None:
        self._rows.clear()

    def adopt(self, folder: Path) -> None:
        """Add the rows of the log in another folder."""
        other = Log(folder, writes=False)
        other.read_back()
        for (stage, epoch), row in other._rows.items():
            self.add(stage, epoch, **{n: float(value) for n, value in row.items() if n not in ("stage", "epoch")})

    def add(self, stage: str, epoch: int, *, machine: Mapping[str, float] | None = None, **values: float) -> None:
        """Add a row. A repeated epoch replaces its row. TensorBoard plots over the value `step` if given.

        `machine` holds values that do not repeat themselves, such as speed, which metrics.csv leaves out.
        """
        if not self._writes:
            return
        self._rows[stage, epoch] = {"stage": stage, "epoch": epoch, **{k: f"{v:.7g}" for k, v in values.items()}}
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows.values())
        files.write_text(self._folder / "metrics.csv", table.getvalue())
        from torch.utils.tensorboard.summary import scalar  # takes seconds to import

        at = int(values.get("step", epoch))
        shown = {**values, **(machine or {})}
        self._show(at, *(scalar(f"{stage}/{name}", value) for name, value in shown.items()))
        if self._on_log is not None:
            self._on_log(stage, at, shown)

    def add_picture(self, stage: str, epoch: int, name: str, pixels: np.ndarray) -> None:
        """Show uint8 (H, W, 3) in TensorBoard."""
        if self._writes:
            from torch.utils.tensorboard.summary import image

            self._show(epoch, image(f"{stage}/{name}", pixels, dataformats="HWC"))

    def _show(self, epoch: int, *summaries: Any) -> None:
        """Add events for TensorBoard, preceded by the flags. They are copies, so a run goes on without them."""
        from torch.utils.tensorboard.summary import hparams

        try:
            if self._events is None:
                config = self._folder / "config.json"
                flags = flat(files.read_json(config)) if config.exists() else {}
                events = EventFile(self._folder)
                events.add(0, *hparams(flags, dict.fromkeys(self._compared_by, 0.0)))
                self._events = events
            self._events.add(epoch, *summaries)
        except (OSError, ValueError) as error:
            Progress.say(f"warning: no TensorBoard events of {self._folder}, epoch {epoch} ({error})")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings flattened to `part.name`; values other than numbers and booleans become text."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return found

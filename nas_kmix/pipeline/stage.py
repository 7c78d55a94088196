"""The interface of a stage, and the one place that decides whether its result is given, found, or made.

A stage is a module, or an object, with two names and three functions:

    NAME = "scoring"       # in messages and keys; its own checkpoint is checkpoints/scoring.pt
    FILE = "scores.npz"    # its result in the run folder, which describes itself
    key(config, *inputs)                         # what the result depends on, see `engine.keys`
    load(path, config, *inputs, run=, key=)      # read the file; refuse it if it was made with another key
    make(path, config, *inputs, run=, key=)      # compute the result, write the file, and say what came of it

`config` is the stage's own part of the flags; `inputs` are the results of earlier stages. Resuming is up to `make`,
through `engine.loop` or through `Run.resumed` and `Run.save_checkpoint`.

All processes of the run's world call `obtain`, with the same inputs, and get the same result. Of a stage with
`ALONE = True` rank 0 alone calls `make`, and the others then load what it has written; otherwise all call it, and rank
0 writes the file.

To add a stage to search.py, see `commands/search.py` (STAGES, RESULTS, REUSE and `_stages`) and `dry_run.of_search`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nas_kmix.engine.progress import duration
from nas_kmix.engine.run import Run, checkpoint_name

Result = TypeVar("Result")
Key = Mapping[str, Any]


class Stage(Protocol[Result]):
    """What `obtain` needs from a stage; a module will do."""

    NAME: str
    FILE: str

    def key(self, config: Any, *inputs: Any) -> Key: ...

    def load(self, path: Path, config: Any, *inputs: Any, run: Run, key: Key | None) -> Result | None:
        """Read the result in `path`, in the run folder or elsewhere; if `key` is None, any key will do.

        Returns None if the file is a state that `make` resumes from. Raises ValueError naming the file.
        """

    def make(self, path: Path, config: Any, *inputs: Any, run: Run, key: Key) -> Result: ...


def obtain(stage: Stage[Result], config: Any, *inputs: Any, run: Run, given: Path | None = None) -> Result:
    """The result of a stage: given by a path, found in the run folder, or made now.

    A given result is billed at its cost in its own run. A found one must have the stage's key. Raises
    ValueError (StageMismatchError for another key), StoppedError, NonFiniteLossError and OSError.
    """
    if given is not None:
        result = stage.load(given, config, *inputs, run=run, key=None)
        if not run.ledger.adopt_from_run(given, stage.NAME):
            run.say(
                f"warning: {given.parent} has no readable cost.json, so the cost of {given.name} is not billed here"
            )
        return result
    path, key = run.path(stage.FILE), stage.key(config, *inputs)
    found = bool(run.world.highest(path.exists())[0])  # all agree before one of them may write it
    result = stage.load(path, config, *inputs, run=run, key=key) if found else None
    if result is not None:
        run.say(f"{stage.NAME}: {path} is up to date, skipped")
    else:
        began = time.monotonic()
        result = _made(stage, path, config, *inputs, run=run, key=key)
        run.say(f"{stage.NAME}: done in {duration(time.monotonic() - began)}, {path}")
    run.remove_checkpoint(checkpoint_name(stage.NAME))  # a run killed just before this line leaves one behind
    return result


def _made(stage: Stage[Result], path: Path, config: Any, *inputs: Any, run: Run, key: Key) -> Result:
    if not getattr(stage, "ALONE", False):
        return stage.make(path, config, *inputs, run=run, key=key)
    if run.world.main:
        with run.alone():
            result = stage.make(path, config, *inputs, run=run, key=key)
    run.world.barrier()
    return result if run.world.main else stage.load(path, config, *inputs, run=run, key=key)

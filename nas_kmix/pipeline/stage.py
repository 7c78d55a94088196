"""The shape of every stage, and the one place where it is decided whether its result is given, found, or made.

A stage is a module, or an object, with two names and three functions:

    NAME = "scoring"       # in messages and keys; its own checkpoint is checkpoints/scoring.pt
    FILE = "scores.npz"    # its result in the run folder, which describes itself
    key(config, *inputs)                         # what the result depends on, see `engine.keys`
    load(path, config, *inputs, run=, key=)      # read the file; refuse it where it was not made with `key`
    make(path, config, *inputs, run=, key=)      # compute the result and write the file

`config` is the stage's own part of the flags, `inputs` are results of stages before it. Resuming is the business of
`make`: with `engine.loop`, or with `Run.resumed` and `Run.save_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nas_kmix.engine.run import Run, checkpoint_name

Result = TypeVar("Result")
Key = Mapping[str, Any]


class Stage(Protocol[Result]):
    """What `obtain` asks of a stage; a module will do."""

    NAME: str
    FILE: str

    def key(self, config: Any, *inputs: Any) -> Key: ...

    def load(self, path: Path, config: Any, *inputs: Any, run: Run, key: Key | None) -> Result | None:
        """The result in `path`, which need not be in the run folder; any key will do where `key` is None.

        None if the file is a state that `make` goes on from. Raises ValueError naming the file.
        """

    def make(self, path: Path, config: Any, *inputs: Any, run: Run, key: Key) -> Result: ...


def obtain(stage: Stage[Result], config: Any, *inputs: Any, run: Run, given: Path | None = None) -> Result:
    """The result of a stage: given by a path, found in the run folder, or made now.

    What is given is billed with what it cost in its own run. What is found must have the stage's key. Raises
    ValueError (StageMismatchError for another key), StoppedError, NonFiniteLossError and OSError.
    """
    if given is not None:
        result = stage.load(given, config, *inputs, run=run, key=None)
        if not run.ledger.adopt_from_run(given, stage.NAME):
            run.say(f"warning: {given.parent} has no readable cost.json, so what {given.name} cost is not billed here")
        return result
    path, key = run.path(stage.FILE), stage.key(config, *inputs)
    result = stage.load(path, config, *inputs, run=run, key=key) if path.exists() else None
    if result is not None:
        run.say(f"{stage.NAME}: {path} fits, skipped")
    else:
        result = stage.make(path, config, *inputs, run=run, key=key)
    run.remove_checkpoint(checkpoint_name(stage.NAME))  # perhaps that of a run that was killed just before this line
    return result

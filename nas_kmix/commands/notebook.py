"""Both commands as functions, for notebooks and scripts: keywords in, a run folder and its results out.

Keywords are the flags of the command, with _ for - ; those with a prefix come as a dict:

    nas_kmix.search(preset="cpu", data="cifar100", ratio=0.05, scorer={"epochs": 10}, scoring={"draws": 20})

A call without `out` has a folder of its own below `runs`, named after its settings: the same call again resumes, or
returns what is there. Errors are those of `run` in the two commands.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from darts_space import Genotype, Network, load_network
from nas_kmix.commands import search as search_command
from nas_kmix.commands import train as train_command
from nas_kmix.engine.cli import suited, with_home
from nas_kmix.engine.log import OnLog
from nas_kmix.engine.settings import configured
from nas_kmix.engine.training import BEST
from nas_kmix.engine.workers import end_workers
from nas_kmix.pipeline import network

Config = TypeVar("Config")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    folder: Path
    result: Mapping[str, Any]
    """What result.json holds: last and best accuracies, parameters, multiply-adds, seconds."""

    def network(self) -> Network:
        """The network of a genotype with the weights of the best epoch, or of the last where none was selected."""
        best = self.folder / BEST
        return load_network(best if best.exists() else self.folder / network.FILE)


def search(
    preset: str = "quick", *, out: str | Path | None = None, on_log: OnLog | None = None, **settings: Any
) -> search_command.Result:
    """Run search.py's stages, from images to a genotype, and return what they made.

    `on_log(stage, step, values)` hears of every row of the log.
    """
    run = partial(search_command.run, on_log=on_log)
    return _run(run, search_command.PRESETS, "search", preset, out, settings)


def train(
    preset: str = "quick", *, out: str | Path | None = None, on_log: OnLog | None = None, **settings: Any
) -> Trained:
    """Train as train_eval.py does. `genotype` may be a `Genotype`, a name, a file or a text."""
    if isinstance(settings.get("genotype"), Genotype):
        settings["genotype"] = settings["genotype"].to_text()
    run = partial(train_command.run, on_log=on_log)
    result = _run(run, train_command.PRESETS, "train", preset, out, settings)
    return Trained(Path(result["folder"]), result)


def _run(
    run: Callable[[Config], Result],
    presets: Mapping[str, Config],
    name: str,
    preset: str,
    out: str | Path | None,
    settings: Mapping[str, Any],
) -> Result:
    if preset not in presets:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(presets)}.")
    data = settings.get("data")
    default = suited(presets[preset], None if data is None else str(data), settings.get("device"))
    config = with_home(configured(default, {**settings, "preset": preset}))
    try:
        with _without_main():
            return run(replace(config, out=_own_folder(name, config) if out is None else Path(out).expanduser()))
    finally:
        end_workers()


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's script from child processes, each of which would run it from its beginning."""
    main = sys.modules["__main__"]
    known = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None  # as in a notebook, which has no file either
    try:
        yield
    finally:
        vars(main).update(known)


def _own_folder(name: str, config: Any) -> Path:
    """A folder for these settings; where and how to compute does not count, nor what is said."""
    without = ("out", "fresh", "quiet", "jobs", "device")
    settings = {key: value for key, value in asdict(config).items() if key not in without}
    text = json.dumps(settings, default=str, sort_keys=True)
    return Path("runs", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")

"""Both commands as functions, for notebooks and scripts: keywords in, a run folder and its results out.

Keywords are the flags of the command, with _ for - ; those with a prefix come as a dict:

    nas_kmix.search(preset="cpu", data="cifar100", ratio=0.05, scorer={"epochs": 10}, scoring={"draws": 20})

A call without `out` has a folder of its own below `runs`, named after its settings: the same call again resumes, or
returns what is there. Errors are those of `run` in the two commands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from darts_space import Genotype
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.commands import search as search_command
from nas_kmix.commands import train as train_command
from nas_kmix.engine.children import without_main_module
from nas_kmix.engine.cli import Invocation, suited, with_home
from nas_kmix.engine.log import OnLog
from nas_kmix.engine.settings import configured
from nas_kmix.engine.training import BEST
from nas_kmix.engine.workers import end_workers
from nas_kmix.pipeline import network

Config = TypeVar("Config")
Result = TypeVar("Result")
EXPORTS = ("export", "export_raw", "export_list")  # files that a run writes besides


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    folder: Path
    result: Mapping[str, Any]
    """What result.json holds: last and best accuracies, parameters, multiply-adds, seconds."""

    def network(self) -> nn.Module:
        """The network, in eval mode, with the weights of the best epoch, or of the last where none was selected."""
        best = self.folder / BEST
        return load_classifier(best if best.exists() else self.folder / network.FILE).model


def search(
    preset: str = "quick", *, out: str | Path | None = None, on_log: OnLog | None = None, **settings: Any
) -> search_command.Result:
    """Run search.py's stages, from images to a genotype, and return what they made.

    `on_log(stage, step, values)` hears of every row of the log. `candidates` may be `Genotype`s, names, files or texts.
    """
    given = settings.get("candidates")
    if isinstance(given, list | tuple):
        settings["candidates"] = [one.to_text() if isinstance(one, Genotype) else one for one in given]
    run = partial(search_command.run, on_log=on_log)
    return _run(run, search_command.PRESETS, "search", preset, out, settings)


def train(
    preset: str = "quick", *, out: str | Path | None = None, on_log: OnLog | None = None, **settings: Any
) -> Trained:
    """Train as train_eval.py does. `genotype` may be a `Genotype`, a name, a file or a text."""
    if isinstance(settings.get("genotype"), Genotype):
        settings["genotype"] = settings["genotype"].to_text()
    run = partial(train_command.run, on_log=on_log)
    if settings.get("eval_only") is not None:
        raise ValueError("eval_only trains nothing; use `python train_eval.py --eval-only FILE`, or load the file.")
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
    for flag in (field.name for field in fields(Invocation)):
        if settings.get(flag):
            raise ValueError(f"{flag} is for the command line; a call takes its settings as keywords.")
    data, device = (_flag(settings, *names) for names in (("input", "data"), ("device", "device")))
    default = suited(presets[preset], None if data is None else str(data), device)
    config = with_home(configured(default, {**settings, "preset": preset}))
    try:
        with without_main_module():
            return run(replace(config, out=_own_folder(name, config) if out is None else Path(out).expanduser()))
    finally:
        end_workers()


def _flag(settings: Mapping[str, Any], part: str, name: str) -> Any:
    """A flag that may be given by itself or in the dict of its part."""
    parts = settings.get(part)
    inside = parts.get(name) if isinstance(parts, Mapping) else None
    alone = settings.get(name)  # of `device` it may be the dict itself
    return inside if inside is not None or isinstance(alone, Mapping) else alone


def _own_folder(name: str, config: Any) -> Path:
    """A folder for these settings. How far to go, what to say or export, and how to compute it do not count."""
    without = ("out", "fresh", "quiet", "jobs", "device", "report", "stop_after", *EXPORTS)
    settings = {key: value for key, value in asdict(config).items() if key not in without}
    text = json.dumps(settings, default=str, sort_keys=True)
    return Path("runs", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")

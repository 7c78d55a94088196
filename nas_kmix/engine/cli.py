"""What the command lines share: flags and their defaults, and expected failures told in one sentence.

The defaults are a preset's, or those of an earlier run's config.json.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from nas_kmix.engine import files
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.named_sets import survives_mirroring
from nas_kmix.engine.settings import configured
from nas_kmix.engine.signals import StoppedError
from nas_kmix.engine.workers import end_workers, explain

Config = TypeVar("Config")

# What people type who come from other projects, and what does it here.
FOREIGN = {
    "--learning-rate": "use --lr (in a search, --scorer.lr is the scorer's)",
    "--arch-learning-rate": "use --arch-lr",
    "--init-channels": "use --channels",
    "--arch": "use --genotype NAME",
    "--model": "use --backbone NAME (in a search, --scorer.backbone)",
    "--drop-path-prob": "use --drop-path",
    "--output-dir": "use --out FOLDER",
    "--save": "use --out FOLDER",
    "--data-path": "use --data FOLDER",
    "--data-dir": "use --data FOLDER",
    "--dataset": "use --data NAME",
    "--num-workers": "use --workers",
    "--gpu": "use --device cuda:N",
    "--test-only": "use train_eval.py --eval-only FILE",
    "--evaluate": "use train_eval.py --eval-only FILE",
    "--resume": "leave it out, since the same command resumes",
}


@dataclass(frozen=True)
class Invocation:
    """How this command is started; nothing of it changes a result."""

    config: Path | None = None
    """Take all settings from this config.json of an earlier run, except --out and --fresh; other flags override it."""
    dry_run: bool = False
    """Say what would be done, how long it would take and what would be refused, after a few steps; write nothing."""


NOT_A_SETTING = ("out", "fresh", "invocation")  # what --config does not take from a config.json


def parse(presets: Mapping[str, Config], argv: Sequence[str], description: str | None) -> Config:
    """Parse flags into a config.

    `--preset` (default: `quick`) and `--config` are read first and set the defaults, and `--data` that of `--flip`,
    which is off for digits, letters and SVHN.
    """
    preset, file = _value_of("--preset", argv), _value_of("--config", argv)
    # An unknown preset is refused later, with its name.
    default = presets.get(preset or "quick", presets["quick"])
    default = replace(default, device=default.device.suited_to(_value_of("--device", argv) or default.device.device))
    if file is not None:
        default = _of_file(_expanded(Path(file)), presets, preset)
    data = _value_of("--data", argv)
    if file is None or data is not None:
        flip = survives_mirroring(data or default.input.data)
        default = replace(default, augmentation=replace(default.augmentation, flip=flip))
    return parse_flags(type(default), argv, description, default=default)


def parse_flags(kind: type[Config], argv: Sequence[str] | None, description: str | None, **default: Any) -> Config:
    """Parse flags; those of other projects are answered with ours."""
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in FOREIGN:
            raise ValueError(f"There is no flag {flag}: {FOREIGN[flag]}.")
    return with_home(tyro.cli(kind, args=argv, description=description, **default))


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The last value of a flag, before all flags are parsed."""
    found = None
    for i, argument in enumerate(argv):
        if argument == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.split("=", 1)[1]
    return found


def _of_file(path: Path, presets: Mapping[str, Config], preset: str | None) -> Config:
    """The settings of an earlier run."""
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} is not the config.json of a run.")
    named = values.get("preset", "quick")
    if preset not in (None, named):
        raise ValueError(f"--config {path} has the settings of --preset {named}; leave out --preset {preset}.")
    settings = {name: value for name, value in values.items() if name not in NOT_A_SETTING}
    default = presets["quick"] if not isinstance(named, str) else presets.get(named, presets["quick"])
    try:
        return configured(default, settings)
    except ValueError as error:
        raise ValueError(
            f"--config {path} does not fit this command ({error}); it takes the config.json of one of its own runs."
        ) from error


def program(script: str, name: str) -> list[str]:
    """How to start a command as this process was started: `python search.py`, or `nas-kmix search`."""
    return ["nas-kmix", name] if Path(sys.argv[0]).name.startswith("nas-kmix") else ["python", script]


def with_home(config: Config) -> Config:
    """The same, with ~ in its paths expanded, which shells leave as it is in --out=~/run; also in parts of it."""
    changed = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Path):
            changed[item.name] = _expanded(value)
        elif isinstance(value, tuple) and any(isinstance(part, Path) for part in value):
            changed[item.name] = tuple(_expanded(part) if isinstance(part, Path) else part for part in value)
        elif is_dataclass(value):
            changed[item.name] = with_home(value)
    return replace(config, **changed)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~somebody
        raise ValueError(f"{path}: there is no such user's home; write the path out, or ./{path}.") from error


def exit_code(work: Callable[[], None], remedy: Callable[[StageMismatchError], str]) -> int:
    """Do the work; an expected failure becomes one sentence on stderr. No worker process outlives it.

    Returns 0, 1 (a full disk, no memory, a lost worker, a loss that is not finite), 2 (bad usage), 130 or 143
    (signals). `remedy` says what to do about a file made with other settings.
    """
    _prepare_streams()
    try:
        try:
            work()
        finally:
            end_workers()
    except StoppedError as stopped:
        place = "" if stopped.saved else " from the last checkpoint"
        print(f"stopped by {stopped}; run the same command again to resume{place}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("stopped at once; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    except StageMismatchError as error:
        print(f"error: {error} {remedy(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        sentence = explain(error) or _out_of_memory(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _prepare_streams() -> None:
    """Let no character that a terminal lacks, and no stream that was closed (>&-), end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _out_of_memory(error: RuntimeError | MemoryError) -> str | None:
    """A sentence where the error says that there is no memory left, on a GPU or in the machine."""
    remedy = "lower the batch size of the stage (--batch-size, --scorer.batch-size, --scoring.batch-size)"
    if isinstance(error, torch.OutOfMemoryError):
        gpu = re.search(r"GPU (\d+)", str(error))
        return f"Out of memory on {f'cuda:{gpu[1]}' if gpu else 'the GPU'}: {remedy}."
    if isinstance(error, MemoryError) or "not enough memory" in str(error) or "can't allocate memory" in str(error):
        return f"Out of memory: {remedy}."
    return None

"""What the command lines share: presets as the defaults of flags, and expected failures told in one sentence."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.named_sets import survives_mirroring
from nas_kmix.engine.signals import StoppedError
from nas_kmix.engine.workers import end_workers, explain

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], argv: Sequence[str], description: str | None) -> Config:
    """Parse flags into a config.

    `--preset` (default: `quick`) is read first and sets the other flags' defaults, and `--data` that of `--flip`, which
    is off for digits, letters and SVHN.
    """
    default = presets.get(_value(argv, "--preset"), presets["quick"])  # an unknown one is refused later, with its name
    flip = survives_mirroring(_value(argv, "--data") or default.input.data)
    default = replace(default, augmentation=replace(default.augmentation, flip=flip))
    return with_home(tyro.cli(type(default), args=argv, default=default, description=description))


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The last value that is given to the flag."""
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == flag:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.split("=", 1)[1]
    return value


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

"""What the command lines share: flags and their defaults, and expected failures told in one sentence.

The defaults are a preset's, or those of an earlier run's config.json.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from nas_kmix.engine import files
from nas_kmix.engine.datasets import located
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.named_sets import survives_mirroring
from nas_kmix.engine.program import command
from nas_kmix.engine.settings import configured
from nas_kmix.engine.signals import StoppedError
from nas_kmix.engine.workers import end_workers, explain

Config = TypeVar("Config")
Flat = tyro.conf.arg(name="")
"""Marks a dataclass whose flags have no prefix: --epochs, not --search.epochs."""
SIGPIPE = 13  # Windows lacks signal.SIGPIPE

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
    "--test-only": "use {train} --eval-only FILE",
    "--evaluate": "use {train} --eval-only FILE",
    "--resume": "leave it out, since the same command resumes",
}


@dataclass(frozen=True)
class Invocation:
    """How this command is started; nothing of it changes a result."""

    config: Path | None = None
    """Take all settings from this config.json of an earlier run, except --out and --fresh; other flags override it."""
    dry_run: bool = False
    """Say what would be done, how long it would take and what would be refused, after a few steps; write nothing."""


# What --config does not take from a config.json: where and how that run was started, and the files it wrote besides.
NOT_A_SETTING = ("out", "fresh", "invocation", "eval_only", "export", "export_raw", "export_list")


def parse(presets: Mapping[str, Config], argv: Sequence[str], description: str | None) -> Config:
    """Parse flags into a config.

    `--preset` (default: `quick`) and `--config` are read first and set the defaults, and `--data` that of `--flip`,
    which is off for digits, letters and SVHN; the flips of a `--config` hold for the data of its run alone.
    """
    preset, file = value_of("--preset", argv), value_of("--config", argv)
    # An unknown preset is refused later, with its name.
    default = presets.get(preset or "quick", presets["quick"])
    data = value_of("--data", argv)
    if file is None:
        default = suited(default, data, value_of("--device", argv))
    else:
        default = _of_file(_expanded(Path(file)), presets, preset)
        if data is not None and located(data) != located(default.input.data):
            default = _mirrored_as(default, data)
    return parse_flags(type(default), argv, description, default=default)


def suited(default: Config, data: str | None, device: str | None) -> Config:
    """A preset for these images and this device, by default its own: flips and channels_last depend on them."""
    default = replace(default, device=default.device.suited_to(device or default.device.device))
    return _mirrored_as(default, data or default.input.data)


def _mirrored_as(default: Config, data: str) -> Config:
    return replace(default, augmentation=replace(default.augmentation, flip=survives_mirroring(data)))


def parse_flags(kind: type[Config], argv: Sequence[str] | None, description: str | None, **default: Any) -> Config:
    """Parse flags; those of other projects are answered with ours."""
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in FOREIGN:
            hint = FOREIGN[flag].format(train=command("train"))
            raise ValueError(f"There is no flag {flag}: {hint}.")
    return with_home(tyro.cli(kind, args=argv, description=description, **default))


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The last value that a command gives to a flag, or None."""
    found = None
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") != flag:  # tyro takes both
            continue
        if equals:
            found = value
        elif i + 1 < len(argv):
            found = argv[i + 1]
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


def with_home(config: Config) -> Config:
    """The same, with ~ in its paths expanded, which shells leave as it is in --out=~/run; also in parts of it.

    Raises ValueError for a name that is not valid Unicode.
    """
    changed = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, tuple):
            changed[item.name] = tuple(_expanded(part) for part in value)
        else:
            changed[item.name] = with_home(value) if is_dataclass(value) else _expanded(value)
    return replace(config, **changed)


def _expanded(value: Any) -> Any:
    if isinstance(value, Path | str) and not str(value).isascii():
        try:
            str(value).encode()
        except UnicodeEncodeError:  # how Python shows bytes that are no UTF-8
            raise ValueError(f"{str(value)!a} is not Unicode text; rename that file or folder.") from None
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:  # ~somebody
        raise ValueError(f"{value}: there is no such user's home; write the path out, or ./{value}.") from error


def exit_code(
    work: Callable[[], None],
    remedy: Callable[[StageMismatchError], str] | None = None,
    *,
    batch_sizes: str = "--batch-size",
) -> int:
    """Do the work; an expected failure becomes one sentence on stderr. No worker process outlives it.

    Returns 0, 1 (a full disk, no memory, a lost worker, a loss that is not finite), 2 (bad usage), 130 and 143
    (signals), or 141 where what read the output has ended, as in `| head`. `remedy` says what to do about a file made
    with other settings; a program without one resumes nothing. `batch_sizes` says which flags save memory.
    """
    _prepare_streams()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # spares the end of the process a second of looking through all modules for garbage
    code, error = 0, None
    try:
        work()
    except SystemExit as ended:  # of the parser, after its help or its complaint
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    finally:
        end_workers()
    lost = _lost_output() or (error if isinstance(error, BrokenPipeError) else None)
    if lost is not None and (error is None or isinstance(error, OSError)):
        if not isinstance(lost, BrokenPipeError):
            code, sentence = 1, f"error: the output cannot be written: {lost.strerror or lost}."
        else:
            resumes = error and remedy and not {"-h", "--help"} & {*sys.argv}
            stopped = _resume("stopped, since nobody reads the output any more") if resumes else ""
            code, sentence = 128 + SIGPIPE, stopped
    elif error is not None:
        code, sentence = _told(error, remedy, batch_sizes)
    else:
        return code
    if sentence:
        with suppress(OSError):
            print(sentence, file=sys.stderr)
    return code


def _told(
    error: BaseException, remedy: Callable[[StageMismatchError], str] | None, batch_sizes: str
) -> tuple[int, str]:
    """The exit code of an expected failure, and its sentence; any other is raised again."""
    if isinstance(error, StoppedError):
        return 128 + error.signum, _resume(f"stopped by {error}", saved=error.saved)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; nothing was written" if remedy is None else _resume("stopped at once")
    if isinstance(error, StageMismatchError):
        return 2, f"error: {error} {remedy(error)}"
    if isinstance(error, NonFiniteLossError | OSError | UnicodeEncodeError):  # the last is a ValueError, but not usage
        return 1, f"error: {error}"
    if isinstance(error, ValueError):
        return 2, f"error: {error}"
    if sentence := explain(error) or _out_of_memory(error, batch_sizes):
        return 1, f"error: {sentence}"
    raise error


def _resume(end: str, *, saved: bool = False) -> str:
    return f"{end}; run the same command again to resume{'' if saved else ' from the last checkpoint'}"


def _lost_output() -> OSError | None:
    """The error that keeps standard output from taking what was printed; the rest of it is then dropped in silence."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # otherwise Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _prepare_streams() -> None:
    """Let no character that a terminal lacks, and no stream that was closed (>&-), end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _out_of_memory(error: BaseException, batch_sizes: str) -> str | None:
    """A sentence where the error says that there is no memory left, on a GPU or in the machine."""
    remedy = f"lower {batch_sizes}"
    if isinstance(error, torch.OutOfMemoryError):
        gpu = re.search(r"GPU (\d+)", str(error))
        return f"Out of memory on {f'cuda:{gpu[1]}' if gpu else 'the GPU'}: {remedy}."
    return f"Out of memory: {remedy}." if files.lacks_memory(error) else None

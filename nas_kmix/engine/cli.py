"""What the command lines share: presets that give flags their defaults, and expected failures as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import StoppedError

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], argv: Sequence[str], description: str | None) -> Config:
    """Flags to a config; `--preset` is read first and gives the other flags their defaults, by default `quick`."""
    preset = "quick"
    for i, argument in enumerate(argv):
        if argument == "--preset" and i + 1 < len(argv):
            preset = argv[i + 1]
        elif argument.startswith("--preset="):
            preset = argument.split("=", 1)[1]
    default = presets.get(preset, presets["quick"])  # tyro itself complains of a preset that does not exist
    return tyro.cli(type(default), args=argv, default=default, description=description)


def exit_code(work: Callable[[], None], remedy: Callable[[StageMismatchError], str]) -> int:
    """Do the work; an expected failure becomes one sentence on stderr.

    Returns 0, 1 (a full disk, a loss that is not finite), 2 (bad usage), 130 or 143 (signals). `remedy` tells what to
    do about a file of other settings.
    """
    try:
        work()
    except StoppedError as stopped:
        print(f"stopped by {stopped}; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
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
    return 0

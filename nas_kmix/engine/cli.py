"""What the command lines share: presets as the defaults of flags, and expected failures told in one sentence."""

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
    """Parse flags into a config; `--preset` (default: `quick`) is read first and sets the other flags' defaults."""
    preset = "quick"
    for i, argument in enumerate(argv):
        if argument == "--preset" and i + 1 < len(argv):
            preset = argv[i + 1]
        elif argument.startswith("--preset="):
            preset = argument.split("=", 1)[1]
    default = presets.get(preset, presets["quick"])  # an unknown preset is refused later, with its name
    return tyro.cli(type(default), args=argv, default=default, description=description)


def exit_code(work: Callable[[], None], remedy: Callable[[StageMismatchError], str]) -> int:
    """Do the work; an expected failure becomes one sentence on stderr.

    Returns 0, 1 (a full disk, a loss that is not finite), 2 (bad usage), 130 or 143 (signals). `remedy` says what to
    do about a file made with other settings.
    """
    try:
        work()
    except StoppedError as stopped:
        print(f"stopped by {stopped}; run the same command again to resume", file=sys.stderr)
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
    return 0

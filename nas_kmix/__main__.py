"""The front door: `nas-kmix COMMAND …`, and `python -m nas_kmix COMMAND …`, which torchrun can start too.

`nas-kmix search` is search.py, `nas-kmix train` is train_eval.py, and the others are the programs of nas_kmix.analysis.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from nas_kmix.engine.program import command
from nas_kmix.version import __version__

COMMANDS = {
    "search": ("nas_kmix.commands.search", "search for an architecture on a proxy dataset"),
    "train": ("nas_kmix.commands.train", "train the network of a genotype, or evaluate a checkpoint"),
    "report": ("nas_kmix.analysis.report.__main__", "show finished runs as one HTML page"),
    "cells": ("nas_kmix.analysis.cells", "show, draw or convert a genotype"),
    "landscape": ("nas_kmix.analysis.landscape", "plot the loss around trained networks"),
    "robustness": ("nas_kmix.analysis.robustness", "attack trained networks, or give them unusual images"),
    "mixes": ("nas_kmix.analysis.mixes", "draw mixed images with their soft labels"),
    "convert": ("nas_kmix.analysis.convert", "turn a checkpoint of the published code into one of ours"),
}
"""The module whose `main` a command calls, and what it does. Each is imported when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Call one command. Exit codes: the command's, and 2 where there is none of that name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        if argv is None:
            sys.argv = [command(name), *rest]  # what its help and the record of the run call it
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name in ("--version", "-V"):
        print(f"nas-kmix {__version__}")
        return 0
    typed = {command(each): what for each, (_, what) in COMMANDS.items()}
    lines = [f"  {line:{max(map(len, typed))}}  {what}" for line, what in typed.items()]
    usage = "\n".join(["Commands, each with --help:", "", *lines])
    if name in ("--help", "-h", "help"):
        print(usage)
        return 0
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"use {', '.join(COMMANDS)}."
    print(f"error: there is no command {name}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""How the user starts our commands, for the messages that tell what to run.

`nas-kmix NAME` and `python -m nas_kmix NAME` start all of them, and two scripts of the repository start the pipeline.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

SCRIPTS = {"search": "search.py", "train": "train_eval.py"}
CONSOLE = "nas-kmix"


def command(name: str, *flags: str) -> str:
    """A line for the shell: `nas-kmix NAME` and flags, but started in the way in which the user started this process.

    Other processes, such as notebooks and analyses, are answered with `python -m nas_kmix`.
    """
    start, python = Path(sys.argv[0]), sys.orig_argv[0]
    if start.name.startswith(CONSOLE):
        typed = str(start.with_name(CONSOLE))  # a shell gives the whole path of what it finds itself
        words = [CONSOLE if shutil.which(CONSOLE) == typed else typed, name]
    elif start.name in SCRIPTS.values() and name in SCRIPTS:
        words = [python, str(start.with_name(SCRIPTS[name]))]
    else:
        words = [python, "-m", "nas_kmix", name]
    return shlex.join([*words, *flags])

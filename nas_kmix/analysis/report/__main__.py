"""Show finished searches and trainings as one self-contained HTML page.

    python -m nas_kmix.analysis.report runs/c100                                    # writes runs/c100/report.html
    python -m nas_kmix.analysis.report runs/cv runs/random runs/cv-net -o report.html  # side by side

The page needs neither scripts nor a network. The images of the proxy are read from the data that the run used, if they
are still there; nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nas_kmix.analysis.report import write_report
from nas_kmix.engine import cli
from nas_kmix.engine.cli import parse_flags
from nas_kmix.engine.program import command


@dataclass(frozen=True)
class Config:
    """What to show, and where."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; several are compared."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The page. Default: report.html in the only run's folder, else in the working folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`."""

    def work() -> None:
        config = parse_flags(Config, argv, __doc__)
        if not config.runs:
            raise ValueError(f"Give at least one run folder: {command('report', 'RUN')}")
        out = config.out or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
        write_report(config.runs, out)
        print(out)

    return cli.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())

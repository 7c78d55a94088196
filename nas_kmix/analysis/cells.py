"""Show a genotype: its cells and their cost, in other formats, or as a picture.

    python -m nas_kmix.analysis.cells runs/c100/genotype.json
    python -m nas_kmix.analysis.cells PC_DARTS_cifar --picture cells.svg
    python -m nas_kmix.analysis.cells genotype.json --to text
    python -m nas_kmix.analysis.cells "Genotype(normal=[('sep_conv_3x3', 1), ...], ...)" --out genotype.json

The genotype is a file (JSON or legacy text), the name of a published one, or the text itself, which is never executed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from darts_space import GENOTYPES, Genotype, read_genotype
from nas_kmix.analysis.cell_picture import draw_cells
from nas_kmix.analysis.description import describe
from nas_kmix.analysis.figures import PICTURES, save_figure
from nas_kmix.engine import cli, files
from nas_kmix.engine.cli import parse_flags

FORMS = {".json": "json", ".txt": "text"}


@dataclass(frozen=True)
class Config:
    """Which genotype to show or convert, and how."""

    genotype: tyro.conf.Positional[str]
    """A file, the name of a published genotype, or the text itself."""
    to: Literal["json", "text"] | None = None
    """Convert to JSON, or to the legacy text of DARTS-style projects. Default: by the suffix of --out."""
    out: Path | None = None
    """Write the converted genotype to this file instead of printing it."""
    picture: Path | None = None
    """Draw both cells into this file, a PNG or SVG."""


def save_picture(genotype: Genotype, path: Path, title: str = "") -> None:
    """Draw both cells into a .png or .svg file; the same genotype gives the same bytes."""
    save_figure(draw_cells(genotype, title), path)


def run(config: Config) -> str:
    """Write the files that are asked for and return the text to print. Raises ValueError and OSError."""
    if config.picture is not None and config.picture.suffix not in PICTURES:
        raise ValueError(f"--picture {config.picture} must end in {' or '.join(PICTURES)}.")
    form = config.to
    if form is None and config.out is not None:
        if config.out.suffix not in FORMS:
            raise ValueError(f"--out {config.out} ends in neither {' nor '.join(FORMS)}; choose a form with --to.")
        form = FORMS[config.out.suffix]
    genotype = read_genotype(config.genotype)

    printed = []
    if config.picture is not None:
        save_picture(genotype, config.picture, _title(config.genotype))
    if form is None:
        printed.append(describe(genotype))
    elif config.out is None:
        printed.append(json.dumps(genotype.to_json()) if form == "json" else genotype.to_text())
    elif form == "json":
        _save_json(genotype, config.out)
    else:
        files.write_text(config.out, genotype.to_text() + "\n")
    return "\n".join(printed)


def _save_json(genotype: Genotype, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} could not be written: {files.reason_of(error)}.") from error
    genotype.save(path)


def _title(source: str) -> str:
    """A published name or the file's; a text has none."""
    return source if source in GENOTYPES or os.path.isfile(source) else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`."""

    def work() -> None:
        if text := run(parse_flags(Config, argv, __doc__)):
            print(text)

    return cli.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())

"""A finished run, or several, as one self-contained HTML page. See `python -m nas_kmix.analysis.report --help`.

Run folders in, a page out that needs no script and no network: SVG and images lie in it. It is readable on a phone, on
paper, in light and dark. What a folder lacks is said in a sentence. `page` puts the sections together, `record` reads
run folders, `charts` and `drawings` draw, and each other module is a section.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData

__all__ = ["write_report", "write_report_of_run"]


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page of these run folders, at least one. Raises ValueError if one is not a run folder, and OSError."""
    for run in runs:
        if not run.is_dir():
            raise ValueError(f"{run} is not a run folder; give folders of searches and trainings.")
    from nas_kmix.analysis.report.page import document  # late, since matplotlib takes a while to import
    from nas_kmix.analysis.report.record import Record

    files.write_text(out, document([Record(run) for run in runs]))


def write_report_of_run(folder: Path, data: ImageData) -> str:
    """Write `report.html` into the folder of a run that has just ended, and return what to say of it.

    `data` are its images. No failure here may fail the run, so each becomes a sentence.
    """
    path = folder / "report.html"
    try:
        from nas_kmix.analysis.report.page import document
        from nas_kmix.analysis.report.record import Record

        files.write_text(path, document([Record(folder, data)]))
    except Exception as error:
        return f"warning: {path} was not written ({type(error).__name__}: {error}); the run is complete without it"
    return f"report: {path}"

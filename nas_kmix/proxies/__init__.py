"""Published proxies: lists of images of public datasets, so that a search needs no scorer.

`search.py --proxy NAME` and `ProxyManifest.load(NAME)` take them. Like every `proxy.json` they apply to any copy of
the dataset, in any order. The README beside them says how they were made.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def published() -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def locate(given: Path | str) -> Path:
    """The file of the published proxy of that name, or the path itself, which goes before."""
    path = Path(given)
    return FOLDER / f"{given}.json" if str(given) in published() and not path.is_file() else path

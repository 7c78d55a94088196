"""A section of the report is a list of named parts; one that cannot be shown leaves a sentence in its place."""

from __future__ import annotations

from collections.abc import Callable

from nas_kmix.analysis.report.markup import Markup, gallery, join, missing
from nas_kmix.analysis.report.record import Record

# What files of other programs, or of other versions, may raise where a reader has not checked them entry by entry.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, OSError)
Part = Callable[[Record], Markup | list[Markup]]


def reason(record: Record, error: Exception) -> str:
    """Why something cannot be shown, as a sentence."""
    if isinstance(error, ValueError):
        return str(error)
    return f"The files of {record.name} do not hold what a search or a training writes ({error!r})."


def show(record: Record, **parts: Part) -> Markup:
    """The parts in their order. Figures that come as lists stand side by side, those of the next part next to them.

    Parts that lack the same thing share one sentence at the end.
    """
    shown: list[Markup | list[Markup]] = []
    lacking: dict[str, list[str]] = {}
    for name, part in parts.items():
        try:
            found = part(record)
        except UNREADABLE as error:
            lacking.setdefault(reason(record, error), []).append(name.replace("_", " "))
            continue
        if isinstance(found, list) and shown and isinstance(shown[-1], list):
            shown[-1].extend(found)
        else:
            shown.append(found)
    blocks = [gallery(*one) if isinstance(one, list) else one for one in shown]
    sentences = [missing(f"Not shown: {', '.join(names)}. {reason}") for reason, names in lacking.items()]
    return join([*blocks, *sentences])

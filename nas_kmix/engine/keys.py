"""Keys: what the result of a stage depends on, as plain JSON that is stored in the result itself.

A file of an earlier run is reused if its key is the one that this command would give it; otherwise the command is
refused, with the settings that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

NOT_IN_KEY = {"part of the key": False}
"""Metadata of a config's field that changes no result, or whose effect is in another entry of the key."""


class StageMismatchError(ValueError):
    """Where stage `stage` would write, there is a file of an earlier run with other settings."""

    def __init__(self, message: str, stage: str):
        super().__init__(message)
        self.stage = stage

    def __reduce__(self):
        return type(self), (*self.args, self.stage)  # without the stage, a child process could not send it


def stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The stage's name, its settings and the hashes of its inputs, in JSON's own types."""
    return json.loads(json.dumps({"stage": stage, "config": dict(config), "inputs": dict(inputs)}, default=str))


def identity(config: Any) -> dict[str, Any]:
    """The fields of a dataclass and of the dataclasses in it, on one level, except those marked NOT_IN_KEY.

    Where the same fields once had another effect, the dataclass has a property `revision` with further entries.
    """
    found: dict[str, Any] = {}
    for field in fields(config):
        if field.metadata == NOT_IN_KEY:
            continue
        value = getattr(config, field.name)
        part = identity(value) if is_dataclass(value) else {field.name: value}
        assert not found.keys() & part.keys(), f"two settings are called {', '.join(found.keys() & part.keys())}"
        found |= part
    return found | getattr(config, "revision", {})


def check_key(path: Path, found: Any, wanted: Mapping[str, Any] | None) -> None:
    """Raise StageMismatchError naming every setting that differs if `path` was not made with the key `wanted`.

    If `wanted` is None, any key will do: the file was given by its path.
    """
    if wanted is None:
        return
    if not isinstance(found, Mapping) or found.get("stage") != wanted["stage"]:
        raise StageMismatchError(f"{path} was not made by the stage {wanted['stage']!r}.", wanted["stage"])
    differing = []
    for part in ("config", "inputs"):
        old, new = found.get(part), wanted[part]
        old = old if isinstance(old, Mapping) else {}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                differing.append(f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}")
    if differing:
        raise StageMismatchError(f"{path} was made with other settings: {'; '.join(differing)}.", wanted["stage"])


def _short(value: Any) -> str:
    """As it is, but for hashes, of which the first digits tell enough."""
    text = str(value)
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{32,}", text) else text

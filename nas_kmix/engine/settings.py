"""A config from plain values: the config.json of an earlier run, or the keywords of a Python call.

Configs are frozen dataclasses in each other. Values may lie as the dataclasses do (`{"input": {"data": "digits"}}`), or
on the level where their flags are (`{"data": "digits", "scorer": {"epochs": 5}}`).
"""

from __future__ import annotations

import difflib
import numbers
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def configured(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with these values. Raises ValueError naming a setting that does not exist or has an impossible value."""
    hints = get_type_hints(type(config), include_extras=True)
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        is_part = name in hints and is_dataclass(getattr(config, name))
        if is_part and isinstance(value, Mapping):
            parts.setdefault(name, {}).update(value)
        elif name in hints and (not is_part or isinstance(value, type(getattr(config, name)))):
            own[name] = _converted(value, hints[name], name)
        elif (field := _field_with_flag(hints, name)) is not None:  # --finals and --finals.epochs
            own[field] = _converted(value, hints[field], name)
        elif (group := _flat_group_with(config, name)) is not None:  # --device is in the part `device`
            parts.setdefault(group, {})[name] = value
        elif is_part:
            raise ValueError(
                f"{name} has settings of its own, such as {_names(getattr(config, name))[0]!r}, not {value!r}"
            )
        else:
            close = difflib.get_close_matches(name, _names(config), 1)
            raise ValueError(f"there is no setting {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    return replace(config, **own, **{name: configured(getattr(config, name), part) for name, part in parts.items()})


def _field_with_flag(hints: Mapping[str, Any], flag: str) -> str | None:
    """The field that has a flag of another name (tyro's `name=`)."""
    return next(
        (f for f, hint in hints.items() if flag in (getattr(m, "name", None) for m in get_args(hint)[1:])), None
    )


def _flat_groups(config: Any) -> Iterator[str]:
    """The dataclasses in `config` whose flags have no prefix (tyro's `name=""`)."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        if is_dataclass(getattr(config, name)) and any(
            getattr(mark, "name", None) == "" for mark in get_args(hint)[1:]
        ):
            yield name


def _flat_group_with(config: Any, name: str) -> str | None:
    return next((group for group in _flat_groups(config) if name in _names(getattr(config, group))), None)


def _names(config: Any) -> list[str]:
    """The settings on the level of `config`."""
    inner = [name for group in _flat_groups(config) for name in _names(getattr(config, group))]
    return [field.name for field in fields(config)] + inner


def _converted(value: Any, hint: Any, name: str) -> Any:
    """A value of JSON as the type that the field has; what fits already stays."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _converted(value, get_args(hint)[0], name)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _converted(value, next(kind for kind in get_args(hint) if kind is not type(None)), name)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} is one of {', '.join(map(str, get_args(hint)))}, not {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ValueError(f"{name} takes {len(kinds)} values, not {value!r}")
        return tuple(_converted(part, kind, name) for part, kind in zip(value, kinds, strict=True))
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # also numpy's
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} cannot be {value!r}")

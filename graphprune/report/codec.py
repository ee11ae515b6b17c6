"""Frozen dataclasses to JSON and back: what is read is held to the types that the fields declare."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no words for these numbers."""


def encoded(value: Any) -> Any:
    """`value` as lists, dicts with text for keys, text, numbers, booleans and None."""
    if is_dataclass(value):
        return {f.name: encoded(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encoded(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, number in _WORDS.items() if repr(number) == repr(value))
    return value


def decoded(kind: type[T], data: Any) -> T:
    """What `encoded` made of a `kind`.

    Raises:
        ValueError: the data is of another type somewhere; the message says where.
    """
    found: T = _decoded(kind, data, kind.__name__)
    return found


def _decoded(kind: Any, data: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record(kind, data, where)
    if origin in (Union, types.UnionType):
        return _either(parts, data, where)
    if origin is Literal and data in parts and type(data) in {type(p) for p in parts}:
        return data
    if origin is tuple and isinstance(data, list) and parts[1:] == (Ellipsis,):
        return tuple(_decoded(parts[0], item, f"{where}[{k}]") for k, item in enumerate(data))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(data, dict):
        return {key: _decoded(parts[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    if isinstance(origin, type) and origin is not tuple and not issubclass(origin, Mapping) and isinstance(data, list):
        return tuple(_decoded(parts[0], item, f"{where}[{k}]") for k, item in enumerate(data))
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if kind is float and isinstance(data, str) and data in _WORDS:
        return _WORDS[data]
    if kind in (int, str, bool, types.NoneType) and type(data) is kind:
        return data
    raise ValueError(f"{where} is {type(data).__name__}, not {getattr(kind, '__name__', kind)}")


def _either(parts: tuple[Any, ...], data: Any, where: str) -> Any:
    """The first of several types that the data is of.

    Raises:
        ValueError: it is of none.
    """
    causes = []
    for part in parts:
        try:
            return _decoded(part, data, where)
        except ValueError as error:
            causes.append(str(error))
    raise ValueError("; ".join(causes))


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _record(kind: Any, data: Any, where: str) -> Any:
    """A dataclass; fields with a default may be missing, so that what older versions wrote can be read.

    Raises:
        ValueError: it has other fields.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {type(data).__name__}, not a record")
    hints, known = _hints(kind), {f.name: f for f in fields(kind)}
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if wrong := [n for n in needed if n not in data] + [n for n in data if n not in known]:
        raise ValueError(f"{where} lacks or does not know {wrong[0]!r}")
    return kind(**{name: _decoded(hints[name], item, f"{where}.{name}") for name, item in data.items()})

"""Data to Python source: a forward as text, every line of it written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graphprune.code.ops import FUNCTIONS


def to_source(
    function: Mapping[str, Any], *, before: Callable[[str], str] = lambda step: "", ops: str = "torch.ops."
) -> str:
    """The function as Python source, called `forward`; it needs `torch` and, for some functions of numbers, `math`.

    Results are let go after their last use, as memory would otherwise hold all of them until the end.

    Args:
        function: checked, or read off a graph; it runs no other function.
        before: a comment above the step of that name, empty for none.
        ops: how the source gets at namespaces of ops.
    """
    steps = function["steps"]
    last: dict[str, int] = {}
    for number, (_, expression) in enumerate(steps):
        last.update(dict.fromkeys(_names(expression), number))
    last.update(dict.fromkeys(_names(function["result"]), len(steps)))
    lines = [f"def forward({', '.join(['self', *_signature(function['parameters'])])}):"]
    kept = {p["name"] for p in function["parameters"]}
    for number, (name, expression) in enumerate(steps):
        if comment := before(name):
            lines.append(f"    # {comment}")
        unread = name not in last and isinstance(expression, dict) and expression.get("call") == "assert"
        ends = [n for n, at in last.items() if at == number and n not in kept]
        free = f";  {' = '.join(ends)} = None" if ends else ""
        lines.append(f"    {'' if unread else name + ' = '}{written(expression, ops)}{free}")
    lines.append(f"    return {written(function['result'], ops)}")
    return "\n".join(lines) + "\n"


def written(value: Any, ops: str = "torch.ops.") -> str:
    """An expression as source."""
    if isinstance(value, list):
        return "[" + ", ".join(written(v, ops) for v in value) + "]"
    if not isinstance(value, dict):
        return repr(value)
    kind = next(iter(value))
    return _WRITERS[kind](value, ops) if kind in _WRITERS else f"torch.{value[kind]}"


def _call(value: Mapping[str, Any], ops: str) -> str:
    name, args = value["call"], value.get("args", [])
    if name in FUNCTIONS:
        simple = name in ("assert", "shape", "device") or "(" in FUNCTIONS[name][1]
        return FUNCTIONS[name][1].format(*(written(a, ops) if simple else _inner(a, ops) for a in args))
    given = [written(a, ops) for a in args]
    given += [f"{k}={written(v, ops)}" for k, v in value.get("kwargs", {}).items()]
    return f"{ops}{name}({', '.join(given)})"


def _inner(value: Any, ops: str) -> str:
    """An operand; in brackets where it is computed itself."""
    text = written(value, ops)
    negative = isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0
    computed = isinstance(value, dict) and value.get("call") in FUNCTIONS and value["call"] not in ("shape", "item")
    return f"({text})" if computed or negative else text


def _path(value: Mapping[str, Any], _: str) -> str:
    text = "self"
    for part in value["self"].split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


_WRITERS: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "name": lambda v, _: str(v["name"]),
    "self": _path,
    "call": _call,
    "tuple": lambda v, ops: "(" + "".join(written(i, ops) + ", " for i in v["tuple"]) + ")",
    "dict": lambda v, ops: "{" + ", ".join(f"{k!r}: {written(i, ops)}" for k, i in v["dict"]) + "}",
    "slice": lambda v, ops: f"slice({', '.join(written(i, ops) for i in v['slice'])})",
    "device": lambda v, _: f"torch.device({v['device']!r})",
    "float": lambda v, _: v["float"],
    "complex": lambda v, _: f"complex({v['complex'][0]!r}, {v['complex'][1]!r})",
}


def _signature(parameters: list[Mapping[str, Any]]) -> Iterator[str]:
    """The parameters as in a `def`, with the marks that Python wants between their kinds."""
    kinds = [p.get("kind", "") for p in parameters]
    for number, parameter in enumerate(parameters):
        kind = kinds[number]
        if number and kinds[number - 1] == "/" != kind:
            yield "/"
        if kind == "keyword" and "*" not in kinds[:number] and "keyword" not in kinds[:number]:
            yield "*"
        default = f"={written(parameter['default'])}" if "default" in parameter else ""
        yield f"{kind if kind in ('*', '**') else ''}{parameter['name']}{default}"
    if kinds and kinds[-1] == "/":
        yield "/"


def _names(value: Any) -> Iterator[str]:
    """Every name that an expression uses."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        if "call" in value:
            yield from _names([*value.get("args", []), *value.get("kwargs", {}).values()])
            return
        if "name" in value:
            yield value["name"]
        for item in value.values():
            yield from _names(item)

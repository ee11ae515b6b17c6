"""Refuses stored code that is anything but calls of known ops on the module's own tensors."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from graphprune.code.ops import FUNCTIONS, HIGHER, allowed
from graphprune.errors import ArtefactError

DEEP = 30
"""Expressions are nested no deeper; the code that tracers write stays far below."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_RESERVED = frozenset({"self", "torch", "math", "device", "getattr", "inf", "nan", "slice", "complex", "forward"})
_KINDS = ("", "*", "**", "/", "keyword")
_COUNTS = {name: len(re.findall("{}", template)) for name, (_, template) in FUNCTIONS.items()}
_OF_RESULTS = ("item", "shape", "device", "is")
"""Functions that Python warns about where they are written of a literal."""
_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
TORCH: Mapping[str, Mapping[str, Any]] = {
    "dtype": _DTYPES,
    "layout": {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.layout)},
    "memory_format": {
        str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.memory_format)
    },
}
"""Per kind of an expression, the values of torch by name."""
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
_FLOATS = ("inf", "-inf", "nan")


def checked(
    functions: object, held: Collection[str], *, ops: Collection[str] = (), where: str
) -> Mapping[str, Mapping[str, Any]]:
    """The functions, if they are nothing but calls of what may be called.

    Args:
        functions: by name; "" is the forward.
        held: paths of the tensors that they may use.
        ops: further ops that the caller trusts.
        where: what they are of, for messages.
    Raises:
        ArtefactError: they are something else; the message names the first thing wrong.
    """
    try:
        if not isinstance(functions, dict) or "" not in functions:
            raise ArtefactError("a table of functions with a forward is expected")
        for name, function in functions.items():
            if name:
                _identifier(name)
            _Checker(frozenset(held), frozenset(functions) - {""}, ops).function(function)
    except ArtefactError as error:
        raise ArtefactError(f"the code stored for {where} is refused: {error}") from error
    return functions


class _Checker:
    """Checks one function; `known` grows as its steps are read."""

    def __init__(self, held: frozenset[str], graphs: frozenset[str], ops: Collection[str]) -> None:
        self.held, self.graphs, self.ops = held, graphs, ops
        self.known: set[str] = set()

    def function(self, function: object) -> None:
        """Check all of it.

        Raises:
            ArtefactError: something in it is not allowed.
        """
        parameters, steps, result = _fields(function, "parameters", "steps", "result")
        kinds: list[str] = []
        for parameter in _list(parameters):
            name = parameter.get("name") if isinstance(parameter, dict) else None
            kinds.append(self._parameter(parameter))
            self._define(name)
        order = {"/": 0, "": 1, "*": 2, "keyword": 3, "**": 4}
        if sorted(kinds, key=order.__getitem__) != kinds or kinds.count("*") > 1 or kinds.count("**") > 1:
            raise ArtefactError("its parameters are in no order that Python takes")
        defaults = ["default" in p for p, kind in zip(_list(parameters), kinds, strict=True) if kind in ("/", "")]
        if sorted(defaults) != defaults:
            raise ArtefactError("a parameter without a default follows one with a default")
        for step in _list(steps):
            if not isinstance(step, list) or len(step) != 2:
                raise ArtefactError("a step is a name and an expression")
            self._expression(step[1], 0)
            self._define(step[0])
        self._expression(result, 0)

    def _parameter(self, parameter: Any) -> str:
        if not isinstance(parameter, dict) or not {"name"} <= parameter.keys() <= {"name", "kind", "default"}:
            raise ArtefactError("a parameter has a name, a kind and a default")
        kind = parameter.get("kind", "")
        if kind not in _KINDS or (kind in ("*", "**") and "default" in parameter):
            raise ArtefactError(f"a parameter is of kind {kind!r:.40}")
        default = parameter.get("default")
        if isinstance(default, dict):
            self._expression(default, DEEP)  # a float that JSON has no number for
            if "float" not in default:
                raise ArtefactError("the default of a parameter is a number, a text or null")
        elif not isinstance(default, (type(None), bool, int, float, str)):
            raise ArtefactError("the default of a parameter is a number, a text or null")
        return str(kind)

    def _define(self, name: object) -> None:
        _identifier(name)
        if name in self.known:
            raise ArtefactError(f"{name!r} is defined twice")
        self.known.add(str(name))

    def _expression(self, value: Any, depth: int) -> None:
        if depth > DEEP:
            raise ArtefactError(f"an expression is nested deeper than {DEEP}")
        if isinstance(value, list):
            for item in value:
                self._expression(item, depth + 1)
        elif isinstance(value, dict):
            kind = next((k for k in value if k in _EXPRESSIONS), None)
            if kind is None or (len(value) > 1 and kind != "call"):
                raise ArtefactError(f"there is no expression of the kind {', '.join(map(str, value))!r:.60}")
            _EXPRESSIONS[kind](self, value[kind], value, depth)
        elif not isinstance(value, (type(None), bool, int, float, str)):
            raise ArtefactError(f"{value!r:.40} is no expression")

    def _name(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or name not in self.known:
            raise ArtefactError(f"{name!r:.60} is used and not defined")

    def _self(self, path: Any, *_: Any) -> None:
        if not isinstance(path, str) or (path != "training" and path not in self.held):
            raise ArtefactError(f"{path!r:.80} is no tensor of the module")

    def _graph(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or name not in self.graphs:
            raise ArtefactError(f"{name!r:.60} is no function")

    def _call(self, name: Any, value: Mapping[str, Any], depth: int) -> None:
        if not value.keys() <= {"call", "args", "kwargs"} or not isinstance(name, str):
            raise ArtefactError("a call has a name, args and kwargs")
        args, kwargs = value.get("args", []), value.get("kwargs", {})
        self._expression(_list(args), depth)
        if not isinstance(kwargs, dict):
            raise ArtefactError("kwargs is a table")
        self._expression(list(kwargs.values()), depth)
        graphs = [a for a in args if isinstance(a, dict) and "graph" in a]
        if name.startswith("higher_order."):
            if name.partition(".")[2] not in HIGHER or kwargs or len(graphs) != 1:
                raise ArtefactError(f"stored code calls {name!r:.80}, which it may not")
            return
        if graphs:
            raise ArtefactError(f"{name!r:.80} takes no function")
        if name in FUNCTIONS:
            if kwargs or len(args) != _COUNTS[name]:
                raise ArtefactError(f"{name!r} takes {_COUNTS[name]} arguments")
            if name in _OF_RESULTS and not isinstance(args[0], dict):
                raise ArtefactError(f"{name!r} is asked of {args[0]!r:.40}, which is no result")
            return
        schema = allowed(name, self.ops)._schema.arguments
        names = [a.name for a in schema]
        positional = sum(not a.kwarg_only for a in schema)
        if len(args) > positional or not kwargs.keys() <= set(names[len(args) :]):
            raise ArtefactError(f"{name} does not take these arguments")

    def _items(self, items: Any, _: Any, depth: int) -> None:
        self._expression(_list(items), depth)

    def _dict(self, items: Any, _: Any, depth: int) -> None:
        for item in _list(items):
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], (str, int)):
                raise ArtefactError("a dict is a list of keys and values")
            self._expression(item[1], depth + 1)

    def _slice(self, items: Any, _: Any, depth: int) -> None:
        if not isinstance(items, list) or len(items) != 3:
            raise ArtefactError("a slice has three parts")
        self._expression(items, depth)

    def _device(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or not _DEVICE.fullmatch(name):
            raise ArtefactError(f"{name!r:.40} is no device")

    def _float(self, name: Any, *_: Any) -> None:
        if name not in _FLOATS:
            raise ArtefactError(f"{name!r:.40} is no number")

    def _complex(self, parts: Any, *_: Any) -> None:
        if not isinstance(parts, list) or len(parts) != 2 or not all(type(p) in (int, float) for p in parts):
            raise ArtefactError("a complex number has two parts")


def _of_torch(kind: str) -> Callable[..., None]:
    def check(_: _Checker, name: Any, *__: Any) -> None:
        if not isinstance(name, str) or name not in TORCH[kind]:
            raise ArtefactError(f"{name!r:.40} is no {kind}")

    return check


_EXPRESSIONS: Mapping[str, Callable[..., None]] = {
    "name": _Checker._name,
    "self": _Checker._self,
    "graph": _Checker._graph,
    "call": _Checker._call,
    "tuple": _Checker._items,
    "dict": _Checker._dict,
    "slice": _Checker._slice,
    "device": _Checker._device,
    "float": _Checker._float,
    "complex": _Checker._complex,
    **{kind: _of_torch(kind) for kind in TORCH},
}


def _identifier(name: object) -> None:
    """Refuse what is no name of a variable, or one that means something else in generated code.

    Raises:
        ArtefactError: it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in _RESERVED:
        raise ArtefactError(f"{name!r:.60} is no name of a variable")
    if name.startswith("__") and name.endswith("__"):
        raise ArtefactError(f"{name!r:.60} is no name of a variable")


def _fields(record: object, *names: str) -> list[Any]:
    """The fields of a table that has these and no others.

    Raises:
        ArtefactError: it is not.
    """
    if not isinstance(record, dict) or record.keys() != set(names):
        raise ArtefactError(f"a function has {', '.join(names)}")
    return [record[name] for name in names]


def _list(value: Any) -> list[Any]:
    """A list.

    Raises:
        ArtefactError: it is something else.
    """
    if not isinstance(value, list):
        raise ArtefactError("a list is expected")
    return value

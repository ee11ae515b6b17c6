"""Source of grafts to data: the text that `graphprune.rewrite.forward` writes, read and never run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from graphprune.code.check import TORCH
from graphprune.errors import ArtefactError

_OPERATORS: Mapping[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.FloorDiv: "floordiv",
    ast.Div: "truediv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.USub: "neg",
    ast.Not: "not",
    ast.And: "both",
    ast.Or: "either",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Is: "is",
}
_NUMBERS = ("trunc", "floor", "ceil", "sym_max", "sym_min", "sym_float", "sym_int", "sym_not")


def from_source(source: str) -> dict[str, Any]:
    """The forward as data.

    Raises:
        ArtefactError: the source holds something that such data has no form for.
    """
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    steps: list[list[Any]] = []
    names: set[str] = {a.arg for a in ast.walk(definition.args) if isinstance(a, ast.arg)}
    result: Any = None
    for statement in definition.body:
        if isinstance(statement, ast.Return):
            result = None if statement.value is None else _read(statement.value)
        elif isinstance(statement, ast.Assign):
            if isinstance(statement.value, ast.Constant) and statement.value.value is None:
                continue  # lets go of results
            (target,) = statement.targets
            assert isinstance(target, ast.Name)
            value = _read(statement.value)
            if target.id not in names:
                steps.append([target.id, value])
                names.add(target.id)
            elif value != {"name": target.id}:
                raise ArtefactError(f"{target.id} is defined twice")
        elif isinstance(statement, ast.Expr):
            steps.append([_unused(names), _read(statement.value)])
        else:
            raise ArtefactError(f"{ast.unparse(statement):.80} has no form as data")
    return {"parameters": _parameters(definition.args), "steps": steps, "result": result}


def _unused(names: set[str]) -> str:
    """A name for what nobody reads."""
    name = next(n for n in (f"unread_{i}" for i in range(len(names) + 1)) if n not in names)
    names.add(name)
    return name


def _parameters(arguments: ast.arguments) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": a.arg, "kind": "/"} for a in arguments.posonlyargs]
    found += [{"name": a.arg} for a in arguments.args]
    for parameter, default in zip(reversed(found), reversed(arguments.defaults), strict=False):
        parameter["default"] = _read(default)
    if arguments.vararg:
        found.append({"name": arguments.vararg.arg, "kind": "*"})
    for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append({"name": a.arg, "kind": "keyword", **({} if value is None else {"default": _read(value)})})
    if arguments.kwarg:
        found.append({"name": arguments.kwarg.arg, "kind": "**"})
    return [p for p in found if p["name"] != "self"]


def _read(node: ast.expr) -> Any:
    """One expression.

    Raises:
        ArtefactError: it has no form as data.
    """
    reader = _READERS.get(type(node))
    found = None if reader is None else reader(node)
    if found is None and not (isinstance(node, ast.Constant) and node.value is None):
        raise ArtefactError(f"{ast.unparse(node):.80} has no form as data")
    return found


def call(name: str, *args: Any) -> dict[str, Any]:
    """A call as data."""
    return {"call": name, "args": list(args)}


def _constant(node: ast.Constant) -> Any:
    if isinstance(node.value, complex):
        return {"complex": [node.value.real, node.value.imag]}
    return node.value if isinstance(node.value, (bool, int, float, str)) else None


def _named(node: ast.Name) -> Any:
    return {"float": node.id} if node.id in ("inf", "nan") else {"name": node.id}


def _attribute(node: ast.Attribute) -> Any:
    path = _dotted(node)
    if path and path[0] == "self":
        return {"self": ".".join(path[1:])}
    if path and path[0] == "torch":
        return next(({kind: path[1]} for kind, known in TORCH.items() if len(path) == 2 and path[1] in known), None)
    return call(node.attr, _read(node.value)) if node.attr in ("shape", "device") else None


def _dotted(node: ast.expr) -> list[str]:
    """The parts of `self.a.b`, `getattr(self, "0").b`, `torch.ops.c` or `math.d`; nothing for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return [*inner, node.attr] if inner and inner[0] in ("self", "torch", "math") else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        inner = _dotted(node.args[0])
        name = node.args[1]
        return [*inner, str(name.value)] if inner[:1] == ["self"] and isinstance(name, ast.Constant) else []
    return []


def _called(node: ast.Call) -> Any:
    path = _dotted(node)
    if path:
        return {"self": ".".join(path[1:])}
    function = _dotted(node.func)
    args = [_read(a) for a in node.args]
    kwargs = {str(k.arg): _read(k.value) for k in node.keywords}
    if function[:2] == ["torch", "ops"]:
        return {"call": ".".join(function[2:]), "args": args, **({"kwargs": kwargs} if kwargs else {})}
    if function in (["device"], ["torch", "device"]):
        index = f":{kwargs['index']}" if "index" in kwargs else ""
        return {"device": f"{(*args, *kwargs.values())[0]}{index}"}
    if function == ["torch", "_assert"]:
        return call("assert", *args)
    if function in (["slice"], ["complex"]):
        return {function[0]: args}
    if function == ["getattr"] and args[1] == "device":
        return call("device", args[0])
    return call(function[1], *args) if function[:1] in (["torch"], ["math"]) and function[1] in _NUMBERS else None


def _binary(node: ast.BinOp) -> Any:
    name = _OPERATORS.get(type(node.op))
    return name and call(name, _read(node.left), _read(node.right))


def _unary(node: ast.UnaryOp) -> Any:
    operand = _read(node.operand)
    if isinstance(node.op, ast.USub) and isinstance(operand, (int, float)):
        return -operand
    if isinstance(node.op, ast.USub) and operand == {"float": "inf"}:
        return {"float": "-inf"}
    name = _OPERATORS.get(type(node.op))
    return name and call(name, operand)


def _compared(node: ast.Compare) -> Any:
    """Comparisons, chained ones taken apart: their operands are sizes, which may be read twice."""
    operands = [_read(o) for o in (node.left, *node.comparators)]
    names = ["is" if isinstance(o, ast.IsNot) else _OPERATORS.get(type(o)) for o in node.ops]
    if None in names:
        return None
    parts = [call(str(n), operands[i], operands[i + 1]) for i, n in enumerate(names)]
    parts = [call("not", p) if isinstance(o, ast.IsNot) else p for p, o in zip(parts, node.ops, strict=True)]
    return _joined("both", parts)


def _joined(name: str, parts: list[Any]) -> Any:
    found = parts[0]
    for part in parts[1:]:
        found = call(name, found, part)
    return found


def _boolean(node: ast.BoolOp) -> Any:
    return _joined(_OPERATORS[type(node.op)], [_read(v) for v in node.values])


def _dictionary(node: ast.Dict) -> Any:
    keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
    if not all(isinstance(k, (str, int)) for k in keys):
        return None
    return {"dict": [[k, _read(v)] for k, v in zip(keys, node.values, strict=True)]}


_READERS: Mapping[type[ast.AST], Callable[[Any], Any]] = {
    ast.Constant: _constant,
    ast.Name: _named,
    ast.Attribute: _attribute,
    ast.Call: _called,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.Compare: _compared,
    ast.BoolOp: _boolean,
    ast.Subscript: lambda node: call("item", _read(node.value), _read(node.slice)),
    ast.List: lambda node: [_read(e) for e in node.elts],
    ast.Tuple: lambda node: {"tuple": [_read(e) for e in node.elts]},
    ast.Dict: _dictionary,
}

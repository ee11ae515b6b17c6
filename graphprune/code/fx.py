"""Graph modules to data, and data to graph modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.code.check import TORCH
from graphprune.code.ops import BY_FUNCTION, FUNCTIONS, HIGHER, allowed, name_of
from graphprune.code.read import call
from graphprune.errors import ArtefactError

Functions = dict[str, dict[str, Any]]

# -- graph to data -----------------------------------------------------------------------------------------------


def from_graph(module: fx.GraphModule) -> tuple[Functions, dict[str, str]]:
    """The graph of a module as data: its forward under "", and the functions that some of its ops run.

    What the forward returns loses its classes: an object becomes a dict of what holds tensors in it, by name, or a
    list where its class has no names for that.

    Returns:
        The functions, and per step of the forward the path of the module whose code it comes from.
    Raises:
        ArtefactError: the graph holds something that such data has no form for.
    """
    functions: Functions = {}
    functions[""] = _Reader(module, functions).function()
    places = {n.name: _place(n) for n in module.graph.nodes}
    return functions, places


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]).split("@")[0] if stack else ""


class _Reader:
    """Reads one graph; those it runs are added to `functions`."""

    def __init__(self, module: fx.GraphModule, functions: Functions) -> None:
        self.module, self.functions = module, functions
        self.steps: list[list[Any]] = []

    def function(self) -> dict[str, Any]:
        nodes = list(self.module.graph.nodes)
        info = getattr(self.module.graph._codegen, "pytree_info", None)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        parameters = [{"name": n.name} for n in placeholders]
        if info is not None:
            parameters = [{"name": _safe(name)} for name in info.orig_args]
            self._unpack(placeholders, info)
        result: Any = None
        for node in nodes:
            if node.op == "output":
                (returned,) = node.args
                result = self._returned(returned, None if info is None else info.out_spec)
            elif node.op != "placeholder":
                self.steps.append([_safe(node.name), self._step(node)])
        return {"parameters": parameters, "steps": self.steps, "result": result}

    def _unpack(self, placeholders: list[fx.Node], info: Any) -> None:
        """Steps that take the leaves out of the arguments."""
        args, kwargs = pytree.tree_unflatten(placeholders, info.in_spec)
        for name, argument in zip(info.orig_args, (*args, *kwargs.values()), strict=True):
            for node, where in _leaves(argument, {"name": _safe(name)}):
                if where != {"name": _safe(node.name)}:
                    self.steps.append([_safe(node.name), where])

    def _returned(self, returned: Any, spec: pytree.TreeSpec | None) -> Any:
        return self._value(returned) if spec is None else _plain(spec, map(self._value, returned))

    def _step(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._held(str(node.target))
        if node.op != "call_function":
            raise ArtefactError(f"{node.op} of {node.target} has no form as data")
        args = [self._value(a) for a in node.args]
        kwargs = {k: self._value(v) for k, v in node.kwargs.items()}
        target: Any = node.target
        if target is getattr and node.args[1] == "device":
            return call("device", args[0])
        if isinstance(target, torch._ops.OpOverload):
            return {"call": name_of(target), "args": args, **({"kwargs": kwargs} if kwargs else {})}
        if isinstance(target, torch._ops.HigherOrderOperator) and str(target) in HIGHER:
            return call(f"higher_order.{target}", *args)
        if target not in BY_FUNCTION or kwargs:
            raise ArtefactError(f"a call of {getattr(target, '__name__', target)} has no form as data")
        return call(BY_FUNCTION[target], *args)

    def _held(self, path: str) -> Any:
        found: Any = self.module
        for part in path.split("."):
            found = getattr(found, part)
        if not isinstance(found, fx.GraphModule):
            return {"self": path}
        name = _safe(f"function_{len(self.functions)}")
        self.functions[name] = {}  # takes the name
        self.functions[name] = _Reader(found, self.functions).function()
        return {"graph": name}

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr" and isinstance(held := self._graph_of(value), dict):
                return held
            return {"name": _safe(value.name)}
        if isinstance(value, (list, tuple)):
            items = [self._value(v) for v in value]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, dict):
            return {"dict": [[k, self._value(v)] for k, v in value.items()]}
        return literal(value)

    def _graph_of(self, node: fx.Node) -> Any:
        """The function that a node stands for, if it stands for one."""
        return next((e for name, e in self.steps if name == _safe(node.name) and "graph" in e), None)


def literal(value: Any) -> Any:
    """A value that is no result of a step.

    Raises:
        ArtefactError: it has no form as data.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, (type(None), bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, slice):
        return {"slice": [literal(p) for p in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in TORCH.items():
        name = str(value).removeprefix("torch.")
        if known.get(name) is value:
            return {kind: name}
    raise ArtefactError(f"a {type(value).__name__} has no form as data")


def _leaves(argument: Any, where: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Each leaf of one argument, and the expression that takes it out.

    Raises:
        ArtefactError: it is in an object that has no form as data.
    """
    if isinstance(argument, fx.Node):
        yield argument, where
    elif isinstance(argument, (list, tuple)):
        for i, held in enumerate(argument):
            yield from _leaves(held, call("item", where, i))
    elif isinstance(argument, dict):
        for key, held in argument.items():
            yield from _leaves(held, call("item", where, key))
    else:
        raise ArtefactError(f"a {type(argument).__name__} among the arguments has no form as data")


def _plain(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """An output without its classes: what an object holds goes under its own names, in a list where there are none.

    It is read off the description of the output. The objects themselves could not be asked: what makes them again may
    compute with their tensors, and what takes them apart may pass over all that are none.
    """
    if spec.is_leaf():
        return next(leaves)
    children = [_plain(child, leaves) for child in spec.children()]
    if spec.type in (tuple, list):
        return children if spec.type is list else {"tuple": children}
    names = _names(spec)
    return children if names is None else {"dict": [[n, c] for n, c in zip(names, children, strict=True)]}


def _names(spec: pytree.TreeSpec) -> list[str | int] | None:
    """What the children of an object are called; None where its class does not say or gives a name twice."""
    children = [torch.empty(0) for _ in spec.children()]
    try:
        kind = pytree.SUPPORTED_NODES[spec.type]
        given = kind.flatten_with_keys_fn(kind.unflatten_fn(children, spec.context))[0]  # type: ignore[misc]
    except Exception:  # code of the class, which may want other children than these or have no names for them
        return None
    found = {id(child): _key(key) for key, child in given}
    names = [found[id(child)] for child in children if id(child) in found]
    return names if len(set(names)) == len(given) == len(children) else None


def _key(key: Any) -> str | int:
    found = next((getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), None)
    return found if isinstance(found, int) else str(found)


def _safe(name: str) -> str:
    """Names that generated code needs for itself get a mark."""
    return f"{name}_" if name in ("torch", "math", "device", "inf", "nan", "slice", "complex", "getattr") else name


# -- data to graph -----------------------------------------------------------------------------------------------


def to_graph(functions: Mapping[str, Mapping[str, Any]], held: nn.Module, name: str) -> fx.GraphModule:
    """A graph module with these functions over the tensors of `held`.

    Args:
        functions: checked.
        held: a module that has the tensors, in modules of its own.
        name: of its class.
    """
    return _Writer(functions, held).module(functions[""], name)


class _Writer:
    """Writes functions as graphs; one that another one runs becomes an attribute of the module."""

    def __init__(self, functions: Mapping[str, Mapping[str, Any]], held: nn.Module) -> None:
        self.functions, self.held = functions, held

    def module(self, function: Mapping[str, Any], name: str) -> fx.GraphModule:
        graph = fx.Graph()
        env: dict[str, Any] = {}
        for parameter in function["parameters"]:
            default = (self._value(graph, parameter["default"], {}),) if "default" in parameter else ()
            env[parameter["name"]] = graph.create_node(
                "placeholder", parameter["name"], default, name=parameter["name"]
            )
        for step, expression in function["steps"]:
            env[step] = self._value(graph, expression, env)
        graph.output(self._value(graph, function["result"], env))
        return fx.GraphModule(self.held, graph, class_name=name)

    def _value(self, graph: fx.Graph, value: Any, env: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._value(graph, v, env) for v in value]
        if not isinstance(value, dict):
            return value
        kind = next(k for k in _MAKERS if k in value)
        return _MAKERS[kind](self, graph, value, env)

    def _call(self, graph: fx.Graph, value: Mapping[str, Any], env: Mapping[str, Any]) -> fx.Node:
        name = value["call"]
        args = tuple(self._value(graph, a, env) for a in value.get("args", []))
        kwargs = {k: self._value(graph, v, env) for k, v in value.get("kwargs", {}).items()}
        if name == "device":
            return graph.call_function(getattr, (args[0], "device"))
        if name in FUNCTIONS:
            return graph.call_function(FUNCTIONS[name][0], args)
        if name.startswith("higher_order."):
            return graph.call_function(getattr(torch.ops.higher_order, name.partition(".")[2]), args)
        return graph.call_function(allowed(name, (name.rpartition(".")[0],)), args, kwargs)

    def _graph(self, graph: fx.Graph, value: Mapping[str, Any], _: Mapping[str, Any]) -> fx.Node:
        name = value["graph"]
        if name not in self.held._modules:
            self.held.add_module(name, self.module(self.functions[name], name))
        return graph.create_node("get_attr", name)


_MAKERS: Mapping[str, Callable[[_Writer, fx.Graph, Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "call": _Writer._call,
    "name": lambda w, g, v, env: env[v["name"]],
    "self": lambda w, g, v, env: g.create_node("get_attr", v["self"]),
    "graph": _Writer._graph,
    "tuple": lambda w, g, v, env: tuple(w._value(g, i, env) for i in v["tuple"]),
    "dict": lambda w, g, v, env: {k: w._value(g, i, env) for k, i in v["dict"]},
    "slice": lambda w, g, v, env: slice(*(w._value(g, i, env) for i in v["slice"])),
    "device": lambda w, g, v, env: torch.device(v["device"]),
    "float": lambda w, g, v, env: float(v["float"]),
    "complex": lambda w, g, v, env: complex(*v["complex"]),
    **{kind: lambda w, g, v, env, kind=kind: TORCH[kind][v[kind]] for kind in TORCH},  # type: ignore[misc]
}

"""Rewriting the sizes in an exported graph; what whole-graph emission and grafts have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphprune.axes import Atom, Axis
from graphprune.coupling import Coupling
from graphprune.errors import RewriteError
from graphprune.plan import Plan
from graphprune.program import Value
from graphprune.rewrite.state import lookup
from graphprune.rules import Applied, Literal
from graphprune.trace import nested_graph


class Writer:
    """Rewrites the sizes in one graph and the graphs nested in it.

    Args:
        coupling: of the graph.
        plan: what is removed.
        model: the original, by whose modules it is told what follows `.train()`.
        training: the mode of the module whose graph it is, if that is not the whole model.
    """

    def __init__(self, coupling: Coupling, plan: Plan, model: nn.Module, training: bool | None = None) -> None:
        self.coupling, self.model = coupling, model
        self.training = model.training if training is None else training
        self.widths: dict[Atom, int] = {coupling.atoms[n]: len(kept) for n, kept in plan.groups.items()}
        self.memo: dict[Axis, Any] = {}
        self.values: Mapping[str, Value] = {v.name: v for v in coupling.dims}
        self.natural: dict[fx.Node, int] = {}

    def width(self, axis: Axis) -> int:
        """How many positions of `axis` the plan keeps."""
        return int(self.coupling.axes.width(axis, self.widths, self.memo))

    def rewrite(self, module: fx.GraphModule, prefix: str) -> None:
        """Rewrite every node of a graph."""
        graph = module.graph
        switch, home = _Switch(graph), _Home(graph)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.erase_node(node)  # it would forbid another dtype or device later
                continue
            if node.kwargs.get("device") is not None:
                home.follow(node)
            args = tuple(
                getattr(module, str(a.target)) if isinstance(a, fx.Node) and _is_body(module, a) else a
                for a in node.args
            )
            if (inner := nested_graph(node.target, args)) is not None:
                self.rewrite(inner[0], f"{prefix}{node.name}.")
                continue
            if (applied := self.coupling.applied.get(prefix + node.name)) is not None:
                self._node(graph, node, applied, prefix)
                owner = lookup(self.model, applied.node.module)
                if getattr(owner, "training", self.training) == self.training:  # else it is frozen
                    switch.follow(node)
        graph.lint()
        module.recompile()

    def guard(self, graph: fx.Graph) -> None:
        """Refuse inputs that the trace does not hold for: sizes it fixed, and arguments that are no tensors."""
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        if not placeholders:
            return
        with graph.inserting_before(placeholders[-1].next):
            for node in placeholders:
                val = node.meta.get("val")
                if not isinstance(val, torch.Tensor):
                    compare = operator.is_ if val is None else operator.eq
                    if val is None or isinstance(val, (bool, int, float, str)):
                        _assert(graph, graph.call_function(compare, (node, val)), f"{node.name} was {val!r}")
                    continue
                for d, size in enumerate(val.shape):
                    fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)
                    if fixed is not None:
                        found = graph.call_function(torch.ops.aten.sym_size.int, (node, d))
                        same = graph.call_function(operator.eq, (found, fixed))
                        _assert(graph, same, f"dim {d} of {node.name} was {fixed}")
        graph.lint()

    def _node(self, graph: fx.Graph, node: fx.Node, applied: Applied, prefix: str) -> None:
        replacement = applied.replacement
        if replacement and any(self.width(axis) != axis.size for axis in replacement.axes):
            name, overload = replacement.op.split(".")
            target = getattr(getattr(torch.ops.aten, name), overload)
            names = [a.name for a in target._schema.arguments]
            node.args = tuple(node.args[0] if n == "self" else replacement.arguments[n] for n in names)
            node.kwargs, node.target = {}, target
            for literal in replacement.literals:
                self._literal(graph, node, literal, prefix)
            return
        for literal in applied.literals:
            self._literal(graph, node, literal, prefix)
        for fixed in applied.fixed:
            if self.width(fixed.axis) != fixed.axis.size:
                _set(node, (fixed.argument,), fixed.value)

    def _literal(self, graph: fx.Graph, node: fx.Node, literal: Literal, prefix: str) -> None:
        new = self.width(literal.axis)
        given = _get(node, literal.path)
        if isinstance(given, fx.Node):
            natural = self._natural(given, prefix)
            if natural == new:
                return
            with graph.inserting_before(node):
                scaled = graph.call_function(operator.mul, (given, new))
                given = graph.call_function(operator.floordiv, (scaled, natural))
            _set(node, literal.path, given)
        elif given is not None and given != new:
            _set(node, literal.path, new)

    def _natural(self, node: fx.Node, prefix: str) -> int:
        """What an int node computes in the pruned graph at the example inputs."""
        if node not in self.natural:
            self.natural[node] = self._compute(node, prefix)
        return self.natural[node]

    def _compute(self, node: fx.Node, prefix: str) -> int:
        if node.target is torch.ops.aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(dim, int)
            if source.op == "placeholder":  # its name differs where that is a Python name, such as `input`
                return self.width(self.coupling.dims[self.values[str(source.target)]][dim])
            value = self.values.get(prefix + source.name) or self.values[source.name]
            return self.width(self.coupling.dims[value][dim])
        if getattr(node.target, "__module__", "") in ("_operator", "operator", "math"):
            compute: Callable[..., Any] = node.target  # type: ignore[assignment]
            return int(compute(*(self._natural(a, prefix) if isinstance(a, fx.Node) else a for a in node.args)))
        val = node.meta.get("val")
        hint = val.node.hint if isinstance(val, torch.SymInt) else val
        if not isinstance(hint, int):
            raise RewriteError(
                f"the size computed by {node.name} ({node.target}) cannot be rewritten; use emit='module'"
            )
        return hint


def _assert(graph: fx.Graph, holds: fx.Node, what: str) -> None:
    text = f"this graph module holds only for inputs like those it was pruned with: {what}; prune again with others"
    graph.call_function(torch._assert, (holds, text))


class _Switch:
    """Makes dropout and batch norm follow `self.training`, as they do in the original."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.flag: fx.Node | None = None

    def follow(self, node: fx.Node) -> None:
        """Replace a literal eval-mode flag by the module's own."""
        argument = _FLAGS.get(getattr(getattr(node.target, "_schema", None), "name", ""))
        if argument is None or _get(node, (argument,)) is not False:
            return
        if self.flag is None:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.flag = self.graph.create_node("get_attr", "training")
        _set(node, (argument,), self.flag)


class _Home:
    """Makes tensors appear on the device of the inputs, wherever the module is moved."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.device: fx.Node | None = None

    def follow(self, node: fx.Node) -> None:
        """Replace a literal device by that of the first tensor among the inputs."""
        if self.device is None:
            inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
            tensors = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
            if not tensors:
                return
            with self.graph.inserting_before(inputs[-1].next):
                self.device = self.graph.call_function(getattr, (tensors[0], "device"))
        node.update_kwarg("device", self.device)


_FLAGS = {
    "aten::dropout": "train",
    "aten::dropout_": "train",
    "aten::feature_dropout": "train",
    "aten::feature_dropout_": "train",
    "aten::alpha_dropout": "train",
    "aten::alpha_dropout_": "train",
    "aten::batch_norm": "training",
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), "train"),
}


def _is_body(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)


def _names(node: fx.Node) -> list[str]:
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


def _get(node: fx.Node, path: tuple[str | int, ...]) -> Any:
    """The argument at `path`; None where it is left to its default."""
    name, *index = path
    position = _names(node).index(str(name))
    held: Any = node.args[position] if position < len(node.args) else node.kwargs.get(str(name))
    for i in index:
        held = held[i]
    return held


def _set(node: fx.Node, path: tuple[str | int, ...], value: Any) -> None:
    """Write the argument at `path`."""
    name, *index = path
    if index:
        items = list(_get(node, (name,)))
        items[int(index[0])] = value
        value = items
    position = _names(node).index(str(name))
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(str(name), value)

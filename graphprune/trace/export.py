"""Front end: `torch.export` run on the user's model, read into a `Program`.

The export is the pre-dispatch training IR, not decomposed, so a convolution or an attention product is still one
node. It can leave the batch size open and its graph can be run and rewritten, which is what a graph module needs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import math
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, TraceError
from graphprune.program import Kind, Node, Program, SymbolicInt, Value, is_library
from graphprune.trace.inputs import Inputs
from graphprune.trace.refuse import export_failure, own_failure
from graphprune.trace.schema import call_node, hint, value, writes
from graphprune.trace.state import State
from graphprune.trace.tree import carried, register

OpenDims = Sequence[tuple[int, ...]]
"""Per tensor of the inputs, in flattening order, the dims whose sizes are left open."""


def export(model: nn.Module, inputs: Inputs, open_dims: OpenDims = ()) -> Program:
    """The program that `torch.export` gives; the model must be in eval mode.

    Args:
        model, inputs: what is exported.
        open_dims: which sizes are left open; the exporter closes those that the model fixes.
    Raises:
        InputError: the model itself fails on these inputs.
        TraceError: the model runs but cannot be exported; the message names the line of the user's code.
    """
    return _Reader(model, _export(model, inputs, open_dims)).read()


def _export(model: nn.Module, inputs: Inputs, open_dims: OpenDims) -> torch.export.ExportedProgram:
    def attempt() -> torch.export.ExportedProgram:
        shapes = _dynamic_shapes(inputs, open_dims) if open_dims else None
        with warnings.catch_warnings(), _without_half_a_graph():
            warnings.simplefilter("ignore")
            with _keywords_spelt_out(model, inputs):
                return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)

    try:
        return attempt()
    except Exception as error:
        try:
            output = _run_apart(model, inputs)
        except Exception as cause:
            raise InputError(own_failure(model, inputs, cause)) from cause
        if not register(output):
            raise TraceError(export_failure(model, error)) from error
    try:  # now that its outputs can be looked into
        return attempt()
    except Exception as error:
        raise TraceError(export_failure(model, error)) from error


@contextlib.contextmanager
def _without_half_a_graph() -> Iterator[None]:
    """An export that fails prints what it had of the graph, thousands of lines; whatever else is printed stays."""
    printed, half = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except Exception as error:
        half = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(printed.getvalue().replace(half, "") if half.strip() else printed.getvalue())


@contextlib.contextmanager
def _keywords_spelt_out(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """A signature that names what is passed in `**kwargs`: the exporter takes no open sizes beside it otherwise."""
    parameters = inspect.signature(model.forward).parameters
    given = [name for name in inputs.kwargs if name not in parameters]
    rest = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    if not given or len(rest) == len(parameters):
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    own, before = model.forward, {n: held for n, held in vars(model).items() if n == "forward"}
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in given]
    forward.__signature__ = inspect.Signature([*rest, *named])  # type: ignore[attr-defined]
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        vars(model).update(before)


def _run_apart(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns; code that writes to parameters writes to copies."""
    apart = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = inputs.map(torch.clone)
    return torch.func.functional_call(model, apart, inputs.args, dict(inputs.kwargs))


def _dynamic_shapes(inputs: Inputs, open_dims: OpenDims) -> Any:
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, dims in zip(inputs.tensors(), open_dims, strict=True):
        if dims:
            shapes[tensor] = dict.fromkeys(dims, torch.export.Dim.AUTO)
    return shapes


class _Reader:
    """Reads one exported program into values and nodes; calls into nested graphs are followed in place."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        self.state = State(model)
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []

    def read(self) -> Program:
        graph = self.exported.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        env = {n: self._placeholder(n, spec) for n, spec in zip(placeholders, specs, strict=True)}
        outputs = self._body(self.exported.graph_module, env, prefix="")
        dynamic = any(_is_open(n.meta.get("val")) for n in placeholders)
        spec = self.exported.call_spec.out_spec
        marks = carried(self.state.model, pytree.tree_unflatten([torch.empty(0)] * spec.num_leaves, spec))
        return self.state.program(
            self.inputs, outputs, self.nodes, carried=marks, dynamic_batch=dynamic, source=self.exported
        )

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> Any:
        val = node.meta.get("val")
        kind = _KINDS.get(spec.kind.name)
        if not isinstance(val, torch.Tensor) or kind is None:
            return val if kind is None or not isinstance(val, torch.SymInt) else SymbolicInt(node.name, hint(val))
        if kind == "input":
            given = value(node.name, val, kind, str(node.target))
            self.inputs.append(given)
            return given
        return self.state.add(spec.target, val, kind, node.name)

    def _body(self, module: torch.fx.GraphModule, env: dict[torch.fx.Node, Any], prefix: str) -> list[Any]:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                env[node] = functools.reduce(getattr, str(node.target).split("."), module)
            elif node.op == "output":
                return [env.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args[0]]
            elif node.op == "call_function":
                env[node] = self._call(node, env, prefix)
        raise AssertionError(f"graph {prefix!r} has no output")

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], prefix: str) -> Any:
        args: Any
        args, kwargs = pytree.tree_map_only(torch.fx.Node, env.__getitem__, (node.args, dict(node.kwargs)))
        if node.target is operator.getitem:
            return args[0][args[1]]
        if (inner := nested_graph(node.target, args)) is not None:
            body, operands = inner
            placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
            return tuple(self._body(body, dict(zip(placeholders, operands, strict=True)), f"{prefix}{node.name}."))
        val = node.meta.get("val")
        if isinstance(val, (int, torch.SymInt)):
            return SymbolicInt(node.name, hint(val))
        if isinstance(val, (float, torch.SymFloat, torch.SymBool)):
            return val if isinstance(val, float) else math.nan  # a number that is known only when the model runs
        name = prefix + node.name
        if isinstance(val, torch.Tensor):
            outputs: tuple[Any, ...] = (value(name, val, "node"),)
            result: Any = outputs[0]
        elif isinstance(val, (tuple, list)) and val:
            outputs = tuple(
                value(f"{name}.{i}", v, "node") if isinstance(v, torch.Tensor) else v for i, v in enumerate(val)
            )
            result = outputs
        elif writes(node.target):
            outputs, result = (), None
        else:
            return None
        self.nodes.append(
            call_node(
                node.target,
                args,
                kwargs,
                name=name,
                outputs=tuple(v for v in outputs if isinstance(v, Value)),
                module=_module_path(node),
                line=_user_line(node.meta.get("stack_trace") or ""),
            )
        )
        return result


_KINDS: dict[str, Kind] = {
    "PARAMETER": "parameter",
    "BUFFER": "buffer",
    "CONSTANT_TENSOR": "constant",
    "USER_INPUT": "input",
}


def nested_graph(target: Any, args: tuple[Any, ...]) -> tuple[torch.fx.GraphModule, tuple[Any, ...]] | None:
    """The graph a wrapper node (autocast, no_grad, checkpoint) runs once, and its operands; None for anything else."""
    if not isinstance(target, torch._ops.HigherOrderOperator):
        return None
    bodies = [i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule)]
    if len(bodies) != 1:
        return None
    body, operands = args[bodies[0]], args[bodies[0] + 1 :]
    wanted = sum(n.op == "placeholder" for n in body.graph.nodes)
    return (body, operands) if len(operands) == wanted else None


def _is_open(val: Any) -> bool:
    """Whether the first dim of an input is left open; the exporter closes it where the model fixes its size."""
    first = val.shape[0] if isinstance(val, torch.Tensor) and val.dim() else 0
    return isinstance(first, torch.SymInt) and first.node.maybe_as_int() is None


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.split("@")[0]


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _user_line(stack: str) -> tuple[str, int] | None:
    """The innermost frame outside torch of a formatted stack."""
    return next(((path, int(line)) for path, line in reversed(_FRAME.findall(stack)) if not is_library(path)), None)

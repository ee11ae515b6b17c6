"""The forward of one module of the user's model, written anew from its trace as Python source.

The module is exported on its own, with the arguments that the model calls it with and every size open that follows the
batch. Its nodes are those that the model's own trace has for that call, so the coupling of the whole model says which
of its sizes change.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.axes import Axis, Mask
from graphprune.coupling import Coupling
from graphprune.errors import RewriteError
from graphprune.plan import Plan
from graphprune.program import Node, Program, Value
from graphprune.rewrite.parts import Call, Parts, named_leaves
from graphprune.rewrite.state import lookup
from graphprune.rewrite.writer import Writer
from graphprune.rules import Applied, Dims
from graphprune.trace.export import OpenDims

NAMESPACE: Mapping[str, Any] = {
    "torch": torch,
    "math": math,
    "device": torch.device,
    "getattr": getattr,
    "inf": math.inf,
    "nan": math.nan,
}
"""The names that generated source may use."""
MANY, LONG = 8, 200
"""A forward that holds only under more conditions on its sizes, or longer ones, is not written."""


@dataclass(frozen=True)
class Forward:
    """A forward as Python source.

    Attributes:
        source: one function called `forward`.
        constants: tensors of the original code that it reads as attributes of `self`, sliced.
    """

    source: str
    constants: Mapping[str, torch.Tensor]


# -- source ------------------------------------------------------------------------------------------------------


def forward_of(parts: Parts, path: str, call: Call, coupling: Coupling, plan: Plan) -> Forward:
    """The forward of the module at `path`, with the sizes that `plan` leaves.

    Args:
        parts: the modules of the original, each traced on its own.
        path: which of them.
        call: how it is called.
        coupling, plan: of the whole model.
    Raises:
        RewriteError: this module cannot be traced on its own, or not to the calls that the model's trace has.
    """
    module = lookup(parts.model, path)
    signature = _signature(module, path)
    part = _part(coupling, parts.program(path, call), call, path)
    _check_open(part.program, call, path)
    wider = dataclasses.replace(call, open_dims=_openable(part, call))
    conditions = _conditions(part, call, path)
    if wider.open_dims != call.open_dims and type(module) not in parts.closed:
        try:  # a module that is not bound to the example's resolution or sequence length should not become so
            open_part = _part(coupling, parts.program(path, wider), wider, path)
            conditions = _conditions(open_part, wider, path)
            part, call = open_part, wider
        except RewriteError:
            parts.closed.add(type(module))
    graph_module = part.program.source.module(check_guards=False)
    if any(isinstance(m, fx.GraphModule) for m in graph_module.children()):
        raise RewriteError(f"{path} has regions, such as autocast, that cannot be written as one function")
    Writer(part, plan, parts.model, training=module.training).rewrite(graph_module, "")
    held = [*_given(module, call, path), *_fixed_conditions(part, plan, call, path), *conditions]
    return Forward(_source(signature, graph_module, call, path, held), _constants(module, part, plan))


def _part(coupling: Coupling, program: Program, call: Call, path: str) -> Coupling:
    """What `coupling` says about the nodes of `program`, which is one call of the module at `path`.

    Raises:
        RewriteError: they are not the nodes that the model has there.
    """
    dims: dict[Value, Dims] = {}
    met: dict[Value, Value] = {}
    applied: dict[str, Applied] = {}
    wholes: list[tuple[Value, Value]] = []
    for own, other in _aligned(program, coupling.program, path):
        if other is None:
            wholes.append((own.values()[0], own.outputs[0]))
            if wholes[-1][0] in dims:
                dims[own.outputs[0]] = dims[wholes[-1][0]]
            continue
        if len(own.values()) != len(other.values()):
            raise RewriteError(f"{path} hands other arguments to {own.op} on its own than inside the model")
        for mine, theirs in zip((*own.values(), *own.outputs), (*other.values(), *other.outputs), strict=True):
            if met.setdefault(mine, theirs) is not theirs and mine.kind in ("parameter", "buffer"):
                raise RewriteError(f"{path} uses {mine.target} in another way on its own than in the model")
            if mine.kind == "constant" and theirs.kind in ("parameter", "buffer"):
                raise RewriteError(f"{path} uses {theirs.target}, which is not its own")
            dims[mine] = coupling.dims[theirs]
        if other.name in coupling.applied:
            applied[own.name] = coupling.applied[other.name]
    for whole, taken in reversed(wholes):  # an input that is read through such a slice only
        if taken in dims:
            dims.setdefault(whole, dims[taken])
    same: dict[int, list[Value]] = {}
    for value, tensor in zip(program.inputs, call.arguments.tensors(), strict=True):
        same.setdefault(id(tensor), []).append(value)
    for values in same.values():  # a tensor passed twice is read under one of its names
        known = next((dims[v] for v in values if v in dims), None)
        dims.update({v: known for v in values if known is not None})
    return dataclasses.replace(coupling, program=program, applied=applied, dims=dims)


def _aligned(program: Program, whole: Program, path: str) -> Iterator[tuple[Node, Node | None]]:
    """Each node of `program` beside the node of the whole model; None for a slice that takes everything.

    Such slices are noted or not, depending on which sizes are open.

    Raises:
        RewriteError: they are different ops.
    """
    inside = (n.module == path or n.module.startswith(path + ".") for n in whole.nodes)
    position = next((i for i, here in enumerate(inside) if here), 0)
    for own in program.nodes:
        while position < len(whole.nodes) and _is_whole(whole.nodes[position]) and not _is_whole(own):
            position += 1
        other = whole.nodes[position] if position < len(whole.nodes) else None
        if _is_whole(own) and not (other and _is_whole(other)):
            yield own, None
            continue
        if other is None or own.op != other.op:
            raise RewriteError(f"{path} is traced to other ops on its own than inside the model: {own.op}, {other}")
        yield own, other
        position += 1


def _is_whole(node: Node) -> bool:
    return node.op in ("slice", "alias") and node.values()[0].shape == node.outputs[0].shape


# -- what the source holds for -----------------------------------------------------------------------------------


def _check_open(program: Program, call: Call, path: str) -> None:
    """Refuse a graph that holds for one batch size where the model takes any.

    Raises:
        RewriteError: it does.
    """
    for sizes, dims in zip(_sizes(program), call.open_dims, strict=True):
        if any(isinstance(sizes[d], int) for d in dims):
            raise RewriteError(f"{path} cannot be traced with an open batch size")


def _sizes(program: Program) -> list[list[Any]]:
    """Per tensor of the inputs, its sizes: ints where they are fixed."""
    given = set(program.source.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.source.graph.nodes if n.op == "placeholder" and n.name in given]
    return [[_fixed(size) for size in v.shape] for v in values if isinstance(v, torch.Tensor)]


def _fixed(size: Any) -> Any:
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)
    return size if known is None else known


def _openable(part: Coupling, call: Call) -> OpenDims:
    """Which sizes may be left open: those that follow the batch, and those that no tensor of the state shares.

    A tensor that no op reads shares none: whether its sizes are read, such as for the length of a sequence, the
    exporter finds out.
    """
    state = {leaf for v in part.program.state for axis in part.dims.get(v, ()) for leaf in part.axes.leaves(axis)}
    found = []
    for value, dims in zip(part.program.inputs, call.open_dims, strict=True):
        axes = part.dims.get(value)
        taken = [bool(state & set(part.axes.leaves(axis))) for axis in axes or ()] or [False] * len(value.shape)
        free = [d for d, size in enumerate(value.shape) if size > 1 and not taken[d]]
        found.append(tuple(sorted({*dims, *free})))
    return found


def _conditions(part: Coupling, call: Call, path: str) -> list[str]:
    """Expressions that must hold for the trace to: on sizes left open, as the exporter found them.

    Raises:
        RewriteError: there are too many to be read or checked at every call.
    """
    sizes = dict(zip(_tensor_expressions(call, path), _sizes(part.program), strict=True))
    keywords = dict(zip(call.arguments.kwargs, call.names[len(call.arguments.args) :], strict=True))
    found = []
    for guard in part.program.source._guards_code:
        text = re.sub(r"L\['(\w+)'\]", lambda match: keywords.get(match[1], match[1]), guard)
        mentioned = [(e, int(d)) for e, d in re.findall(r"([\w\[\]'.]+)\.size\(\)\[(\d+)\]", text)]
        if not all(e in sizes for e, _ in mentioned):
            raise RewriteError(f"{path} depends on its arguments in a way that cannot be written as source: {guard}")
        if all(isinstance(sizes[e][d], int) for e, d in mentioned):
            continue
        for e, d in mentioned:
            fixed = sizes[e][d]
            text = text.replace(f"{e}.size()[{d}]", str(fixed) if isinstance(fixed, int) else f"{e}.shape[{d}]")
        found.append(text)
    if len(found) > MANY or any(len(text) > LONG for text in found):
        raise RewriteError(f"{path} holds only under {len(found)} conditions on the sizes of its inputs")
    return found


def _given(module: nn.Module, call: Call, path: str) -> Iterator[str]:
    """Expressions for the tensors that another call may leave out."""
    parameters = inspect.signature(module.forward).parameters
    for name in _tensor_expressions(call, path):
        if name in parameters and parameters[name].default is None:
            yield f"{name} is not None"


def _fixed_conditions(part: Coupling, plan: Plan, call: Call, path: str) -> Iterator[str]:
    """Expressions for what the trace fixed: sizes, arguments that are no tensors, and those that are one tensor."""
    keep = {part.atoms[n]: len(k) for n, k in plan.groups.items()}
    memo: dict[Any, Any] = {}
    for name, value, sizes in zip(
        _tensor_expressions(call, path), part.program.inputs, _sizes(part.program), strict=True
    ):
        axes = part.dims.get(value)
        for d, size in enumerate(sizes):
            if isinstance(size, int):
                yield f"{name}.shape[{d}] == {part.axes.width(axes[d], keep, memo) if axes else size}"
    first: dict[int, str] = {}
    for name, leaf in named_leaves(call, path):
        if isinstance(leaf, torch.Tensor) and first.setdefault(id(leaf), name) != name:
            yield f"{name} is {first[id(leaf)]}"  # the trace reads it under one of its names
        if leaf is None or isinstance(leaf, bool):
            yield f"{name} is {leaf!r}"
        elif isinstance(leaf, (int, float, str)):
            yield f"{name} == {leaf!r}"


def _tensor_expressions(call: Call, path: str) -> list[str]:
    return [name for name, leaf in named_leaves(call, path) if isinstance(leaf, torch.Tensor)]


def _constants(module: nn.Module, part: Coupling, plan: Plan) -> dict[str, torch.Tensor]:
    """Tensors that the code makes or keeps outside its state, without the positions that the plan removes."""
    keep = part.keep(plan.groups)
    memo: dict[Axis, Mask] = {}
    found: dict[str, torch.Tensor] = {}
    for value in part.program.state:
        if value.kind != "constant" or isinstance(lookup(module, value.target), torch.Tensor):
            continue
        tensor = part.program.source.constants[value.target].detach().clone()
        for d, axis in enumerate(part.dims.get(value, ())):
            kept = torch.from_numpy(part.axes.mask(axis, keep, memo)).nonzero().flatten()
            tensor = tensor.index_select(d, kept.to(tensor.device))
        found[value.target] = tensor
    return found


def _source(signature: str, graph_module: fx.GraphModule, call: Call, path: str, conditions: Sequence[str]) -> str:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    out_spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    graph._codegen = _Code(signature, [n for n, _ in named_leaves(call, path)], out_spec, path, conditions)
    code = graph.python_code("self", verbose=False)
    unknown = set(code.globals) - set(NAMESPACE) - {"NoneType", "fx_pytree", "pytree"}  # these it always declares
    if unknown:
        raise RewriteError(f"{path} uses {', '.join(sorted(unknown))}, which cannot be written as source")
    return code.src.strip() + "\n"


def _signature(module: nn.Module, path: str) -> str:
    """The parameters of a forward, without their annotations.

    Raises:
        RewriteError: a default is more than a plain value.
    """
    signature = inspect.signature(module.forward)
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and not isinstance(default, (type(None), bool, int, float, str)):
            raise RewriteError(f"the default of {parameter.name} in the forward of {path} cannot be written as source")
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(bare))[1:-1]
    return f"self, {text}" if text else "self"


class _Code(fx.graph.CodeGen):
    """Writes the graph as a method with the user's signature."""

    def __init__(
        self, signature: str, leaves: list[str], out_spec: pytree.TreeSpec, path: str, conditions: Sequence[str]
    ) -> None:
        super().__init__()
        self.signature, self.leaves, self.out_spec, self.path = signature, leaves, out_spec, path
        self.conditions = conditions

    def gen_fn_def(self, free_vars: list[str], *_: Any, **__: Any) -> str:
        """The first line, and a name for each leaf of the arguments."""
        names = [v.partition(":")[0].partition("=")[0].strip() for v in free_vars if v != "self"]
        lines = [f"    {name} = {leaf}" for name, leaf in zip(names, self.leaves, strict=True) if name != leaf]
        if self.conditions:
            told = f"{self.path} was traced for " + ", ".join(self.conditions)
            lines.append(f"    torch._assert({' and '.join(self.conditions)}, {told!r})")
        return "\n".join([f"def forward({self.signature}):", *lines])

    def generate_output(self, output_args: Any, **_: Any) -> str:
        """The return statement, in the structure of the original."""
        leaves = iter(output_args)
        return f"return {self._written(self.out_spec, leaves)}"

    def _written(self, spec: pytree.TreeSpec, leaves: Iterator[Any]) -> str:
        if spec.is_leaf():
            return repr(next(leaves))
        children = [self._written(child, leaves) for child in spec.children()]
        if spec.type is tuple:
            return "(" + "".join(f"{c}, " for c in children) + ")"
        if spec.type is list:
            return "[" + ", ".join(children) + "]"
        if spec.type is dict:
            return "{" + ", ".join(f"{k!r}: {c}" for k, c in zip(spec.context, children, strict=True)) + "}"
        raise RewriteError(f"{self.path} returns a {spec.type.__name__}, which cannot be written as source")

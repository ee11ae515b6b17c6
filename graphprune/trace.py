"""Front end: `torch.export` run on the user's model, read into a `Program`.

The export is the pre-dispatch training IR, not decomposed, so a convolution or an attention product is still one
node. The model is traced in eval mode and is left exactly as it was: flags, attributes and random state included.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import random
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, TraceError
from graphprune.program import Kind, Node, Program, SymbolicInt, Value


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call.

    Example:
        >>> Inputs.of(torch.zeros(1, 3)).args[0].shape
        torch.Size([1, 3])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """Read what users pass: a tensor, a tuple of arguments, a dict of keyword arguments, or an `Inputs`."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example), {})
        return cls((example,), {})

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor inside, in flattening order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def map(self, change: Any) -> Inputs:
        """The same arguments with `change` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode for the block; afterwards it is as before, and so are the random generators.

    As before means flags, attributes, what its dicts, lists and sets hold, and the values of its buffers.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [(m, dict(vars(m)), [(held, copy.copy(held)) for held in _containers(m)]) for m in modules]
    scripted = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    generators = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.backends.mha.set_fastpath_enabled(False)
            for module in model.modules():
                module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for module, training in scripted:
            module.training = training
        for module, attributes, containers in before:
            for held, saved in containers:
                held.clear()
                held.extend(saved) if isinstance(held, list) else held.update(saved)
            vars(module).clear()
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


def _containers(module: nn.Module) -> list[Any]:
    """The dicts, lists and sets a module holds, among them its parameters and buffers: forwards may write to them."""
    return [held for held in vars(module).values() if isinstance(held, (dict, list, set))]


def trace(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = False) -> Program:
    """Trace `model` into a `Program`.

    Args:
        model: any module; it is not modified, and its weights are not copied (they may be on the meta device).
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `Inputs`.
        dynamic_batch: leave the size of dim 0 of every input open, where the model allows it.
    Raises:
        InputError: the arguments are not usable: not a module, wrong device, or the model itself fails on them.
        TraceError: the model runs but cannot be exported; the message names the line of the user's code.

    Example:
        >>> program = trace(nn.Linear(3, 5), torch.zeros(2, 3))
        >>> [node.op for node in program.nodes]
        ['linear']
    """
    inputs = Inputs.of(example_inputs)
    _check(model, inputs)
    _register_dataclasses((inputs.args, dict(inputs.kwargs)))
    with untouched(model), torch.no_grad():
        exported = _export(model, inputs, dynamic_batch)
    return _Reader(model, exported).read()


def run(model: nn.Module, inputs: Inputs, state: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The tensors `model` returns in eval mode, flattened in order; model and inputs are left untouched.

    Args:
        model: any module.
        inputs: arguments of its forward.
        state: parameters and buffers to use instead of its own, by fully qualified name.
    """
    inputs = inputs.map(torch.clone)
    with untouched(model), torch.no_grad():
        return output_tensors(torch.func.functional_call(model, dict(state or {}), inputs.args, dict(inputs.kwargs)))


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in a model's output, flattened in order; dataclasses are looked into."""
    _register_dataclasses(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


# -- export ------------------------------------------------------------------------------------------------------


def _check(model: object, inputs: Inputs) -> None:
    """Refuse what no export can make sense of, with the advice that fits.

    Raises:
        InputError: the model or the inputs are not usable.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model is a ScriptModule, which has no Python to trace; pass the module it was scripted from")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"model is wrapped in {type(model).__name__}; prune model.module and wrap the result again")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(f"{name} is not initialised yet; run the model once on real inputs, then prune it")
    homes = {p.device for p in (*model.parameters(), *model.buffers())}
    given = {t.device for t in inputs.tensors()}
    if len(homes) == 1 and given and homes != given:
        home = homes.pop()
        away = ", ".join(sorted(str(d) for d in given))
        raise InputError(f"example inputs are on {away} but the model is on {home}; move them with .to({str(home)!r})")


def _export(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    def attempt(dynamic: bool) -> torch.export.ExportedProgram:
        shapes = _batch_shapes(inputs) if dynamic else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)

    try:
        return attempt(dynamic_batch)
    except Exception as error:
        try:
            output = model(*inputs.args, **inputs.kwargs)
        except Exception as cause:
            raise InputError(_own_failure(model, inputs, cause)) from cause
        if _register_dataclasses(output):
            return attempt(dynamic_batch)
        raise TraceError(_export_failure(model, error)) from error


def _batch_shapes(inputs: Inputs) -> Any:
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in inputs.tensors():
        if tensor.dim():
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    return shapes


def _own_failure(model: nn.Module, inputs: Inputs, cause: Exception) -> str:
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in inputs.tensors())
    line = _user_line(cause)
    return (
        f"{type(model).__name__} itself fails on these example inputs ({shapes or 'no tensors'}): "
        f"{type(cause).__name__}: {_first_line(cause)}{line}\n"
        "pass inputs that model(*args, **kwargs) accepts: a tensor, a tuple of arguments or a dict of keyword arguments"
    )


def _export_failure(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} runs, but cannot be traced: {type(error).__name__}: {_first_line(error)}"
        f"{_user_line(error)}\n"
        "its path through the code must not depend on the values of tensors; move such a branch out of the model, "
        "write it with torch.where, or prune the submodule that can be traced"
    )


def _user_line(error: Exception) -> str:
    """The innermost frame of the user's own code in the traceback, as a clause."""
    here = torch.__file__.rsplit("/", 1)[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    frames = [f for f in frames if f.filename != __file__]
    if not frames:
        return ""
    last = frames[-1]
    return f"\n  stopped at {last.filename}:{last.lineno}, in {last.name}: {last.line}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _register_dataclasses(tree: Any) -> bool:
    """Let pytree look into the dataclasses of `tree`, as it does into dicts; True if any was new."""
    found = False
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            found = True
            _register_dataclasses([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


# -- reading the exported graph ----------------------------------------------------------------------------------


class _Reader:
    """Reads one exported program into values and nodes; calls into nested graphs are followed in place."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram) -> None:
        self.model, self.exported = model, exported
        self.nodes: list[Node] = []
        self.state: dict[Any, Value] = {}
        self.aliases: dict[str, str] = {}
        self.inputs: list[Value] = []

    def read(self) -> Program:
        graph = self.exported.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        env = {n: self._placeholder(n, spec) for n, spec in zip(placeholders, specs, strict=True)}
        outputs = self._body(self.exported.graph_module, env, prefix="")
        read = {id(v) for node in self.nodes for v in node.values()} | {id(v) for v in outputs}
        self._alias_ties()
        return Program(
            model_class=type(self.model).__name__,
            state=tuple(self.state.values()),
            aliases=self.aliases,
            inputs=tuple(self.inputs),
            outputs=tuple(v for v in outputs if isinstance(v, Value)),
            nodes=tuple(self.nodes),
            unused=tuple(v.target for v in self.state.values() if id(v) not in read),
            overlapping=self._overlapping(),
            dynamic_batch=any(_is_open(n.meta.get("val")) for n in placeholders),
            source=self.exported,
        )

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> Any:
        val = node.meta.get("val")
        kind = _KINDS.get(spec.kind.name)
        if not isinstance(val, torch.Tensor) or kind is None:
            return val if kind is None or not isinstance(val, torch.SymInt) else SymbolicInt(node.name, _hint(val))
        if kind == "input":
            value = _value(node.name, val, kind, str(node.target))
            self.inputs.append(value)
            return value
        tensor = self._tensor(spec.target)
        key = spec.target if tensor is None else id(tensor)
        if key in self.state:
            self.aliases[spec.target] = self.state[key].target
            return self.state[key]
        return self.state.setdefault(key, _value(node.name, val, kind, spec.target))

    def _tensor(self, target: str) -> torch.Tensor | None:
        try:
            found = functools.reduce(getattr, target.split("."), self.model)
        except AttributeError:
            return None
        return found if isinstance(found, torch.Tensor) else None

    def _alias_ties(self) -> None:
        """Names under which the model holds a tensor that the exporter listed once."""
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            value = self.state.get(id(tensor))
            if value is not None and value.target != name:
                self.aliases.setdefault(name, value.target)

    def _overlapping(self) -> tuple[tuple[str, ...], ...]:
        """Names of different tensors of the state that share storage."""
        by_storage: dict[int, list[str]] = {}
        for value in self.state.values():
            tensor = self._tensor(value.target) if value.target else None
            if tensor is not None and not tensor.is_meta and tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(value.target)
        return tuple(tuple(names) for names in by_storage.values() if len(names) > 1)

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
        if isinstance(val, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return SymbolicInt(node.name, _hint(val)) if isinstance(val, (int, torch.SymInt)) else val
        name = prefix + node.name
        if isinstance(val, torch.Tensor):
            outputs: tuple[Any, ...] = (_value(name, val, "node"),)
            result: Any = outputs[0]
        elif isinstance(val, (tuple, list)) and val:
            outputs = tuple(
                _value(f"{name}.{i}", v, "node") if isinstance(v, torch.Tensor) else v for i, v in enumerate(val)
            )
            result = outputs
        else:
            return None
        op, names, tensors, defaults = _signature(node.target)
        given = defaults | dict(zip(names, args, strict=False)) | dict(kwargs)
        arguments = {k: given[k] for k in names if k in given} if tensors else given
        self.nodes.append(
            Node(
                name=name,
                op=op,
                arguments=arguments,
                tensors=tensors or tuple(k for k, v in arguments.items() if isinstance(v, Value)),
                outputs=tuple(v for v in outputs if isinstance(v, Value)),
                module=_module_path(node),
                stack=node.meta.get("stack_trace") or "",
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


@functools.cache
def _signature(target: Any) -> tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Base name, argument names, single-tensor arguments and defaults of an op."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target)), tuple(f"arg{i}" for i in range(64)), (), {}
    names = tuple(a.name for a in schema.arguments)
    tensors = tuple(a.name for a in schema.arguments if _takes_tensor(a))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    namespace, _, base = schema.name.partition("::")
    return (base if namespace in ("aten", "prim") else f"{namespace}.{base}"), names, tensors, defaults


def _takes_tensor(argument: Any) -> bool:
    """Whether a schema argument is a tensor, or the number that stands in an operand's place (`add.Scalar`)."""
    kind = str(argument.type)
    return kind in ("Tensor", "Optional[Tensor]") or (kind == "number" and argument.name in ("self", "other"))


def _value(name: str, val: torch.Tensor, kind: Kind, target: str = "") -> Value:
    return Value(name, tuple(_hint(s) for s in val.shape), val.dtype, kind, target)


def _hint(size: Any) -> int:
    """The size at the example inputs; a size that depends on data counts as one position, which couples nothing."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 1 if hint is None else int(hint)
    return int(size)


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

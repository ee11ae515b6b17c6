"""Front end: the ATen calls of one run on the meta device, as they happen.

The run costs no arithmetic and no memory for weights. A dispatch mode at the pre-dispatch key sees the calls that
`torch.export` would put into its graph. Everything that goes into an op is replaced by a twin on the meta device, so
the user's own module runs, not a copy; only small tensors that its code makes from constants keep their values, since
code may branch on those. What cannot be recorded raises, whatever the reason: the caller has another front end.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import no_python_dispatcher
from torch.utils import _pytree as pytree

from graphprune.errors import TraceError
from graphprune.program import Node, Program, Value, is_library
from graphprune.trace.inputs import PLAIN, Inputs
from graphprune.trace.predispatch import PreDispatch
from graphprune.trace.refuse import Rewritten, written
from graphprune.trace.schema import call_node, value
from graphprune.trace.shapes import quick
from graphprune.trace.state import State
from graphprune.trace.tree import carried, register
from graphprune.trace.walk import modules

KNOWN_LIMIT = 1 << 16
"""Tensors made by the model's code keep their values up to this many elements."""
META = torch.device("meta")


def record(model: nn.Module, inputs: Inputs) -> Program:
    """The program of one run of `model`, which must be in eval mode.

    Raises:
        TraceError: a tensor appears that no recorded call made.
        Exception: whatever the model raises when its tensors have no values.
    """
    recorder = _Recorder(model)
    given = recorder.inputs(inputs)
    with recorder.watching():
        output = model(*given.args, **given.kwargs)
    register(output)
    leaves = pytree.tree_leaves(output)
    outputs = [recorder.value(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return recorder.state.program(recorder.given, outputs, recorder.nodes, carried=carried(model, output))


class _Recorder(PreDispatch):  # type: ignore[no-untyped-call]
    """Notes every op call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.state = State(model)
        self.nodes: list[Node] = []
        self.given: list[Value] = []
        self.values: dict[int, Value] = {}
        self.twins: dict[int, torch.Tensor] = {}
        self.places: dict[Any, Value] = {}  # by memory: factories and x.data hand out tensors that nobody saw made
        self.stale: set[int] = set()
        self.alive: list[torch.Tensor] = []  # ids stay unique while their tensors live
        self.path: list[str] = [""]
        self._state()

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _state(self) -> None:
        """Name every tensor that the model holds."""
        for name, tensor, kind in self.state.named:
            self._know(tensor, self.state.add(name, tensor, kind))
        self.storages = {_storage(tensor) for _, tensor, _ in self.state.named}
        self.modules: dict[int, str] = {}
        self.attributes: dict[int, str] = {}
        for path, module in modules(self.model):
            self.modules[id(module)] = path
            for name, held in vars(module).items():
                if isinstance(held, torch.Tensor):
                    self.attributes[id(held)] = f"{path}.{name}".removeprefix(".")

    def inputs(self, inputs: Inputs) -> Inputs:
        """The inputs as twins, each a value of its own."""
        names = _argument_names(self.model, inputs)

        def given(tensor: torch.Tensor) -> torch.Tensor:
            twin = _twin(tensor)
            name = next(names)
            self.given.append(self._know(twin, value(name, tensor, "input", name)))
            return twin

        return inputs.map(given)

    def _know(self, tensor: torch.Tensor, known: Value) -> Value:
        self.values[id(tensor)] = self.places[_place(tensor)] = known
        self.alive.append(tensor)
        return known

    def value(self, tensor: torch.Tensor) -> Value:
        """The value of a tensor; one that is met for the first time is a constant.

        Raises:
            TraceError: it comes from something that was not seen.
        """
        known = self.values.get(id(tensor))
        if known is not None:
            return known
        known = self.places.get(_place(tensor))
        if known is not None:
            return self._know(tensor, known)
        unseen = tensor.numel() and (tensor.is_meta or _storage(tensor) in self.storages)
        if unseen and id(tensor) not in self.attributes:  # an empty one, as caches start with, has nothing to miss
            raise TraceError("a tensor appears that no recorded call made")
        target = self.attributes.get(id(tensor), f"lifted_tensor_{len(self.alive)}")
        return self._know(tensor, self.state.add(target, tensor, "constant"))

    def _meta(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the meta device."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self.twins:
            self.twins[id(tensor)] = _twin(tensor)
            self.alive.append(tensor)
        return self.twins[id(tensor)]

    # -- calls -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note one call and run it, without arithmetic unless it is about constants of the code.

        Raises:
            TraceError: autocast is on.
        """
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TraceError("autocast does not act on the meta device")
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
            self._refuse_new_memory(args[0])
        noted, noted_kwargs = _map(self._noted, args), {k: _map(self._noted, a) for k, a in kwargs.items()}
        operands = _tensors((*args, *kwargs.values()))
        if constant := self._is_about_constants(func, operands, args):
            result = func(*args, **kwargs)
        else:
            given = _map(self._without_values, args)
            named = {k: _map(self._without_values, a) for k, a in kwargs.items()}
            if not operands and "device" in kwargs:
                named["device"] = META
            result = quick(func, given, named)
            if result is None:
                with no_python_dispatcher():  # its decompositions cost more than the kernels they replace
                    result = func(*given, **named)
        name = f"{func.__name__.partition('.')[0]}_{len(self.nodes)}"
        outputs = self._outputs(name, result)
        if func._schema.is_mutable and not constant:
            self._written(func, args, kwargs, outputs)
        if outputs or func._schema.is_mutable:
            module, line = self.path[-1], _user_line(sys._getframe(1))
            self.nodes.append(
                call_node(func, noted, noted_kwargs, name=name, outputs=outputs, module=module, line=line)
            )
        return result

    def _refuse_new_memory(self, tensor: torch.Tensor) -> None:
        """Stop before `tensor.data = ...`, which asks whether the two fit, gives a tensor of the model other memory.

        Raises:
            Rewritten: it is a parameter.
            TraceError: it is any other tensor.
        """
        known = self.values.get(id(tensor))
        if known is not None and known.kind == "parameter":
            raise Rewritten(written(type(self.model).__name__, known.target))
        raise TraceError("a tensor is given other memory, through its .data")

    def _noted(self, argument: Any) -> Any:
        return self.value(argument) if isinstance(argument, torch.Tensor) else argument

    def _without_values(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self._meta(argument)
        return META if isinstance(argument, torch.device) else argument

    def _is_about_constants(self, func: Any, operands: list[torch.Tensor], args: tuple[Any, ...]) -> bool:
        """Whether a call is small and depends on nothing but numbers in the code."""
        if not all(self._has_values(t) for t in operands):
            return False
        if func._schema.is_mutable and any(self.values[id(t)].kind == "constant" for t in operands):
            return False
        sizes = [a for a in args if isinstance(a, (list, tuple)) and all(isinstance(i, int) for i in a)]
        return sum(t.numel() for t in operands) + max((math.prod(s) for s in sizes), default=0) <= KNOWN_LIMIT

    def _has_values(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made of constants of the code, and was not written to without values."""
        if tensor.is_meta or id(tensor) in self.attributes or _storage(tensor) in self.stale:
            return False
        return self.values[id(tensor)].kind in ("node", "constant")

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Value, ...]) -> None:
        """What was written to holds the result from now on, and no values."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        results = outputs if len(outputs) == len(written) else (None,) * len(written)
        for name, result in zip(written, results, strict=True):
            held = given.get(name)
            for tensor in held if isinstance(held, (tuple, list)) else (held,):
                if isinstance(tensor, torch.Tensor):
                    self.stale.add(_storage(tensor))
                    if isinstance(held, torch.Tensor) and result is not None and result.shape == held.shape:
                        self._know(held, result)

    def _outputs(self, name: str, result: Any) -> tuple[Value, ...]:
        """New values for what a call returned; an in-place call gives its operand a new one."""
        if isinstance(result, torch.Tensor):
            return (self._know(result, value(name, result, "node")),)
        leaves = _tensors([result])
        return tuple(self._know(leaf, value(f"{name}.{i}", leaf, "node")) for i, leaf in enumerate(leaves))

    # -- where calls come from ---------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the block runs."""
        with ExitStack() as stack:
            hooks = nn.modules.module
            stack.callback(hooks.register_module_forward_pre_hook(self._enter).remove)
            stack.callback(hooks.register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(self.seeing())
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.path.append(self.modules.get(id(module), self.path[-1]))

    def _leave(self, *_: Any) -> None:
        self.path.pop()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: torch.Tensor) -> Any:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _map(change: Callable[[Any], Any], argument: Any) -> Any:
    """`change` applied to everything but plain values in the arguments of an op, which nest in tuples and lists."""
    if isinstance(argument, (tuple, list)):
        return type(argument)([a if type(a) in PLAIN else _map(change, a) for a in argument])
    return change(argument)


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            found += _tensors(argument)
    return found


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor on the meta device with the same shape, strides and type."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def _argument_names(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    """A name for every tensor of the inputs, from the parameters of `forward`."""
    try:
        bound: Mapping[str, Any] = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
        order = {id(leaf): name for name, leaf in _named_leaves(bound)}
    except TypeError:
        order = {}
    for i, tensor in enumerate(inputs.tensors()):
        yield order.get(id(tensor), f"input_{i}")


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in pytree.tree_flatten_with_path(dict(tree))[0]:
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        yield "_".join(k for k in keys if k not in ("args", "kwargs")) or keys[-1], leaf


def _user_line(frame: Any) -> tuple[str, int] | None:
    """The innermost frame outside torch."""
    while frame is not None and (path := frame.f_code.co_filename) != __file__:
        if not is_library(path):
            return path, frame.f_lineno
        frame = frame.f_back
    return None

"""Modules of a model traced on their own: with the arguments that the model calls them with, and sizes left open."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphpruneError, RewriteError
from graphprune.program import Program, Value
from graphprune.rewrite.state import lookup
from graphprune.trace import Inputs, run, trace, untouched
from graphprune.trace.export import OpenDims, export


@dataclass(frozen=True)
class Call:
    """How a model calls one of its modules.

    Attributes:
        arguments: in the order of the parameters of its forward, defaults filled in.
        names: per argument, the expression by which its forward reaches it.
        open_dims: which sizes follow the batch.
    """

    arguments: Inputs
    names: tuple[str, ...]
    open_dims: OpenDims


def calls(model: nn.Module, inputs: Inputs, paths: Sequence[str], *, dry: bool = False) -> dict[str, Call]:
    """How `model` calls the modules at `paths`, each for the first time, when it is run on `inputs`.

    Args:
        model, inputs: the model, and arguments of its forward.
        paths: the modules.
        dry: run on the meta device, where the model is known to run; tensors computed in the run are then given as
            zeros, for exports do not look at values.
    """
    wider = inputs.map(lambda t: torch.cat([t, t]) if t.dim() else t)
    once, twice = _arguments(model, inputs, paths, dry), {}
    try:
        twice = _arguments(model, wider, paths, dry)
    except Exception:  # the model fixes its batch size; what it traces to then does, too
        twice = once
    single = {t.shape[0] for t in inputs.tensors() if t.dim()} == {1}
    found = {}
    for path, (arguments, names) in once.items():
        other = twice[path][0] if path in twice else arguments
        found[path] = Call(other if single else arguments, names, _differing(arguments, other))
    return found


def _arguments(
    model: nn.Module, inputs: Inputs, paths: Sequence[str], dry: bool
) -> dict[str, tuple[Inputs, tuple[str, ...]]]:
    found: dict[str, tuple[Inputs, tuple[str, ...]]] = {}
    handles = []
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            if path not in found:
                found[path] = _bound(module, args, kwargs)

        handles.append(lookup(model, path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        trace(model, inputs, front_end="record") if dry else run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not dry:
        return found
    device = next((t.device for t in (*model.parameters(), *inputs.tensors())), torch.device("cpu"))
    real: dict[int, torch.Tensor] = {}  # one tensor given twice stays one

    def with_values(tensor: torch.Tensor) -> torch.Tensor:
        return real.setdefault(id(tensor), _zeros(tensor, device)) if tensor.is_meta else tensor

    return {path: (arguments.map(with_values), names) for path, (arguments, names) in found.items()}


def _zeros(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Zeros in the layout of another tensor, whose elements may share memory."""
    length = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    return torch.zeros(length, dtype=like.dtype, device=device).as_strided(like.shape, like.stride())


def _bound(module: nn.Module, args: Any, kwargs: Any) -> tuple[Inputs, tuple[str, ...]]:
    """The arguments of a call by position, and how the forward names them."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    names: list[str] = []
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}[{i}]" for i in range(len(bound.arguments[name]))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            names += [f"{name}[{key!r}]" for key in bound.arguments[name]]
        else:
            names.append(name)
    return Inputs(bound.args, bound.kwargs), tuple(names)


def _differing(a: Inputs, b: Inputs) -> OpenDims:
    """Which sizes differ; what holds tensors in other ways, such as a cache, is refused later."""
    pairs = zip(a.tensors(), b.tensors(), strict=False)
    return [tuple(d for d, (m, n) in enumerate(zip(x.shape, y.shape, strict=False)) if m != n) for x, y in pairs]


def named_leaves(call: Call, path: str) -> Iterator[tuple[str, Any]]:
    """How the forward reaches each leaf of its arguments, and what it was."""
    held = (*call.arguments.args, *call.arguments.kwargs.values())
    for name, argument in zip(call.names, held, strict=True):
        yield from _named(argument, name, path)


def _named(argument: Any, name: str, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of one argument.

    Raises:
        RewriteError: it holds more than a function of tensors can take, such as a cache that the module writes to.
    """
    if isinstance(argument, (tuple, list)):
        for i, held in enumerate(argument):
            yield from _named(held, f"{name}[{i}]", path)
    elif type(argument) in (dict, OrderedDict):
        for key, held in argument.items():
            yield from _named(held, f"{name}[{key!r}]", path)
    elif isinstance(argument, (torch.Tensor, type(None), bool, int, float, str)):
        yield name, argument
    else:
        raise RewriteError(f"{path} is handed a {type(argument).__name__} as {name}")


class Parts:
    """Exports modules of a model on their own; modules that are alike, such as the blocks of a transformer, once.

    Args:
        model: the original.
        whole: its program, by whose nodes it is told which modules are alike.

    Attributes:
        closed: classes whose modules hold for no more open sizes than the batch, as far as was seen.
    """

    def __init__(self, model: nn.Module, whole: Program) -> None:
        self.model, self.whole = model, whole
        self.closed: set[type] = set()
        self._made: dict[Any, Program | RewriteError] = {}

    def program(self, path: str, call: Call) -> Program:
        """The program of the module at `path` on its own.

        Raises:
            RewriteError: it cannot be traced.
        """
        module = lookup(self.model, path)
        alike = type(module), _told(self.whole, path), _told_call(call, path), tuple(call.open_dims)
        if alike not in self._made:
            try:
                with untouched(module), torch.no_grad():
                    self._made[alike] = export(module, call.arguments, call.open_dims)
            except GraphpruneError as error:
                self._made[alike] = RewriteError(f"{path} cannot be traced on its own: {error}")
        made = self._made[alike]
        if isinstance(made, RewriteError):
            raise made
        if any(v.kind == "constant" and not isinstance(lookup(module, v.target), torch.Tensor) for v in made.state):
            del self._made[alike]  # the code of another module may make other numbers
        return made


def _told(whole: Program, path: str) -> Any:
    """What the program says about the nodes of a module, but for the names."""
    numbers: dict[Value, int] = {}

    def told(argument: Any) -> Any:
        if isinstance(argument, (tuple, list)):
            return tuple(told(a) for a in argument)
        if not isinstance(argument, Value):
            return repr(argument)
        target = argument.target.removeprefix(path + ".")
        return numbers.setdefault(argument, len(numbers)), argument.shape, argument.dtype, argument.kind, target

    inside = [n for n in whole.nodes if n.module == path or n.module.startswith(path + ".")]
    return tuple((n.op, n.module.removeprefix(path), told([*n.arguments.values()]), told(n.outputs)) for n in inside)


def _told_call(call: Call, path: str) -> Any:
    """The arguments of a call, but for the values of tensors."""
    leaves = named_leaves(call, path)
    return tuple((n, (x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x)) for n, x in leaves)

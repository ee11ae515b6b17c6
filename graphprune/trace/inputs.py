"""Arguments of a forward, and running a model without leaving a trace on it."""

from __future__ import annotations

import functools
import operator
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.trace.tree import register
from graphprune.trace.walk import modules, parameters


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

    def call(self, function: Callable[..., Any]) -> Any:
        """What `function` returns for these arguments."""
        return function(*self.args, **self.kwargs)

    def map(self, change: Any) -> Inputs:
        """The same arguments with `change` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)


@contextmanager
def untouched(model: nn.Module, *, computing: bool = True) -> Iterator[None]:
    """Put `model` in eval mode for the block; afterwards it is as before, and so are the random generators.

    As before means flags, attributes, what its containers and the objects it keeps hold, and the values of its buffers
    and of all tensors that are no parameters. Parameters hold the same memory again.

    Args:
        model: any module.
        computing: whether ops run in the block; without, no tensor can get other values, and none is kept.
    """
    held = [module for _, module in modules(model)]
    scripted = [(m, m.training) for m in held if isinstance(m, torch.jit.ScriptModule)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    before = _Before(held, values=computing)
    try:
        with same_random_numbers(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")  # of hooks that are not the user's
            torch.backends.mha.set_fastpath_enabled(False)
            forget(model)
            for module in held:
                if isinstance(module, torch.jit.ScriptModule):
                    module.training = False
                else:  # a class may refuse to have attributes set
                    vars(module)["training"] = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in scripted:
            module.training = training
        before.restore()


def forget(model: nn.Module) -> None:
    """Let modules drop what they keep for eval mode, such as a table of biases computed from a weight.

    They do so on entering training mode. Only those that keep tensors in a dict of their own are asked, each alone:
    others may do more there, as layers that merge weights do.
    """
    for _, module in modules(model):
        if type(module).train is not nn.Module.train and any(map(_keeps_tensors, vars(module).values())):
            children, vars(module)["_modules"] = module._modules, {}
            try:
                module.train()
            finally:
                vars(module)["_modules"] = children


def _keeps_tensors(held: Any) -> bool:
    return type(held) is dict and any(type(value) is torch.Tensor for value in held.values())


@contextmanager
def same_random_numbers(model: nn.Module | None = None) -> Iterator[None]:
    """Afterwards the random generators of Python, NumPy and torch are as before, on the devices of `model` too."""
    generators = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model) if model is not None else []):
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])


PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types of values that nobody can change."""
_CONTAINERS = frozenset({dict, OrderedDict, list, set, deque})
_LEFT_ALONE = frozenset({*sys.stdlib_module_names, "torch", "numpy"})


def is_plain(held: Any) -> bool:
    """Whether it is a value that nobody can change: a number, a text, or a tuple of those."""
    return type(held) in PLAIN or (type(held) is tuple and PLAIN.issuperset(map(type, held)))


def _keeps_attributes(held: Any) -> bool:
    if isinstance(held, nn.Module):
        return True
    return type(held).__module__.partition(".")[0] not in _LEFT_ALONE and hasattr(held, "__dict__")


class _Before:
    """What a forward may write to, as it is now: the containers, tensors and generators that a model reaches.

    The attributes of modules and of the objects they keep are dicts like any other. Objects of the standard library
    (locks, files, loggers) and of torch and NumPy are left alone.

    Args:
        held: the modules to start from.
        values: whether tensors that are no parameters may get other values.
    """

    def __init__(self, held: Iterable[nn.Module], *, values: bool) -> None:
        self.values = values
        self.empty: list[Any] = []
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.lists: list[tuple[Any, list[Any]]] = []
        self.others: list[Callable[[], object]] = []
        rest: list[Any] = [module for module in held if not isinstance(module, torch.jit.ScriptModule)]
        seen: dict[int, Any] = {}  # kept alive, so that ids stay unique
        while rest:
            found = rest.pop()
            if id(found) in seen or isinstance(found, (type, torch.jit.ScriptModule)):
                continue
            seen[id(found)] = found
            for inside in self._note(found):
                kind = type(inside)
                if kind in PLAIN:
                    continue
                if kind in _CONTAINERS and not inside:  # most of a module is empty dicts of hooks
                    self.empty.append(inside)
                elif kind is not tuple or not is_plain(inside):
                    rest.append(inside)

    def _note(self, held: Any) -> Iterable[Any]:
        """Note one object; returns what it holds in turn."""
        if isinstance(held, dict):
            saved = dict(dict.items(held))
            self.dicts.append((held, saved))
            return saved.values()
        if isinstance(held, (list, tuple, set, deque)):
            items = list(held)
            if not isinstance(held, tuple):
                self.lists.append((held, items))
            return items
        if isinstance(held, torch.Tensor):
            self.others.append(_undo_tensor(held, values=self.values))
        elif isinstance(held, torch.Generator):
            self.others.append(functools.partial(held.set_state, held.get_state()))
        elif _keeps_attributes(held):
            return self._note(vars(held))
        return []

    def restore(self) -> None:
        """Bring back what changed; what did not is not written to."""
        for held in self.empty:
            if len(held):
                held.clear()
        for held, saved in self.dicts:
            if held.keys() != saved.keys() or not all(map(operator.is_, dict.values(held), saved.values())):
                dict.clear(held)
                dict.update(held, saved)
        for held, items in self.lists:
            if len(held) != len(items) or not all(map(operator.is_, held, items)):
                held.clear()
                held.update(items) if isinstance(held, set) else held.extend(items)
        for step in self.others:
            step()


def _undo_tensor(tensor: torch.Tensor, *, values: bool) -> Callable[[], None]:
    """A forward may give a tensor other memory (`x.data = ...`); only what is no parameter may have other values."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return lambda: None
    data = tensor.detach()
    held = data.clone() if values and not isinstance(tensor, nn.Parameter) else None

    def back() -> None:
        moved = tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape
        if not moved and (held is None or torch.equal(tensor, held)):
            return
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if moved:
                tensor.data = data
            if held is not None:
                tensor.copy_(held)

    return back


def run(model: nn.Module, inputs: Inputs, state: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The tensors `model` returns in eval mode, flattened in order; model and inputs are left untouched.

    Args:
        model: any module.
        inputs: arguments of its forward.
        state: parameters and buffers to use instead of its own, by fully qualified name.
    """
    inputs = inputs.map(torch.clone)
    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return output_tensors(torch.func.functional_call(model, dict(state or {}), inputs.args, dict(inputs.kwargs)))


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in a model's output, flattened in order; dataclasses and objects with tensors are looked into."""
    register(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _cuda_devices(model: nn.Module) -> list[int]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return sorted({p.device.index or 0 for _, p in parameters(model) if p.device.type == "cuda"})

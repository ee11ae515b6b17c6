"""Arguments of a forward, and running a model without leaving a trace on it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.trace.tree import register


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
    """Every tensor in a model's output, flattened in order; dataclasses and objects with tensors are looked into."""
    register(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

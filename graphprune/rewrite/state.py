"""Sliced weights: the one place that turns a plan into smaller tensors."""

from __future__ import annotations

import copy
import copyreg
import functools
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import RewriteError
from graphprune.plan import Plan, sliced
from graphprune.trace import PLAIN, forget, held, is_plain, modules, same_random_numbers


def smaller(tensor: torch.Tensor, name: str, plan: Plan) -> torch.Tensor:
    """A new tensor like `tensor`, without the channels the plan removes; still a parameter if it was one."""
    new = sliced(tensor, plan.kept[name]) if name in plan.kept else tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def replacements(model: nn.Module, plan: Plan) -> dict[int, torch.Tensor]:
    """For each tensor of `model`, by id, the tensor that takes its place; tied tensors stay tied."""
    new: dict[int, torch.Tensor] = {}
    for name, tensor in (*held(model), *_attributes(model, plan)):
        if id(tensor) not in new:
            new[id(tensor)] = smaller(tensor, name, plan)
    return new


def results(model: nn.Module) -> dict[int, torch.Tensor]:
    """Copies of what `model` keeps of earlier forwards, by id, without the graph that would forbid copying it."""
    kept: list[Any] = []
    for _, module in modules(model):
        for name, value in vars(module).items():
            if type(value) in PLAIN:
                continue
            if isinstance(value, torch.Tensor):
                kept.append(value)
            elif isinstance(value, (dict, list, tuple)) and value and name not in ("_parameters", "_modules"):
                items = value.values() if isinstance(value, dict) else value
                kept += [item for item in items if not is_plain(item)]
    tensors = (leaf for leaf in pytree.tree_leaves(kept) if isinstance(leaf, torch.Tensor))
    return {id(t): t.detach().clone() for t in tensors if not t.is_leaf}


def deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that is apart from `model`; making it draws no random numbers.

    Raises:
        RewriteError: the model cannot be copied, or gives parts of itself in place of a copy.
    """
    name = type(model).__name__
    try:
        with same_random_numbers(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch's own, of graphs
            made: nn.Module = _copy(model, memo)
    except Exception as error:
        raise RewriteError(f"{name} cannot be copied: {type(error).__name__}: {error}") from error
    modes = [(part, part.training) for _, part in modules(made) if not isinstance(part, torch.jit.ScriptModule)]
    forget(made)
    for part, training in modes:
        vars(part)["training"] = training  # a class may refuse to have attributes set
    own = {id(part) for _, part in (*modules(model), *held(model))}
    shared = [path for path, part in (*modules(made), *held(made)) if id(part) in own]
    if shared:
        raise RewriteError(f"{name} cannot be copied: __deepcopy__ gives {shared[0] or 'the model'} itself, not a copy")
    return made


def _copy(held: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` gives, sooner: modules are full of numbers, names and empty containers."""
    if id(held) in memo:
        return memo[id(held)]
    if isinstance(held, nn.Module):
        return _copy_module(held, memo)
    kind = type(held)
    if kind is not dict and (kind not in _EMPTY or held):
        return copy.deepcopy(held, memo)
    made = memo[id(held)] = kind()
    for key, value in held.items() if held else ():
        made[key if is_plain(key) else _copy(key, memo)] = value if is_plain(value) else _copy(value, memo)
    return made


_EMPTY = frozenset({OrderedDict, dict, set, list})


def _copy_module(module: Any, memo: dict[int, Any]) -> Any:
    """A copy by its attributes, unless the module or its class has a way of its own to be copied or pickled."""
    kind: Any = type(module)
    if _pickles_its_own_way(kind) or getattr(module, "__deepcopy__", None) is not None:
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = object.__new__(kind)
    state = {}
    for name, value in module.__getstate__().items():
        held = type(value)
        if held in PLAIN:
            state[name] = value
        elif held in _EMPTY and not value and id(value) not in memo:
            state[name] = memo[id(value)] = held()
        else:
            state[name] = value if is_plain(value) else _copy(value, memo)
    made.__setstate__(state)
    return made


@functools.cache
def _pickles_its_own_way(kind: type) -> bool:
    """Whether a class of modules says itself how it is taken apart and made."""
    own = {name for base in kind.__mro__ if base not in (object, nn.Module) for name in vars(base)}
    return kind in copyreg.dispatch_table or not own.isdisjoint(_PICKLING)


_PICKLING = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")


def _attributes(model: nn.Module, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that the plan shrinks and the model keeps as plain attributes."""
    for name in plan.kept:
        found = lookup(model, name)
        if isinstance(found, torch.Tensor):
            yield name, found


def lookup(model: nn.Module, path: str) -> Any:
    """What `model` holds at a dotted path; None if there is nothing."""
    try:
        return functools.reduce(getattr, path.split("."), model) if path else model
    except AttributeError:
        return None

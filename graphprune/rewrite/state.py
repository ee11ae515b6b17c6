"""Sliced weights: the one place that turns a plan into smaller tensors."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import RewriteError
from graphprune.plan import Plan, sliced
from graphprune.trace import forget, held, modules, same_random_numbers


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
            if isinstance(value, torch.Tensor):
                kept.append(value)
            elif isinstance(value, (dict, list, tuple)) and value and name not in ("_parameters", "_modules"):
                kept += pytree.tree_leaves(value)
    return {id(t): t.detach().clone() for t in kept if isinstance(t, torch.Tensor) and not t.is_leaf}


def deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that is apart from `model`; making it draws no random numbers.

    Raises:
        RewriteError: the model cannot be copied, or gives parts of itself in place of a copy.
    """
    name = type(model).__name__
    for _, module in modules(model):  # most of a module is empty dicts of hooks, which are slow to copy one by one
        memo.update({id(h): OrderedDict() for h in vars(module).values() if type(h) is OrderedDict and not h})
    try:
        with same_random_numbers(model):
            made: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise RewriteError(f"{name} cannot be copied: {type(error).__name__}: {error}") from error
    modes = [(part, part.training) for _, part in modules(made) if not isinstance(part, torch.jit.ScriptModule)]
    forget(made)
    for part, training in modes:
        vars(part)["training"] = training  # a class may refuse to have attributes set
    own = {id(part) for _, part in modules(model)} | {id(tensor) for _, tensor in held(model)}
    shared = [path for path, part in (*modules(made), *held(made)) if id(part) in own]
    if shared:
        raise RewriteError(f"{name} cannot be copied: __deepcopy__ gives {shared[0] or 'the model'} itself, not a copy")
    return made


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

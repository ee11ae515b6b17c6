"""What a forward takes and returns, as trees: which objects are looked into, and which tensors are the model's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.trace.walk import modules


def register(tree: Any) -> bool:
    """Let pytree look into the dataclasses and the objects holding tensors in `tree`; True if any class was new."""
    found = False
    for leaf in pytree.tree_leaves(tree):
        if not pytree.tree_is_leaf(leaf):  # another one of its class came before it
            continue
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            inside: Iterable[Any] = [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
        elif _holds_tensors(leaf, set()):
            _register_object(type(leaf))
            inside = vars(leaf).values()
        else:
            continue
        found = True
        register(list(inside))
    return found


def _holds_tensors(leaf: Any, seen: set[int]) -> bool:
    """Whether an object that pytree does not know, such as a cache, holds tensors, directly or in what it holds."""
    if not hasattr(leaf, "__dict__") or isinstance(leaf, (torch.Tensor, nn.Module, type)) or id(leaf) in seen:
        return False
    seen.add(id(leaf))
    held = pytree.tree_leaves(list(vars(leaf).values()))
    return any(isinstance(h, torch.Tensor) or _holds_tensors(h, seen) for h in held)


def _register_object(kind: type) -> None:
    """Attributes that hold tensors become children, the others go along as they are."""

    def flatten(value: Any) -> tuple[list[Any], Any]:
        held = dict(vars(value))
        children = {n: h for n, h in held.items() if _has_children(h)}
        others = {n: h for n, h in held.items() if n not in children}
        return list(children.values()), (list(children), others)

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        names, others = context
        made: Any = object.__new__(kind)
        vars(made).update(others)
        vars(made).update(zip(names, children, strict=True))
        return made

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = flatten(value)
        return [(pytree.GetAttrKey(n), c) for n, c in zip(context[0], children, strict=True)], context

    pytree.register_pytree_node(kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


def _has_children(held: Any) -> bool:
    """Whether an attribute holds tensors, or what stands for them while a graph is being made."""
    register(held)
    return any(isinstance(leaf, (torch.Tensor, fx.Proxy, fx.Node)) for leaf in pytree.tree_leaves(held))


def carried(model: nn.Module, output: Any) -> list[bool]:
    """Per leaf of a model's output, whether it belongs to an object that the model takes back as an argument.

    Such an object (the key/value cache of a language model) is a field of the output that is called like an argument of
    the forward of the model or of a part of it, and neither a tensor nor a plain container: what it holds may shrink
    along with the model.
    """
    marks: list[bool] = []
    for name, held in _fields(output):
        marks += [_is_object(held) and _takes(model, name)] * len(pytree.tree_leaves(held))
    count = len(pytree.tree_leaves(output))
    return marks if len(marks) == count else [False] * count


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model or a part of it has an argument of that name."""
    forwards = {type(module): module.forward for _, module in modules(model)}
    return any(name in inspect.signature(forward).parameters for forward in forwards.values())


def _fields(output: Any) -> list[tuple[str, Any]]:
    """What an output holds by name, in flattening order; nothing where it has no names."""
    if isinstance(output, Mapping):
        return list(output.items())
    if dataclasses.is_dataclass(output):
        held = [(f.name, getattr(output, f.name)) for f in dataclasses.fields(output)]
        return [(name, value) for name, value in held if value is not None]
    return []


def _is_object(held: Any) -> bool:
    plain = (torch.Tensor, tuple, list, deque, Mapping, str, bytes)
    return hasattr(held, "__dict__") and not isinstance(held, plain) and not dataclasses.is_dataclass(held)

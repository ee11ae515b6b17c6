"""What goes along with a model when it is pruned: its optimizer, and averaged copies of its weights.

Parameters of the optimizer are known by what they are: a result remembers the original's, weakly, so that it keeps
nothing alive and two models with the same names are not mixed up. From there on names lead: every emitter keeps them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.plan import sliced
from graphprune.pruning import Result
from graphprune.rewrite.state import deepcopied, results, smaller
from graphprune.trace import held, modules, parameters

T = TypeVar("T", Optimizer, nn.Module)
Unfit: TypeAlias = Literal["error", "restart"]


def migrate(given: T, result: Result, *, unfit: Unfit = "error") -> T:
    """The optimizer, or the averaged copy, of the original model, for the smaller one; `given` is left as it was.

    An optimizer keeps its class, the order and options of its groups, its hooks and its state, of which everything
    that has one number per element of a parameter (momentum, moments of Adam) is sliced like the parameter. A
    parameter that is not in the smaller model any more leaves its group; those that never were the model's, such as a
    loss has, go on in both. Gradients are not carried over.

    An averaged copy is an `AveragedModel`, or any other module that is or holds a copy of the original, such as one
    that `copy.deepcopy` made. It gets the structure of `result.model` and its own weights, sliced.

    A learning rate scheduler goes on with `scheduler.optimizer = gp.migrate(optimizer, result)` (and the same for each
    scheduler that it holds); a `GradScaler` as it is. Wrappers such as `DistributedDataParallel` are made anew.

    Args:
        given: an optimizer over parameters of the model that was pruned, or an averaged copy of that model.
        result: what `prune` returned.
        unfit: state that is not one number per element, as Adafactor's factors and the preconditioners of Shampoo,
            is an "error"; with "restart" parameters with such state start without any.
    Raises:
        InputError: `given` is neither of that model, or it has state that cannot be sliced.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> net(torch.randn(2, 3)).sum().backward()
        >>> adam.step()
        >>> result = gp.prune(net, torch.randn(2, 3), target=gp.Target(channels=0.5))
        >>> adam = gp.migrate(adam, result)
        >>> adam.state[result.model[0].weight]["exp_avg"].shape
        torch.Size([4, 3])
    """
    if unfit not in ("error", "restart"):
        raise InputError(f"unfit={unfit!r}; it is 'error' or 'restart'")
    if isinstance(given, Optimizer):
        optimizer: T = _Moved(given, result, unfit).optimizer
        return optimizer
    if isinstance(given, nn.Module):
        return _averaged(given, result)
    hint = (
        "a scheduler goes on with scheduler.optimizer = gp.migrate(optimizer, result)"
        if isinstance(given, torch.optim.lr_scheduler.LRScheduler)
        else "pass an optimizer, or an averaged copy of the model"
    )
    raise InputError(f"{type(given).__name__} cannot be migrated; {hint}")


# -- optimizers ---------------------------------------------------------------------------------------------------


class _Moved:
    """A copy of an optimizer, made as `copy.deepcopy` does, with other tensors in the place of some.

    Attributes:
        optimizer: the copy.
    """

    def __init__(self, old: Optimizer, result: Result, unfit: Unfit) -> None:
        self.result, self.unfit = result, unfit
        self.memo: dict[int, Any] = {}
        self.gone: set[int] = set()
        given = {id(p): p for group in old.param_groups for p in group["params"]}
        if not any(p in result.names for p in given.values()):
            raise InputError(
                f"{type(old).__name__} has no parameter of the model that was pruned; pass the optimizer over that "
                "model's parameters, and migrate it once"
            )
        after = dict(parameters(result.model))
        for parameter in given.values():
            names = result.names.get(parameter, ())
            found = next((after[name] for name in names if name in after), None)
            self.memo[id(parameter)] = parameter if found is None else found
            if names and found is None:
                self.gone.add(id(parameter))
        self.shrinks = any(self._kept(parameter) for parameter in given.values())
        self.optimizer: Any = self._copied(old)

    def _kept(self, parameter: torch.Tensor) -> Mapping[int, torch.Tensor]:
        return next((self.result.plan.kept.get(n, {}) for n in self.result.names.get(parameter, ())), {})

    def _copied(self, old: Optimizer) -> Any:
        new = self.memo[id(old)] = object.__new__(type(old))
        restarted = self._slice_state(old)
        attributes = {n: v for n, v in vars(old).items() if not hasattr(v, "_wrapped_by_lr_sched")}  # steps the old one
        for name, value in attributes.items():
            if name.endswith("_hooks"):
                self.memo.update({id(hook): hook for hook in value.values()})
            elif isinstance(value, Optimizer) and id(value) not in self.memo:
                self._copied(value)
        vars(new).update(copy.deepcopy(attributes, self.memo))
        for parameter in restarted:
            new.state.pop(self.memo[id(parameter)])
        for group in new.param_groups:
            stays = [id(p) not in self.gone for p in group["params"]]
            for listed in (group[key] for key in ("params", "param_names") if key in group):
                listed[:] = itertools.compress(list(listed), stays)
        return new

    def _slice_state(self, old: Optimizer) -> list[torch.Tensor]:
        """Note what takes the place of the tensors of the state; returns the parameters that are left without one.

        Raises:
            InputError: there is state that cannot be sliced, and that is an error.
        """
        misfits = self._misfits(old) if self.shrinks else {}
        if misfits and self.unfit == "error":
            key, (parameter, leaf) = next(iter(misfits.items()))
            name = (*self.result.names.get(parameter, ()), "a parameter")[0]
            raise InputError(
                f"{type(old).__name__} keeps {key!r} of shape {list(leaf.shape)} for {name} of shape "
                f"{list(parameter.shape)}: that is not one number per element, so it cannot be sliced; with "
                "unfit='restart' parameters with such state start without any"
            )
        restarted = []
        for parameter, state in _states(old):
            if id(parameter) in self.gone or misfits.keys() & state.keys():
                restarted.append(parameter)
            kept = self._kept(parameter)
            for leaf in pytree.tree_leaves(list(state.values())):
                if isinstance(leaf, torch.Tensor):
                    fits = leaf.shape == parameter.shape
                    self.memo[id(leaf)] = sliced(leaf, kept) if fits else leaf.detach().clone()
        return restarted

    def _misfits(self, old: Optimizer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Per key of the state that is not one number per element of every parameter, a parameter and what it has.

        The shape of one parameter does not tell: a preconditioner of a square weight is as large as the weight.
        """
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for parameter, state in _states(old):
            for key, value in state.items():
                for leaf in pytree.tree_leaves(value):
                    if isinstance(leaf, torch.Tensor) and leaf.numel() > 1 and leaf.shape != parameter.shape:
                        found.setdefault(key, (parameter, leaf))
        return found


def _states(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, torch.Tensor) and isinstance(state, dict):
            yield parameter, state


# -- averaged copies ----------------------------------------------------------------------------------------------


def _averaged(given: nn.Module, result: Result) -> nn.Module:
    """A module like `given` in which a copy of the smaller model takes the place of that of the original.

    Raises:
        InputError: it holds no copy of the original.
    """
    plan = result.plan
    after = [(name, tensor) for name, tensor in held(result.model) if name in plan.shapes]
    for _, part in modules(given):
        own = dict(held(part))
        if all(name in own and tuple(own[name].shape) == plan.shapes[name] for name, _ in after):
            break
    else:
        raise InputError(
            f"{type(given).__name__} neither is nor holds a copy of the model that was pruned: no part of it has the "
            "parameters and buffers of that model, in their names and shapes before pruning"
        )
    memo: dict[int, Any] = results(result.model)
    for name, tensor in after:
        if id(tensor) not in memo:
            memo[id(tensor)] = smaller(own[name], name, plan)
    small = deepcopied(result.model, memo)
    modes = {path: module.training for path, module in modules(part)}
    for path, module in modules(small):
        vars(module)["training"] = modes.get(path, part.training)
    return small if part is given else deepcopied(given, {id(part): small})

"""Magnitude: the norm of the weights of a channel (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.axes import Axis
from graphprune.coupling import Coupling
from graphprune.errors import InputError


@dataclass(frozen=True)
class Magnitude:
    """Score channel i by the p-norm of all parameter elements removed with it, over all members of its group.

    Args:
        p: order of the norm, positive and finite.
    Raises:
        InputError: `p` is not positive.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> Magnitude(p=1)(net, gp.couple(gp.trace(net, torch.zeros(1, 3))))["0"].shape
        torch.Size([8])
    """

    p: float = 2

    def __post_init__(self) -> None:
        if not 0 < self.p < math.inf:
            raise InputError(f"Magnitude(p={self.p}): the order of a norm is positive and finite, such as 1 or 2")

    def __call__(self, model: nn.Module, coupling: Coupling) -> dict[str, torch.Tensor]:
        """Score every channel of every group, in float64.

        Raises:
            InputError: a weight is on the meta device.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        axes, sizes = coupling.axes, {name: atom.size for name, atom in coupling.atoms.items()}
        starts = dict(zip(sizes, itertools.accumulate((0, *sizes.values())), strict=False))
        first = {atom: starts[name] for name, atom in coupling.atoms.items()}
        memo: dict[Axis, Any] = {}
        total = torch.zeros(sum(sizes.values()), dtype=torch.float64)
        for axis, powers in _by_axis(coupling, parameters, self.p).items():
            at, which = (torch.from_numpy(a) for a in axes.places(axis, first, memo))
            if len(at):
                total.index_add_(0, which, powers[at])
        scores = torch.split(total.pow(1 / self.p), list(sizes.values()))
        return dict(zip(sizes, scores, strict=True))


def _by_axis(coupling: Coupling, parameters: Mapping[str, torch.Tensor], p: float) -> dict[Axis, torch.Tensor]:
    """Per axis, the sum of the p-th powers of the weights at each of its positions, over all slots that have it."""
    grouped = set(coupling.atoms.values())
    sums: dict[Axis, torch.Tensor] = {}
    for value in coupling.program.parameters:
        found = [coupling.axes.find(axis) for axis in coupling.dims[value]]
        dims = [d for d, axis in enumerate(found) if not grouped.isdisjoint(coupling.axes.leaves(axis))]
        for d, powers in zip(dims, _powers(parameters[value.target], value.target, dims, p), strict=True):
            sums[found[d]] = sums[found[d]] + powers if found[d] in sums else powers
    return sums


def _powers(parameter: torch.Tensor, name: str, dims: Sequence[int], p: float) -> list[torch.Tensor]:
    """The sum of the p-th powers of a weight at each position of each of `dims`, in float64.

    Raises:
        InputError: the weight is on the meta device.
    """
    if not dims:
        return []
    if parameter.is_meta:
        raise InputError(f"{name} is on the meta device and has no values to rank; load weights first")
    others, weight = [d for d in range(parameter.dim()) if d not in dims], parameter.detach()
    if any(parameter.shape[d] > 1 for d in others):  # one pass over the weight, without a copy of it
        wide = torch.complex128 if parameter.is_complex() else torch.float64
        held = _power(torch.linalg.vector_norm(weight, p, dim=others, dtype=wide), p)
    else:
        weight = weight.reshape([parameter.shape[d] for d in dims])
        held = _power((weight.abs() if parameter.is_complex() else weight).double(), p)
    return [
        held.sum([k for k in range(len(dims)) if k != d]).cpu() if len(dims) > 1 else held.cpu()
        for d in range(len(dims))
    ]


def _power(x: torch.Tensor, p: float) -> torch.Tensor:
    return x.square() if p == 2 else x.abs().pow(p)

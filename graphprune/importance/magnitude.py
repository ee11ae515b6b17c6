"""Magnitude: the norm of the weights of a channel (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

import itertools
import math
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
        for axis, slots in _by_axis(coupling).items():
            at, which = (torch.from_numpy(a) for a in axes.places(axis, first, memo))
            if len(at):
                powers = torch.stack([_power(parameters[name], name, d, self.p) for name, d in slots])
                total.index_add_(0, which, powers.sum(0)[at])
        scores = torch.split(total.pow(1 / self.p), list(sizes.values()))
        return dict(zip(sizes, scores, strict=True))


def _by_axis(coupling: Coupling) -> dict[Axis, list[tuple[str, int]]]:
    """The (parameter, dim) slots that have one and the same axis."""
    slots: dict[Axis, list[tuple[str, int]]] = {}
    for value in coupling.program.parameters:
        for d, axis in enumerate(coupling.dims[value]):
            slots.setdefault(coupling.axes.find(axis), []).append((value.target, d))
    return slots


def _power(parameter: torch.Tensor, name: str, dim: int, p: float) -> torch.Tensor:
    """The sum of the p-th powers of a weight at each position of a dim.

    Raises:
        InputError: the weight is on the meta device.
    """
    if parameter.is_meta:
        raise InputError(f"{name} is on the meta device and has no values to rank; load weights first")
    others = [k for k in range(parameter.dim()) if k != dim]
    if not others:
        return parameter.detach().abs().double().pow(p).cpu()
    wide = torch.complex128 if parameter.is_complex() else torch.float64
    norm: torch.Tensor = torch.linalg.vector_norm(parameter.detach(), p, dim=others, dtype=wide)
    return norm.pow(p).cpu()

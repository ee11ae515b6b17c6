"""What an importance criterion is, and in which order it lets channels go."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError


class Order(Protocol):
    """Which channels of a group stay at each width: what a criterion gives that does not score channels one by one."""

    @property
    def size(self) -> int:
        """Number of channels of the group."""

    def keep(self, width: int) -> list[int]:
        """The positions that stay when `width` of `size` channels stay, ascending."""

    @property
    def lost(self) -> torch.Tensor:
        """Shape (size + 1,), float64: at w, how much importance is lost when w channels stay; 0 at `size`."""


Scores: TypeAlias = Mapping[str, torch.Tensor | Order]
"""Per group name, either one score per channel, shape (size,), higher = keep; or an order."""


class Importance(Protocol):
    """Anything that scores the channels of every group."""

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score the channels of each group of `coupling`, reading the weights from `model`."""


@dataclass(frozen=True, eq=False)
class Removal:
    """A nested order: what stays at a width is part of what stays at any larger one.

    Args:
        order: positions in the order in which they go, the first one first; shape (size,), integers.
        costs: the importance that each removal adds to what is lost, in the order of removal; shape (size,).
    Raises:
        InputError: `order` is not a permutation, or `costs` are not as many real numbers.

    Example:
        >>> removal = Removal(torch.tensor([2, 0, 1]), torch.tensor([0.0, 1.5, 4.0]))
        >>> removal.keep(2), removal.lost.tolist()
        ([0, 1], [5.5, 1.5, 0.0, 0.0])
    """

    order: torch.Tensor
    costs: torch.Tensor

    def __post_init__(self) -> None:
        n = self.order.numel()
        if self.order.is_floating_point() or self.order.sort().values.tolist() != list(range(n)):
            raise InputError(f"Removal: the order is no permutation of 0..{n - 1}, each position once, as integers")
        if self.costs.shape != self.order.shape or self.costs.is_complex() or self.costs.isnan().any():
            found = f"{tuple(self.costs.shape)}, {self.costs.dtype}"
            raise InputError(f"Removal: the costs are {found}; an order of {n} needs {n} real numbers without NaN")
        object.__setattr__(self, "order", self.order.detach().cpu().long())
        object.__setattr__(self, "costs", self.costs.detach().cpu().double())

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.order)

    def keep(self, width: int) -> list[int]:
        """The positions that stay when `width` of them do, ascending.

        Raises:
            InputError: there are fewer than that.
        """
        if not 0 <= width <= self.size:
            raise InputError(f"Removal: {width} of {self.size} channels cannot stay")
        return sorted(self.order[self.size - width :].tolist())

    @functools.cached_property
    def lost(self) -> torch.Tensor:
        """The running sum of the costs, from `size` down to no channel left; shape (size + 1,)."""
        return torch.cat([self.costs.new_zeros(1), self.costs.cumsum(0)]).flip(0)


def ordered(scores: torch.Tensor | Order) -> Order:
    """What scores mean as an order: the lowest goes first, of equal ones the last. An order is what it is.

    Raises:
        InputError: the scores hold NaN, are complex, or have more than one dim.

    Example:
        >>> ordered(torch.tensor([3.0, 1.0, 1.0])).keep(2)
        [0, 1]
    """
    if not isinstance(scores, torch.Tensor):
        return scores
    if scores.dim() != 1 or scores.is_complex() or scores.isnan().any():
        raise InputError(f"scores of {scores.dtype}, shape {tuple(scores.shape)}: one real number per channel, no NaN")
    order = torch.argsort(scores, descending=True, stable=True).flip(0)
    return Removal(order, scores[order])

"""How many channels each group keeps: from scores, a cost and a target to a plan."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from graphprune.cost import COSTS
from graphprune.coupling import Coupling
from graphprune.errors import InputError, TargetError
from graphprune.importance.protocol import Order, Scores, ordered
from graphprune.plan import Plan


@dataclass(frozen=True)
class Target:
    """What to reach: exactly one of these, each a fraction *kept*, in (0, 1].

    Args:
        channels: of the channels of every group.
        macs: of the multiply-adds at the example inputs.
        params: of the parameters.
    Raises:
        TargetError: none or several are given, or one is outside (0, 1].

    Example:
        >>> Target(macs=0.5).name
        'macs'
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise TargetError(f"Target needs exactly one of channels, macs and params, not {sorted(given) or 'none'}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise TargetError(
                    f"Target({name}={value!r}): the fraction kept lies in (0, 1]; to remove 30 % write {name}=0.7"
                )

    @property
    def name(self) -> str:
        """Which quantity is targeted."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> float:
        """The fraction kept."""
        return float(getattr(self, self.name))


def allocate(scores: Scores, target: Target, coupling: Coupling) -> Plan:
    """Keep the same fraction of every group, the channels that its scores or its order hold best.

    Args:
        scores: per group name, one score per channel, higher = keep, of equal ones the first; or an order, which says
            itself what stays at a width. A group without scores stays whole.
        target: the fraction of channels itself, or a cost, for which the fraction is searched.
        coupling: whose groups are meant.
    Raises:
        TargetError: a cost target lies below what is left with one channel per group; the message gives that value.
        UnknownName: scores for a group that is not there.
        InputError: scores that are not one number per channel, an order of another size, or one that does not give
            as many positions as it is asked for.
    """
    orders = {name: _order(name, score, coupling.group(name).size) for name, score in scores.items()}
    sizes = {name: order.size for name, order in orders.items()}
    widths = _uniform(sizes, target.value) if target.name == "channels" else _search(sizes, target, coupling)
    return Plan.of(coupling, {name: _kept(name, orders[name], width) for name, width in widths.items()})


def _order(name: str, scores: torch.Tensor | Order, size: int) -> Order:
    """The order of a group, once what a criterion gave is found to fit.

    Raises:
        InputError: it does not.
    """
    if isinstance(scores, torch.Tensor):
        if scores.shape != (size,) or scores.is_complex() or scores.is_meta:
            found = tuple(scores.shape) if scores.shape != (size,) else f"{scores.dtype} on {scores.device}"
            raise InputError(f"scores of group {name!r} are {found}; an importance gives real numbers, shape ({size},)")
        if scores.isnan().any():
            raise InputError(f"scores of group {name!r} hold NaN, which has no rank; check the weights and importance")
    elif not callable(getattr(scores, "keep", None)):
        raise InputError(
            f"scores of group {name!r} are {type(scores).__name__}; an importance gives a tensor of shape ({size},) "
            "or an order with a method keep(width)"
        )
    elif scores.size != size:
        raise InputError(f"the order of group {name!r} is of {scores.size} channels; the group has {size}")
    return ordered(scores)


def _kept(name: str, order: Order, width: int) -> list[int]:
    """What an order keeps at a width.

    Raises:
        InputError: it is not that many positions of the group, ascending.
    """
    kept = order.keep(width)
    fits = isinstance(kept, list) and len(kept) == width and all(isinstance(i, int) for i in kept)
    if not fits or any(a >= b for a, b in itertools.pairwise([-1, *kept, order.size])):
        raise InputError(
            f"the order of group {name!r} keeps {reprlib.repr(kept)} at width {width}; "
            f"keep({width}) returns a list of {width} ascending positions from 0 to {order.size - 1}"
        )
    return kept


def _uniform(sizes: Mapping[str, int], fraction: float) -> dict[str, int]:
    """That fraction of each group, rounded to the nearest count, at least one channel."""
    return {name: min(size, max(1, int(fraction * size + 0.5))) for name, size in sizes.items()}


def _search(sizes: Mapping[str, int], target: Target, coupling: Coupling) -> dict[str, int]:
    """The widest uniform fraction whose cost does not exceed the target.

    Raises:
        TargetError: one channel per group costs more than that.
    """
    cost = COSTS[target.name](coupling)
    whole = cost.at({})
    budget = target.value * whole
    least = cost.at(dict.fromkeys(sizes, 1))
    if least > budget:
        raise TargetError(
            f"{target.name}={target.value} cannot be reached: with one channel left in each of {len(sizes)} groups, "
            f"{least / whole:.4f} of the {target.name} are left; ask for at least that, or unpin more axes "
            "(print(coupling) lists them with their causes)"
        )
    low, high = 0.0, 1.0
    if cost.at(_uniform(sizes, high)) <= budget:
        return _uniform(sizes, high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.at(_uniform(sizes, middle)) <= budget else (low, middle)
    return _uniform(sizes, low)

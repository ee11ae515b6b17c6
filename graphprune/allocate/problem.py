"""The problem that all methods solve: which widths groups may have, what is lost at each, and what may be spent."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.allocate.classes import structures
from graphprune.allocate.target import Target
from graphprune.cost import COSTS, Costs
from graphprune.cost.polynomial import Vector
from graphprune.coupling import Coupling
from graphprune.errors import InputError, TargetError, UnknownName, counted, nearest
from graphprune.importance import Order

Widths = npt.NDArray[np.intp]
ROUNDING = 1e-12
"""By how much a cost may exceed its limit, relative to it: limits are fractions in floating point."""
LIMITS: dict[str, Any] = {"floor": 1, "max_removed": 1.0, "multiple_of": 1, "protect": (), "tied": ()}
"""What a target can do without, and what it says then."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Groups whose widths are one decision; mostly a single one.

    Attributes:
        groups: positions of the groups among those of the coupling.
        widths: what the width may be, ascending, the last being the most that is allowed.
        lost: the importance lost at each of them, of all groups of the unit together.
        size: channels of each group.
    """

    groups: tuple[int, ...]
    widths: Widths
    lost: Vector
    size: int


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one of the widths of each unit such that no cost exceeds its limit.

    A choice is a vector of positions among the widths of the units.

    Attributes:
        units: the decisions.
        costs, limits: what may be spent.
        whole: widths of all groups of the coupling before pruning.
        coupling: whose groups are meant.
    """

    units: tuple[Unit, ...]
    costs: tuple[Costs, ...]
    limits: Vector
    whole: Vector
    coupling: Coupling

    @functools.cached_property
    def kinds(self) -> list[tuple[int, ...]]:
        """Per unit, the classes of its groups; units of equal ones are of one structure."""
        classes = structures(self.coupling)
        return [tuple(classes[group] for group in unit.groups) for unit in self.units]

    @functools.cached_property
    def _starts(self) -> Widths:
        """Where the widths of each unit begin among those of all."""
        return np.cumsum([0, *(len(u.widths) for u in self.units)])[:-1].astype(np.intp)

    @functools.cached_property
    def _widths(self) -> Widths:
        return np.concatenate([np.zeros(0, np.intp), *(u.widths for u in self.units)])

    @functools.cached_property
    def _lost(self) -> Vector:
        return np.concatenate([np.zeros(0), *(u.lost for u in self.units)])

    @functools.cached_property
    def _places(self) -> tuple[Widths, Widths]:
        """Per group that belongs to a unit, its position among those of the coupling, and the unit."""
        pairs = [(group, i) for i, unit in enumerate(self.units) for group in unit.groups]
        found = np.array(pairs, dtype=np.intp).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    @property
    def most(self) -> Widths:
        """The choice of the largest widths."""
        return np.array([len(u.widths) - 1 for u in self.units], dtype=np.intp)

    def width(self, choice: Widths) -> Widths:
        """Width per unit."""
        found: Widths = self._widths[self._starts + choice]
        return found

    def widths(self, choice: Widths) -> Vector:
        """Widths of all groups of the coupling."""
        out, (groups, units) = self.whole.copy(), self._places
        out[groups] = self.width(choice)[units]
        return out

    def spent(self, choice: Widths) -> Vector:
        """The costs, each relative to its limit: 1 is all that may be spent."""
        widths = self.widths(choice)
        return np.array([cost.of(widths) for cost in self.costs]) / self.limits

    def fits(self, choice: Widths) -> bool:
        """Whether no limit is exceeded."""
        return bool((self.spent(choice) <= 1 + ROUNDING).all())

    def prices(self, choice: Widths) -> npt.NDArray[np.float64]:
        """Per cost and unit, what one channel costs at these widths, relative to the limit."""
        widths, (groups, units) = self.widths(choice), self._places
        out = np.zeros((len(self.costs), len(self.units)))
        for row, cost, limit in zip(out, self.costs, self.limits, strict=True):
            row += np.bincount(units, cost.gradient(widths)[groups] / limit, len(self.units))
        return out

    def losses(self, choice: Widths) -> Vector:
        """The importance lost in each unit."""
        found: Vector = self._lost[self._starts + choice]
        return found

    def lost(self, choice: Widths) -> float:
        """The importance lost."""
        return float(self.losses(choice).sum())


def pose(
    orders: Mapping[str, Order], target: Target, coupling: Coupling, *, each: bool, latency: Costs | None = None
) -> Problem:
    """The problem of a target.

    Args:
        orders: per group, what stays at each width; a group without an order stays whole.
        target: budgets and limits.
        coupling: whose groups are meant.
        each: whether a fraction of the channels is one of every group, or of all of them together.
        latency: the predicted time; may be left out where the target has none.
    Raises:
        InputError: the target has a latency, and there is no prediction.
        UnknownName: a pattern of the target matches no group.
        TargetError: tied groups differ in size, or the least that the limits allow exceeds a budget.
    """
    whole = np.array([g.size for g in coupling.groups], dtype=float)
    budgets = {name: share for name, share in target.budgets.items() if not (each and name == "channels")}
    costs = _costs(budgets, coupling, latency)
    units = tuple(_worthwhile(u, costs.values()) for u in _units(orders, target, coupling, each=each))
    most = np.array([budgets[name] * costs[name].of(whole) for name in budgets])
    problem = Problem(units, tuple(costs.values()), most, whole, coupling)
    if unreachable := _unreachable(problem, budgets):
        limits = LIMITS | ({"channels": None} if isinstance(target.channels, Mapping) else {})
        lifted = {name: replace(target, **{name: value}) for name, value in limits.items()}
        others = {n: replace(problem, units=_units(orders, t, coupling, each=each)) for n, t in lifted.items()}
        raise TargetError(_blocked(problem, budgets, unreachable, target, others))
    return problem


def _units(orders: Mapping[str, Order], target: Target, coupling: Coupling, *, each: bool) -> tuple[Unit, ...]:
    """The decisions that a target leaves.

    Raises:
        UnknownName: a pattern of the target matches no group.
        TargetError: tied groups differ in size.
    """
    names = [g.name for g in coupling.groups]
    sizes = {g.name: g.size for g in coupling.groups}
    places = {name: i for i, name in enumerate(names)}
    fractions = _fractions(target, names, each=each)
    protected = {name for pattern in target.protect for name in matching(pattern, names)}
    free = {name for name in names if name in orders and name not in protected and (not fractions or name in fractions)}
    units = []
    for members in _tied(target, names, free, sizes):
        size = sizes[members[0]]
        widths = allowed(size, target, min(fractions.get(name, 1.0) for name in members))
        lost = np.sum([orders[name].lost.numpy()[widths] for name in members], axis=0)
        units.append(Unit(tuple(places[name] for name in members), widths, lost, size))
    return tuple(units)


def _worthwhile(unit: Unit, costs: Iterable[Costs]) -> Unit:
    """The unit without the widths that cost as much as larger ones."""
    for cost in costs:
        chosen = cost.worthwhile(unit.groups, unit.widths.astype(float))
        unit = replace(unit, widths=unit.widths[chosen], lost=unit.lost[chosen])
    return unit


def _costs(budgets: Iterable[str], coupling: Coupling, latency: Costs | None) -> dict[str, Costs]:
    """What each budget is spent on.

    Raises:
        InputError: one is a latency, and there is no prediction.
    """
    if "latency" not in budgets:
        return {name: COSTS[name](coupling) for name in budgets}
    if latency is None:
        raise InputError(
            "Target(latency=...) needs a prediction: pass allocate(..., latency=gp.Latency()(model, inputs, coupling))"
        )
    return {name: latency if name == "latency" else COSTS[name](coupling) for name in budgets}


def allowed(size: int, target: Target, fraction: float = 1.0) -> Widths:
    """The widths that a group of some size may have, ascending, up to a fraction of it."""
    step = target.multiple_of
    floor = target.floor if isinstance(target.floor, int) else math.ceil(target.floor * size - 1e-9)
    least = min(size, max(1, floor, math.ceil((1 - target.max_removed) * size - 1e-9)))
    most = size if fraction >= 1 else min(size, max(1, int(fraction * size + 0.5)))
    found = [w for w in range(step, most + 1, step) if w >= least]
    if most == size and (not found or found[-1] != size):
        found.append(size)
    if not found:  # the fraction is below what floor and multiples allow
        found = [min([w for w in range(step, size + 1, step) if w >= least], default=size)]
    return np.array(found, dtype=np.intp)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a name or pattern stands for.

    Raises:
        UnknownName: there are none; the message gives the nearest names.
    """
    names = list(names)
    found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
    if not found:
        raise UnknownName(f"no group {pattern!r}{nearest(pattern, names)}")
    return found


def _fractions(target: Target, names: Sequence[str], *, each: bool) -> dict[str, float]:
    """The fraction of each group that was given one; of several patterns the last counts."""
    if not isinstance(target.channels, Mapping):
        return dict.fromkeys(names, target.channels) if each and target.channels is not None else {}
    return {name: f for pattern, f in target.channels.items() for name in matching(pattern, names)}


def _tied(target: Target, names: Sequence[str], free: Set[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """The free groups, those that are tied together in one list; tied to one that is not free they stay whole.

    Raises:
        TargetError: tied groups differ in size.
    """
    which: dict[str, list[str]] = {name: [name] for name in names}
    for patterns in target.tied:
        members = list(dict.fromkeys(n for p in patterns for m in matching(p, names) for n in which[m]))
        if len({sizes[name] for name in members}) > 1:
            different = ", ".join(f"{name} has {sizes[name]}" for name in members[:4])
            raise TargetError(f"tied groups have one size, and {different} channels; tie those that are equal")
        which |= dict.fromkeys(members, members)
    unique = {id(members): members for members in which.values()}
    return [members for members in unique.values() if all(name in free for name in members)]


def _unreachable(problem: Problem, budgets: Mapping[str, float]) -> dict[str, float]:
    """The budgets that even the smallest widths exceed, and the fraction of each that is left then."""
    spent = problem.spent(np.zeros(len(problem.units), dtype=np.intp))
    return {name: share * budgets[name] for name, share in zip(budgets, spent, strict=True) if share > 1 + ROUNDING}


def _blocked(
    problem: Problem,
    budgets: Mapping[str, float],
    least: Mapping[str, float],
    target: Target,
    others: Mapping[str, Problem],
) -> str:
    """Why budgets cannot be reached: what is left of each at the least, and at the least without one of the limits.

    Args:
        problem, budgets: as posed.
        least: per budget that is out of reach, the fraction that is left.
        target: whose limits they are.
        others: per limit, the problem without it.
    """
    lines = [
        f"{name}={budgets[name]:g} cannot be reached: at least {left:.4f} of the {name} are left"
        for name, left in least.items()
    ]
    for limit, other in others.items():
        spent = other.spent(np.zeros(len(other.units), dtype=np.intp))
        freed = {name: share * budgets[name] for name, share in zip(budgets, spent, strict=True)}
        if any(freed[name] < left - ROUNDING for name, left in least.items()):
            values = ", ".join(f"{name} {freed[name]:.4f}" for name in least)
            lines.append(f"  without {limit}={getattr(target, limit)!r}: {values}")
    stay = len(problem.whole) - sum(len(unit.groups) for unit in problem.units)
    pinned = counted(len(problem.coupling.pinned), "pinned axis", "pinned axes")
    return "\n".join(lines) + (
        f"\n{stay} of {counted(len(problem.whole), 'group')} and {pinned} stay whole; ask for "
        "at least what is left, lift a limit, or unpin more axes (print(coupling) lists them with their causes)"
    )

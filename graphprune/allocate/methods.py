"""Methods of allocation: each chooses the widths of a problem's units. Ties go to the first unit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from graphprune.allocate.problem import ROUNDING, Problem, Unit, Widths
from graphprune.cost.polynomial import Vector

Method: TypeAlias = Literal["uniform", "global", "isomorphic", "greedy", "knapsack"]
REFRESHES = 20_000
"""How often the greedy method works out prices anew, at most; one channel at a time up to this many steps."""
MULTIPLIERS = 48
SWEEPS = 12
EXCHANGED = 256
"""Up to so many units are exchanged one by one."""
NEAR = 1.02
"""Of several starts, those are improved that lose at most so many times what the best does."""


def uniform(problem: Problem) -> Widths:
    """The same fraction of each group, as near as its widths allow: the largest that fits."""
    sizes = np.array([u.size for u in problem.units], dtype=float)

    def at(fraction: float) -> Widths:
        nearest = [int(np.abs(u.widths - fraction * u.size - 1e-9).argmin()) for u in problem.units]
        return np.array(nearest, dtype=np.intp)

    if problem.fits(at(1.0)):
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.fits(at(middle)) else (low, middle)
    choice = at(low) if problem.fits(at(low)) else np.zeros(len(sizes), dtype=np.intp)

    def order(unit: int, k: int) -> float:
        """Those that are least above the fraction come first, each by one step at most."""
        return float(problem.units[unit].widths[k] / sizes[unit] - low) if k <= choice[unit] + 1 else np.inf

    return filled(problem, choice, order)


def threshold(problem: Problem) -> Widths:
    """One threshold over the importance of single channels: whatever lies below it goes, in every group."""
    return _cut(problem, [_slopes(u) for u in problem.units])


def isomorphic(problem: Problem) -> Widths:
    """One threshold for each class of groups of one structure, such that each class keeps the same fraction."""
    slopes = [_slopes(u) for u in problem.units]
    ranks = [np.zeros(0)] * len(slopes)
    members: dict[tuple[int, ...], list[int]] = {}
    for unit, kind in enumerate(problem.kinds):
        members.setdefault(kind, []).append(unit)
    for units in members.values():
        found = np.concatenate([slopes[i] for i in units])
        levels, which = np.unique(-found, return_inverse=True)
        steps = np.concatenate([np.diff(problem.units[i].widths) for i in units])
        least = sum(int(problem.units[i].widths[0]) for i in units)
        kept = least + np.bincount(which, steps, len(levels)).cumsum()
        share = kept / sum(problem.units[i].size for i in units)  # what the class keeps with all steps of that level
        ends = np.cumsum([len(slopes[i]) for i in units])
        ranks_of = np.split(-share[which], ends[:-1])
        for i, rank in zip(units, ranks_of, strict=True):
            ranks[i] = rank
    return _cut(problem, ranks)


def _cut(problem: Problem, slopes: Sequence[Vector]) -> Widths:
    """The lowest threshold that fits: of each unit stay the steps that lie above it."""
    levels = np.unique(np.concatenate([s for s in slopes if len(s)] or [np.zeros(1)]))

    def above(number: int) -> Widths:
        """What stays if everything up to the level of that number goes."""
        level = levels[number - 1] if number else -np.inf
        return np.array([int((s > level).sum()) for s in slopes], dtype=np.intp)

    low, high = 0, len(levels)
    while low < high:  # the lowest that fits
        middle = (low + high) // 2
        low, high = (low, middle) if problem.fits(above(middle)) else (middle + 1, high)
    choice = above(low)
    return filled(problem, choice, lambda unit, k: -slopes[unit][k - 1])


def greedy(problem: Problem) -> Widths:
    """Step by step, what loses least importance for what it frees, at the widths of that moment (Group Fisher)."""
    each = max(1, sum(len(u.widths) - 1 for u in problem.units) // REFRESHES)
    return filled(problem, _lowered(problem, problem.most, each=each), _worth(problem))


def knapsack(problem: Problem) -> Widths:
    """The widths at which least importance is lost: the best of Lagrangian relaxations and the other methods, it and
    those that come near it improved by exchanges until none helps.
    """
    starts = [uniform(problem), threshold(problem), isomorphic(problem), greedy(problem), *_relaxed(problem)]
    different = {tuple(start): start for start in starts}
    best: Widths | None = None
    for start in sorted(different.values(), key=problem.lost):
        if best is None or problem.lost(start) <= NEAR * problem.lost(best):
            found = improved(problem, start)
            best = found if best is None or problem.lost(found) < problem.lost(best) else best
    assert best is not None, "there are starts"
    return best


METHODS: Mapping[str, Callable[[Problem], Widths]] = {
    "uniform": uniform,
    "global": threshold,
    "isomorphic": isomorphic,
    "greedy": greedy,
    "knapsack": knapsack,
}


# -- pieces ------------------------------------------------------------------------------------------------------


def filled(problem: Problem, choice: Widths, order: Callable[[int, int], float]) -> Widths:
    """Give back what fits of what was taken, the smallest `order(unit, position it would get)` first.

    Steps whose order is infinite are not taken.
    """
    choice = choice.copy()
    blocked: set[int] = set()
    while True:
        steps = [
            (order(i, int(k) + 1), i)
            for i, (u, k) in enumerate(zip(problem.units, choice, strict=True))
            if k + 1 < len(u.widths) and i not in blocked
        ]
        for rank, unit in sorted(steps):
            if rank == np.inf:
                return choice
            choice[unit] += 1
            if problem.fits(choice):
                break
            choice[unit] -= 1
            blocked.add(unit)  # prices only rise as widths grow
        else:
            return choice


def improved(problem: Problem, choice: Widths) -> Widths:
    """Exchange, as long as less is lost: take a step from one unit and give back elsewhere what fits then; or give one
    a step, and take elsewhere what loses least until it fits.
    """
    if len(problem.units) > EXCHANGED:
        return choice
    best, again = problem.lost(choice), True
    while again:
        again = False
        order = np.argsort(_rates(problem, choice, np.ones(len(problem.limits))), kind="stable")
        for unit, step in itertools.product(order, (-1, 1)):
            other = _exchanged(problem, choice, int(unit), step)
            if other is not None and (lost := problem.lost(other)) < best - 1e-12 * abs(best):
                choice, best, again = other, lost, True
    return choice


def _exchanged(problem: Problem, choice: Widths, unit: int, step: int) -> Widths | None:
    """The choice with one unit a step lower or higher, and the others as that lets them; None where it cannot be."""
    if not 0 <= choice[unit] + step < len(problem.units[unit].widths):
        return None
    other = choice.copy()
    other[unit] += step
    if step > 0:
        other = _lowered(problem, other, held=unit)
        if not problem.fits(other):
            return None
    return filled(problem, other, _barred(_worth(problem), unit))


def _lowered(problem: Problem, choice: Widths, *, each: int = 1, held: int | None = None) -> Widths:
    """Take steps until no limit is exceeded or none is left: what loses least for what it frees of what is too much.

    Args:
        problem, choice: where to start.
        each: how many units take a step before prices are worked out anew.
        held: a unit that takes none.
    """
    choice = choice.copy()
    spent = problem.spent(choice)
    while (spent > 1 + ROUNDING).any():
        rate = _rates(problem, choice, np.where(spent > 1 + ROUNDING, spent - 1, 0.0))
        if held is not None:
            rate[held] = np.inf
        taken = [unit for unit in np.argsort(rate, kind="stable")[:each] if np.isfinite(rate[unit])]
        if not taken:
            break
        choice[taken] -= 1
        spent = problem.spent(choice)
    return choice


def _relaxed(problem: Problem) -> Iterator[Widths]:
    """The best choices that fit, of those at several prices of importance: every unit takes the width at which what is
    lost and what is spent are least together, all at once and repeatedly, since what one costs depends on the others.
    """
    low, high = -12.0, 12.0
    scale = max((float(np.ptp(u.lost)) for u in problem.units), default=1.0) or 1.0
    choice, found = problem.most, []
    for _ in range(MULTIPLIERS):
        middle = (low + high) / 2
        for _ in range(SWEEPS):
            prices = problem.prices(choice).sum(0) * scale * 10**middle
            wanted = [int((u.lost + p * u.widths).argmin()) for u, p in zip(problem.units, prices, strict=True)]
            step = np.array(wanted, dtype=np.intp) - choice
            if not step.any():
                break
            choice = choice + np.where(np.abs(step) > 1, step // 2, step)
        if problem.fits(choice):
            high = middle
            found.append(choice)
        else:
            low = middle
    for choice in sorted(found, key=problem.lost)[:2]:
        yield filled(problem, choice, _worth(problem))


def _rates(problem: Problem, choice: Widths, weights: Vector) -> Vector:
    """Per unit, the importance that the next step loses for what it frees; infinite where there is no step."""
    last = choice == 0
    below = np.where(last, 0, choice - 1)
    freed = (weights @ problem.prices(choice)) * (problem.width(choice) - problem.width(below))
    lost = problem.losses(below) - problem.losses(choice)
    rate = np.divide(lost, freed, out=np.full(len(lost), np.finfo(float).max), where=freed > 0)
    return np.where(last, np.inf, rate)


def _worth(problem: Problem) -> Callable[[int, int], float]:
    """Orders steps back by the importance they save for each channel."""

    def order(unit: int, k: int) -> float:
        u = problem.units[unit]
        return -float(u.lost[k - 1] - u.lost[k])

    return order


def _barred(order: Callable[[int, int], float], barred: int) -> Callable[[int, int], float]:
    """The same order without one unit."""
    return lambda unit, k: np.inf if unit == barred else order(unit, k)


def _slopes(unit: Unit) -> Vector:
    """Per step, the importance of one of its channels, made to fall as more stay: [k - 1] is that of the step to k."""
    steps = -np.diff(unit.lost) / (np.diff(unit.widths) * len(unit.groups))
    return np.minimum.accumulate(steps)

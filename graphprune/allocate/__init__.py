"""How many channels each group keeps: from scores, costs and a target to a plan.

`target` says what to reach, `problem` turns it into widths to choose from, `methods` choose.
"""

from __future__ import annotations

import itertools
import reprlib

import torch

from graphprune.allocate.methods import METHODS, Method
from graphprune.allocate.problem import pose
from graphprune.allocate.target import Target
from graphprune.cost import Costs
from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance import Order, Scores, ordered
from graphprune.plan import Plan

__all__ = ["METHODS", "Method", "Target", "allocate"]


def allocate(
    scores: Scores, target: Target, coupling: Coupling, *, method: Method = "uniform", latency: Costs | None = None
) -> Plan:
    """Choose how many channels each group keeps, and which: those that its scores or its order hold best.

    What a plan loses is the sum, over the groups, of the scores of what goes, or of what their orders say.

    Args:
        scores: per group name, one score per channel, higher = keep, of equal ones the first; or an order, which says
            itself what stays at a width. A group without scores stays whole.
        target: what may be spent, and within which limits. All budgets are kept, and as much as fits is used.
        coupling: whose groups are meant.
        method: "uniform" keeps the same fraction of every group, whatever its scores; "global" cuts all groups at one
            threshold over their scores, which must then be comparable; "isomorphic" has such a threshold for each class
            of groups of one structure, and keeps the same fraction of every class, so that scores must compare inside
            classes only; "greedy" takes, step by step, what loses least for what it frees; "knapsack" searches for the
            widths at which least is lost.
        latency: the time at any widths, as a `Latency` predicts it; may be left out where the target has none.
    Raises:
        TargetError: a budget lies below what the limits leave; the message gives that value.
        UnknownName: scores for a group, or a pattern of the target, that is not there.
        InputError: an unknown method; a latency without a prediction; scores that are not one number per channel, an
            order of another size, or one that does not give as many positions as it is asked for.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: it is one of {', '.join(METHODS)}")
    orders = {name: _order(name, score, coupling.group(name).size) for name, score in scores.items()}
    problem = pose(orders, target, coupling, each=method == "uniform", latency=latency)
    widths = problem.widths(METHODS[method](problem))
    chosen = {g.name: int(w) for g, w in zip(coupling.groups, widths, strict=True) if w < g.size}
    return Plan.of(coupling, {name: _kept(name, orders[name], width) for name, width in chosen.items()})


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
    order = ordered(scores)
    lost = getattr(order, "lost", None)
    if not isinstance(lost, torch.Tensor) or lost.shape != (size + 1,) or lost.is_complex() or lost.isnan().any():
        found = f"shape {tuple(lost.shape)}, {lost.dtype}" if isinstance(lost, torch.Tensor) else type(lost).__name__
        raise InputError(
            f"the order of group {name!r} says that {found} is lost; `lost` is a tensor of shape ({size + 1},), real "
            "and without NaN: what is lost when 0, 1, ... channels stay"
        )
    return order


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

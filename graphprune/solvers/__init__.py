"""Numerical cores that criteria and repair share: functions on tensors, which know nothing of models."""

from graphprune.solvers.exchange import swap
from graphprune.solvers.least_squares import Fit, coefficients, factorise
from graphprune.solvers.quadratic import select, selections
from graphprune.solvers.rank import ranks
from graphprune.solvers.subset import Selection, forward_selection, greedy_removal

__all__ = [
    "Fit",
    "Selection",
    "coefficients",
    "factorise",
    "forward_selection",
    "greedy_removal",
    "ranks",
    "select",
    "selections",
    "swap",
]

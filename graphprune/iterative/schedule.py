"""How far each step goes: from a target and a number of steps to one target per step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from graphprune.allocate import Target
from graphprune.allocate.target import BUDGETS
from graphprune.errors import InputError

Schedule: TypeAlias = Literal["linear", "exponential"] | Callable[[float], float]


def targets(target: Target, steps: int, schedule: Schedule) -> tuple[Target, ...]:
    """One target per step, the last being `target` itself.

    Args:
        target: what is reached in the end; what is no budget, such as a floor, holds in every step.
        steps: how many there are.
        schedule: "linear" removes the same amount in each step, "exponential" the same fraction of what is left; a
            callable gives, for the fraction of the steps that are done, the fraction of the removal that is.
    Raises:
        InputError: no steps, an unknown schedule, or one that goes back or beyond the target.

    Example:
        >>> [round(t.macs, 3) for t in targets(Target(macs=0.4), 3, "linear")]
        [0.8, 0.6, 0.4]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: a whole number of steps, at least 1")
    if schedule not in ("linear", "exponential") and not callable(schedule):
        raise InputError(f"schedule={schedule!r}; it is 'linear', 'exponential' or a callable, such as lambda t: t**2")
    times = [step / steps for step in range(1, steps)]
    if callable(schedule):
        done = [float(schedule(t)) for t in times]
        if not all(a <= b for a, b in itertools.pairwise([0.0, *done, 1.0])):
            raise InputError(
                f"the schedule gives {done}: the fraction of the removal that is done, which rises from 0 to 1 as the "
                "fraction of the steps does"
            )
    else:
        done = times

    def eased(value: Any, part: float) -> Any:
        if isinstance(value, Mapping):
            return {name: eased(each, part) for name, each in value.items()}
        return value**part if schedule == "exponential" else 1 - (1 - value) * part

    given = {name: getattr(target, name) for name in BUDGETS if getattr(target, name) is not None}
    steps_before = (replace(target, **{name: eased(value, part) for name, value in given.items()}) for part in done)
    return (*steps_before, target)

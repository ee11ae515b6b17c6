"""Pruning in steps: a little is removed, the caller trains, what is left is scored again, until the target is met.

Every step is allocated on the original's groups, where what earlier steps removed is gone first and at no cost. So
fractions, floors and names in a target are those of the original, and the last step meets it as one step would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from graphprune.allocate import Method as Allocation
from graphprune.allocate import Target, allocate
from graphprune.calibrate import Loss
from graphprune.couple import couple
from graphprune.files import fingerprint
from graphprune.importance import Importance, Magnitude
from graphprune.importance.fallback import scored_by
from graphprune.iterative.lineage import Lineage
from graphprune.iterative.schedule import Schedule, targets
from graphprune.iterative.store import Store
from graphprune.latency import Predictor
from graphprune.migrate import Unfit, migrate
from graphprune.plan import Plan
from graphprune.pruning import (
    Result,
    carry_out,
    check,
    compared,
    names_of,
    repair_data,
    require_groups,
    timer,
)
from graphprune.recover import Method
from graphprune.report import Choice, Report, report
from graphprune.rewrite import Emit, changes
from graphprune.rules import RULES, Rule
from graphprune.trace import Inputs, held, trace

__all__ = ["Iterated", "Schedule", "Step", "prune_iteratively"]


@dataclass(frozen=True, eq=False)
class Step:
    """What the training callback gets.

    Attributes:
        number: of this step, from 1.
        steps: how many there are.
        result: of this step alone: its plan and coupling are of the model before it, so that whatever else goes along
            with the model can be handed to `migrate`. Its report is of the original.
        optimizer: the optimizer over `model`, with its state; None if none was given.
    """

    number: int
    steps: int
    result: Result
    optimizer: Any = None

    @property
    def model(self) -> nn.Module:
        """The smaller module: train it, in place."""
        return self.result.model

    @property
    def report(self) -> Report:
        """How far the original was pruned."""
        return self.result.report


@dataclass(frozen=True, eq=False)
class Iterated(Result):
    """What `prune_iteratively` returns: the last model, and one plan that says of the original what is left.

    Attributes:
        plans: per step, the plan of the model before it.
        reports: per step, how far the original was pruned.
        optimizer: the optimizer over the last model; None if none was given.
    """

    plans: tuple[Plan, ...]
    reports: tuple[Report, ...]
    optimizer: Any = field(default=None, repr=False)


def prune_iteratively(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Target,
    steps: int,
    schedule: Schedule = "linear",
    importance: Importance = Magnitude(),  # noqa: B008 - frozen
    allocation: Allocation = "uniform",
    latency: Predictor | None = None,
    train: Callable[[Step], object] = lambda step: None,
    optimizer: Optimizer | None = None,
    unfit: Unfit = "error",
    directory: str | os.PathLike[str] | None = None,
    norms: Literal["pin", "prune"] = "pin",
    emit: Emit = "auto",
    verify: bool = True,
    keep_names: Iterable[str] = (),
    on_unknown: Literal["pin", "error"] = "pin",
    rules: Mapping[str, Rule] = RULES,
    repair: Method = "none",
    batchnorm: bool = False,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Iterated:
    """Prune in steps, with training between them.

    In each step the model is traced and scored anew, cut to the step's target, verified, repaired if wanted, and
    handed to `train`. The target is never overshot; `model` and `optimizer` are left as they were. Channels that were a
    group before a step and are none after it, which ops that tell sizes apart can bring about, stay from there on; the
    report says why, and in which step that was found.

    Args:
        model, example_inputs, importance, allocation, latency: as for `prune`; time is measured once, of the original.
        target: what is reached in the end, in fractions of the original.
        steps: how many there are.
        schedule: "linear" removes the same amount in each step, "exponential" the same fraction of what is left; a
            callable gives, for the fraction of the steps that are done, the fraction of the removal that is, such as
            `lambda t: 1 - (1 - t) ** 3`.
        train: trains `step.model`, in place, with `step.optimizer` or another one; what it returns is not looked at.
        optimizer: over parameters of `model`; goes along as `migrate` says, with `unfit` as there.
        directory: where finished steps are kept. Called again with the same arguments, the run goes on after the last
            one. The files hold plans, weights and optimizer state; repairs and random generators are not kept.
        norms, emit, verify, keep_names, on_unknown, rules, repair, batchnorm, batches, loss: as for `prune`.
    Raises:
        InputError: an argument cannot be used, or the directory holds another run or a file that is cut off.
        TargetError: the target cannot be met; found out in the first step.
        PlanError: there is nothing to remove.
        GraphpruneError: whatever else `prune` raises.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> result = gp.prune_iteratively(net, torch.randn(2, 3), target=gp.Target(channels=0.5), steps=2)
        >>> [report.costs["channels"].after for report in result.reports]
        [6, 4]
    """
    check(target, importance, latency)
    aims = targets(target, steps, schedule)
    data = repair_data(importance, batches, loss) if repair != "none" or batchnorm else None
    couples = partial(couple, norms=norms, on_unknown=on_unknown, keep_names=tuple(keep_names), rules=rules)
    carry = partial(carry_out, importance=importance, emit=emit, verify=verify)
    described = {"model": type(model).__name__, "weights": fingerprint(held(model)), "steps": steps}
    options = {"targets": [asdict(aim) for aim in aims], "allocation": allocation, "emit": emit, **couples.keywords}
    options["rules"] = sorted(name for name, rule in rules.items() if RULES.get(name) is not rule)
    store = Store(directory, {**described, **options})
    inputs, names, before = Inputs.of(example_inputs), names_of(model), model
    coupling = couples(trace(model, inputs))
    require_groups(coupling)
    latency = timer(latency, target)
    predicted = None if latency is None else latency(model, inputs, coupling)
    allocates = partial(allocate, method=allocation, latency=predicted)
    lineage = Lineage(coupling, Plan.of(coupling, {}))
    plans: list[Plan] = []
    reports: list[Report] = []
    going_on, whole = True, dict[str, str]()
    for number, aim in enumerate(aims, 1):
        if plans:
            coupling = couples(trace(before, inputs))
            whole = {n: whole.get(n, f"{why}, found in step {number}") for n, why in lineage.stuck(coupling).items()}
        saved = store.read(number) if going_on else None
        going_on = saved is not None
        if saved:
            plan, choice = saved.plan, Choice(importance, allocation, {})
        else:
            given = importance(before, coupling)
            named = lineage.named(given, coupling), lineage.named(scored_by(given), coupling)
            choice, scores = Choice(importance, allocation, *named), lineage.lifted(given, coupling)
            if not plans:
                allocates(scores, target, lineage.coupling)  # better refused now than after training
            plan = lineage.below(allocates(scores, lineage.capped(aim), lineage.coupling), coupling)
        plan.check(coupling)
        lineage = lineage.after(plan, coupling)
        ways: Any = {} if saved else {"repair": repair, "batchnorm": batchnorm, "data": data}
        carried = carry(before, inputs, coupling, plan, **ways)
        small = carried[0].model
        times = compared(latency, model, small, inputs)
        ways = {"choice": choice, "latency": predicted, "measured": times, "whole": whole}
        reported = report(lineage.coupling, lineage.plan, aim, *carried, **ways)
        result = Result(small, plan, coupling, reported, names_of(before), inputs, carried[0].changes)
        optimizer = None if optimizer is None else migrate(optimizer, result, unfit=unfit)
        if saved:
            saved.restore(small, optimizer)
        else:
            train(Step(number, steps, result, optimizer))
            store.write(number, plan, small, optimizer)
        before, plans, reports = small, [*plans, plan], [*reports, reported]
    original = lineage.plan, lineage.coupling, reports[-1], names, inputs, changes(model, before)
    return Iterated(before, *original, tuple(plans), tuple(reports), optimizer)

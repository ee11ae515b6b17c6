"""`prune`: the steps of the library in a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from graphprune.allocate import Method as Allocation
from graphprune.allocate import Target, allocate
from graphprune.calibrate import Calibration, Loss, require
from graphprune.couple import couple
from graphprune.coupling import Coupling
from graphprune.errors import InputError, PlanError, VerificationError
from graphprune.importance import Importance, Magnitude
from graphprune.importance.fallback import scored_by
from graphprune.latency import Latency, Predictor
from graphprune.plan import Plan
from graphprune.recover import Method, Repair
from graphprune.recover import repair as repair_weights
from graphprune.report import Choice, Report, report
from graphprune.rewrite import Change, Emit, Rewritten, rewrite
from graphprune.rules import RULES, Rule
from graphprune.trace import Inputs, parameters, trace
from graphprune.verify import Bench, Verification


@dataclass(frozen=True, eq=False)
class Result:
    """What `prune` returns.

    Attributes:
        model: the smaller module, in the train or eval mode of the original.
        plan: which channels of which groups stayed.
        coupling: the groups, and what was pinned.
        report: requested and achieved, causes, verification; `print` it.
        names: fully qualified names of the parameters of the original, by the parameters themselves, which it does not
            keep alive.
        inputs: the example inputs.
        changes: the ints that modules of the smaller one keep and that differ from the original's.
    """

    model: nn.Module
    plan: Plan
    coupling: Coupling
    report: Report
    names: Mapping[torch.Tensor, tuple[str, ...]] = field(repr=False)
    inputs: Inputs = field(repr=False)
    changes: tuple[Change, ...] = field(repr=False)


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Target,
    importance: Importance = Magnitude(),  # noqa: B008 - frozen
    allocation: Allocation = "uniform",
    latency: Predictor | None = None,
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
) -> Result:
    """A smaller copy of `model`, proved equal to it with the removed channels zeroed; and repaired, if wanted.

    Args:
        model: any module; it is not modified.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `Inputs`.
        target: what fraction to keep, of the channels, the multiply-adds, the parameters, the memory or the time, and
            limits.
        importance: ranks the channels of each group.
        allocation: how the target is shared out over the groups: "uniform", "global", "isomorphic", "greedy" or
            "knapsack", see `graphprune.allocate`; all but the first need an importance whose scores compare between
            groups, "isomorphic" between groups of one structure.
        latency: how time is measured. Whatever the target, the report then has the predicted and the measured time; a
            target that has a latency takes `Latency()` where none is given.
        norms: "pin" removes only what is exact; "prune" also removes channels that a normalisation takes statistics
            over (transformer width), which changes what the kept channels see.
        emit: "module" for the same class, "graft" for the same class with the forward of some modules from the trace,
            "graph" for a graph module, "auto" for the first that verifies.
        verify: compare the result with the zeroed original.
        keep_names: parameters, buffers or modules whose widths must stay.
        on_unknown: "pin" what an op without a rule touches, or raise an "error" that lists them all.
        rules: op name to rule; add those of your own ops with `graphprune.RULES | graphprune.op(...)`.
        repair: what is done, after the proof, about what the removed channels did: "least_squares" refits the weights
            that are left, "bias" gives back means, "none" leaves the weights as they are. See `graphprune.repair`.
        batchnorm: take the statistics of batch norms anew, where that helps.
        batches, loss: what to repair with, as for `graphprune.calibrate`; by default those of `importance`, whose
            `sample_dim` counts.
    Raises:
        InputError, TraceError: the model cannot be traced with these inputs, or there are no batches to repair with.
        CalibrationError, CriterionError: the batches cannot be used, or the importance says nothing about a group.
        UnknownName, UnsupportedOp, TargetError: an argument cannot be honoured.
        PlanError: the model has no channels that may be removed.
        RewriteError, VerificationError: no smaller module computes what it must.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> gp.prune(net, torch.randn(2, 3), target=gp.Target(channels=0.5)).model
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=5, bias=True)
        )
    """
    check(target, importance, latency)
    data = repair_data(importance, batches, loss) if repair != "none" or batchnorm else None
    inputs = Inputs.of(example_inputs)
    coupling = couple(trace(model, inputs), norms=norms, on_unknown=on_unknown, keep_names=keep_names, rules=rules)
    require_groups(coupling)
    latency = timer(latency, target)
    predicted = None if latency is None else latency(model, inputs, coupling)
    scores = importance(model, coupling)
    plan = allocate(scores, target, coupling, method=allocation, latency=predicted)
    rewritten, verification, repaired = carry_out(
        model,
        inputs,
        coupling,
        plan,
        importance,
        emit=emit,
        verify=verify,
        repair=repair,
        batchnorm=batchnorm,
        data=data,
    )
    times = compared(latency, model, rewritten.model, inputs)
    found = rewritten, verification, repaired
    choice = Choice(importance, allocation, scores, scored_by(scores))
    reported = report(coupling, plan, target, *found, choice=choice, latency=predicted, measured=times)
    return Result(rewritten.model, plan, coupling, reported, names_of(model), inputs, rewritten.changes)


def carry_out(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    plan: Plan,
    importance: Importance,
    *,
    emit: Emit,
    verify: bool,
    repair: Method = "none",
    batchnorm: bool = False,
    data: tuple[Iterable[Any], Loss | None] | None = None,
) -> tuple[Rewritten, Verification | None, Repair | None]:
    """Emit, verify and, where there is data for it, repair.

    Raises:
        GraphpruneError: as `prune`, from there on.
    """
    rewritten, verification = emit_verified(model, inputs, coupling, plan, emit=emit, verify=verify)
    options = {name: getattr(importance, name) for name in ("sample_dim", "progress") if hasattr(importance, name)}
    repaired = data and repair_weights(
        model, rewritten.model, coupling, plan, data[0], method=repair, batchnorm=batchnorm, loss=data[1], **options
    )
    return rewritten, verification, repaired


def names_of(model: nn.Module) -> Mapping[torch.Tensor, tuple[str, ...]]:
    """All names of each parameter, by the parameter, which is not kept alive."""
    names: Any = WeakTensorKeyDictionary()
    for name, parameter in parameters(model):
        names[parameter] = (*names.get(parameter, ()), name)
    found: Mapping[torch.Tensor, tuple[str, ...]] = names
    return found


def repair_data(
    importance: Importance, batches: Iterable[Any] | None, loss: Loss | None
) -> tuple[Iterable[Any], Loss | None]:
    """What to repair with.

    Raises:
        InputError: there are no batches, or they can be gone through only once.
    """
    batches = getattr(importance, "batches", None) if batches is None else batches
    if batches is None or isinstance(batches, Calibration):
        raise InputError("repair and batchnorm need batches: pass prune(..., batches=...), a list or a DataLoader")
    require(batches, again=True)
    return batches, getattr(importance, "loss", None) if loss is None else loss


def timer(latency: Predictor | None, target: Target) -> Predictor | None:
    """How time is measured; None where nobody asks for it."""
    return Latency() if latency is None and target.latency is not None else latency


def compared(
    latency: Predictor | None, model: nn.Module, small: nn.Module, inputs: Inputs
) -> tuple[float, float] | None:
    """Nanoseconds that two models take; None where nobody asks, or for other times than this device's."""
    return latency.compare(model, small, inputs) if isinstance(latency, Latency) else None


def check(target: object, importance: object, latency: object) -> None:
    """Refuse what is easily passed in place of a target, an importance or a way to measure time.

    Raises:
        InputError: they are something else.
    """
    check_target(target)
    if isinstance(importance, type) or not callable(importance):
        name = getattr(importance, "__name__", repr(importance))
        raise InputError(f"importance={name}: pass an instance, such as gp.importance.Magnitude()")
    if latency is not None and (isinstance(latency, type) or not callable(latency)):
        raise InputError(
            f"latency={latency!r}: this is how time is measured, such as gp.Latency(seconds=20); how much of it is "
            "kept goes into the target, as gp.Target(latency=0.7)"
        )


def check_target(target: object) -> None:
    """Refuse what is easily passed in place of a target.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(target, Target):
        raise InputError(f"target={target!r}: pass a Target that says of what, such as gp.Target(macs=0.5)")


def require_groups(coupling: Coupling) -> None:
    """Refuse a model of which nothing can be removed.

    Raises:
        PlanError: there are no groups; the message gives the causes.
    """
    if not coupling.groups:
        causes = dict.fromkeys(f"{p.name}: {p.reason}" for p in coupling.pinned)
        listed = "\n  ".join(list(causes)[:5]) or "it has no parameters with more than one channel"
        raise PlanError(f"{coupling.program.model_class} has no channels that may be removed:\n  {listed}")


def emit_verified(
    model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, *, emit: Emit = "auto", verify: bool = True
) -> tuple[Rewritten, Verification | None]:
    """The first emission that verifies; with `verify=False` the first that gives what it must on the example inputs.

    Raises:
        InputError: the model has no values to compare.
        RewriteError: the emitter asked for cannot carry out the plan.
        VerificationError: the last emission does not compute what it must.
    """
    if verify and any(p.is_meta for p in model.parameters()):
        raise InputError(
            "the model is on the meta device and has no values to compare; load weights first, or prune it unchecked "
            "with verify=False"
        )
    bench = Bench(model, inputs, coupling, plan)
    if not verify:
        problem = bench.runs if emit == "auto" else lambda candidate: ""
        return rewrite(model, inputs, coupling, plan, emit=emit, problem=problem), None
    rewritten = rewrite(model, inputs, coupling, plan, emit=emit, problem=bench.problem)
    try:
        return rewritten, bench.compare(rewritten.model)
    except VerificationError as error:
        if emit != "auto" or rewritten.emitter == "graph":
            raise
        what = "the same class does" if rewritten.emitter == "module" else "grafts do"
        reason = f"{what} not verify: {error}".splitlines()[0]
    rewritten = rewrite(model, inputs, coupling, plan, emit="graph")
    verification = bench.compare(rewritten.model)
    return Rewritten(rewritten.model, "graph", "; ".join(filter(None, (rewritten.reason, reason)))), verification

"""One real run of the original, watched: what every op call gets, and how long it takes there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import no_python_dispatcher
from torch.utils import _pytree as pytree

from graphprune.interpret import Replay
from graphprune.latency.calls import OpCall, Operand
from graphprune.latency.clock import clock, medians, settle, waiting
from graphprune.program import Node, Program, Value
from graphprune.trace import Inputs, untouched

RUNS, SECONDS = 12, 3.0
"""The model is run that often, or for that long, whichever ends first; at least three times."""


@dataclass(frozen=True)
class Observed:
    """What a run of the original showed.

    Attributes:
        calls: per node that computes something, its call.
        seconds: per such node, what it took.
        total: what the whole model takes, in seconds.
    """

    calls: Mapping[str, OpCall]
    seconds: Mapping[str, float]
    total: float


def observe(
    model: nn.Module, inputs: Inputs, program: Program, device: torch.device, *, timed: bool = True
) -> Observed:
    """Run a model as it was traced.

    Args:
        model: the original; it is left as it was.
        inputs: the example inputs, on the device.
        program: its trace.
        device: where it runs.
        timed: whether times are taken; without, it runs once.
    Raises:
        CalibrationError, TraceError: it does not run as it was traced.
    """
    calls: dict[str, OpCall] = {}
    times: dict[str, list[float]] = {}
    wait, now = waiting(device), clock(device)
    replay = Replay(model)
    settle(device)

    def watched(node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with no_python_dispatcher():
            wait()
            start = now()
            result = func(*args, **kwargs)
            wait()
            seconds = now() - start
        if node.name not in times and hasattr(func, "_schema"):
            times[node.name] = []
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
            if node.in_place or not _is_view(given, result):
                calls[node.name] = OpCall(func, _recorded(node, given))
        elif node.name in times:
            times[node.name].append(seconds)
        return result

    with untouched(model), torch.no_grad():
        started = time.perf_counter()
        for run in range(RUNS + 1 if timed else 1):
            replay.output(program, inputs.map(torch.clone), watched)
            if run > 3 and time.perf_counter() - started > SECONDS:
                break
        if not timed:
            return Observed(calls, {}, 0.0)
        total = medians([partial(inputs.call, model)], device, seconds=SECONDS)[0]
    return Observed(calls, {name: statistics.median(times[name]) for name in calls}, total)


def _recorded(node: Node, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call: tensors as records, everything else as it was."""

    def recorded(argument: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Operand.of(value, weight=isinstance(argument, Value) and argument.kind in ("parameter", "buffer"))
        if isinstance(value, (tuple, list)):
            inner = argument if isinstance(argument, (tuple, list)) else [None] * len(value)
            return tuple(recorded(a, v) for a, v in zip(inner, value, strict=True))
        return value

    return {name: recorded(node.arguments.get(name), value) for name, value in given.items()}


def _is_view(given: Mapping[str, Any], result: Any) -> bool:
    """Whether a call made no new memory."""
    held = {_memory(t) for t in pytree.tree_leaves(list(given.values())) if isinstance(t, torch.Tensor)}
    made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return all(_memory(t) in held for t in made)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""Measured latency: how long a model takes on a device, for any widths of its groups.

Every distinct op call is timed alone at a grid of widths (`table`), on tensors like those it gets in the model
(`calls`, `clock`); times are kept on disk (`store`). One watched run of the original (`observe`) says what each call
takes in its place, by which its table is scaled, and what the model takes that no op accounts for.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from graphprune.cost import Costs
from graphprune.cost.polynomial import symbolic
from graphprune.couple import exported
from graphprune.coupling import Coupling
from graphprune.errors import InputError, TraceError
from graphprune.latency.calls import Measure, OpCall, Operand
from graphprune.latency.clock import Stopwatch, medians
from graphprune.latency.observe import Observed, observe
from graphprune.latency.prediction import Part, Prediction
from graphprune.latency.store import Store, file_of, identity
from graphprune.latency.table import LEVELS, Level, Table, block, build, build_along, steps_of
from graphprune.latency.terms import Term, terms
from graphprune.trace import Inputs, untouched

__all__ = ["Latency", "Measure", "OpCall", "Operand", "Prediction", "Predictor"]

Predictor: TypeAlias = Callable[[nn.Module, Any, Coupling], Costs]
"""Takes a model, its example inputs and its coupling; gives the time at any widths, such as a `Latency` does."""

SETUP = 3e-3
"""Seconds that a measurement takes besides the calls it times."""
RUNS = 8
"""Calls per measurement."""
SMALLEST = 0.0625
"""The least fraction of channels at which a call is timed, where all groups keep the same."""
SAVED = 5.0
"""Seconds after which what was measured is written again."""
SMALLER = 0.4
"""What calls on the grid take on average, relative to the call of the original."""
DOUBT = 3.0
"""The most by which a run of the whole model is believed about a call against the call alone."""


@dataclass(frozen=True)
class Latency:
    """How time is measured: `Latency()(model, inputs, coupling)` predicts a model's time at any widths.

    Args:
        seconds: how long may be measured, about; what is known already takes no time.
        cache: folder for what was measured; by default one in the user's cache folder. False keeps nothing.
        device: where the model is to run; by default where it is.
        measure: times one call in place of this device, such as a table of another device. The model is then run once,
            to see its calls, and not timed.
        progress: show a progress bar; by default only in a terminal.
    Raises:
        InputError: `seconds` is no number of seconds.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
        >>> x = torch.randn(8, 64)
        >>> predicted = gp.Latency(cache=False)(net, x, gp.couple(gp.trace(net, x)))
        >>> predicted.at({"0": 64}) <= predicted.at({})  # nanoseconds
        True
    """

    seconds: float = 60.0
    cache: str | os.PathLike[str] | bool | None = None
    device: str | torch.device | None = None
    measure: Measure | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds >= 0:
            raise InputError(f"seconds={self.seconds!r}: how long may be measured, such as 20")

    def __call__(self, model: nn.Module, example_inputs: Any, coupling: Coupling) -> Prediction:
        """Measure.

        Args:
            model: the original; it is left as it was.
            example_inputs: those it was traced with.
            coupling: of that trace.
        Raises:
            InputError: the device is not there, the model holds no values, or the cache cannot be written to.
            CalibrationError, TraceError: the model does not run as it was traced.
        """
        device = self._device(model)
        store = self._store(device)
        model, inputs = _moved(model, Inputs.of(example_inputs), device)
        observed, coupling = self._observed(model, inputs, coupling, device)
        every = terms(coupling, observed.calls)
        first: dict[str, Term] = {}
        for term in every:
            first.setdefault(term.key, term)
        try:
            tables = self._tables(first, store, block(device))
        finally:
            store.write()
        known = [(term, *tables[term.key]) for term in every]
        varying = {term.node for term in every}
        modules = {n.name: n.module for n in coupling.program.nodes if n.name in observed.calls.keys() - varying}
        if self.measure is None:
            return _calibrated(known, modules, observed, coupling)
        fixed = _summed((module, store(observed.calls[node])) for node, module in modules.items())
        parts = _merged(_parts(known), coupling)
        return Prediction(parts, sum(fixed.values()), fixed, coupling.axes, coupling.atoms)

    def _observed(
        self, model: nn.Module, inputs: Inputs, coupling: Coupling, device: torch.device
    ) -> tuple[Observed, Coupling]:
        """A run, and the coupling of the program that was run: exported, where the model's code runs as no record says.

        Raises:
            CalibrationError, TraceError: it does not run as it was exported either.
        """
        timed = self.measure is None
        try:
            return observe(model, inputs, coupling.program, device, timed=timed), coupling
        except TraceError:
            again = exported(coupling, model, inputs)
            again = replace(again, atoms={name: again.atoms[name] for name in coupling.atoms})
            return observe(model, inputs, again.program, device, timed=timed), again

    def compare(self, model: nn.Module, small: nn.Module, example_inputs: Any) -> tuple[float, float] | None:
        """Nanoseconds that two models take, measured in turn; None where calls are not timed on this device."""
        if self.measure is not None:
            return None
        device = self._device(model)
        model, inputs = _moved(model, Inputs.of(example_inputs), device)
        small, _ = _moved(small, inputs, device)
        with untouched(model), untouched(small), torch.no_grad():
            before, after = medians([partial(inputs.call, model), partial(inputs.call, small)], device, seconds=4.0)
        return 1e9 * before, 1e9 * after

    def _device(self, model: nn.Module) -> torch.device:
        """Where the model is to run.

        Raises:
            InputError: it cannot run there.
        """
        own = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        if own.type == "meta":
            raise InputError("the model is on the meta device and cannot be timed; load weights first")
        try:
            device = torch.zeros(1, device=own if self.device is None else self.device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"device={self.device!r} cannot be timed, it is not there: {first}") from error
        if device.type == "meta":
            raise InputError(
                "device='meta' computes nothing that could be timed; name the device the model will run on"
            )
        return device

    def _store(self, device: torch.device) -> Store:
        if self.measure is not None:
            return Store(self.measure, None, {})
        known = identity(device)
        path = None if self.cache is False else file_of(None if self.cache is True else self.cache, known)
        return Store(Stopwatch(device), path, known)

    def _tables(self, found: dict[str, Term], store: Store, step: int) -> dict[str, tuple[Table, bool]]:
        """A table per kind of call, each as fine as the time that is left allows."""
        once = {key: store(term.call) for key, term in found.items()}
        left = sum(once.values()) + SETUP * len(once)
        ends = written = time.perf_counter()
        ends += self.seconds
        tables = {}
        hidden = None if self.progress is None else not self.progress
        for key, term in tqdm(found.items(), desc="timing", unit="op", disable=hidden):
            share = (once[key] + SETUP) / left
            left -= once[key] + SETUP
            tables[key] = _table(term, store, step, max(0.0, ends - time.perf_counter()) * share)
            if time.perf_counter() - written > SAVED:
                store.write()
                written = time.perf_counter()
        return tables


def _table(term: Term, store: Store, step: int, seconds: float) -> tuple[Table, bool]:
    """The finest table that takes no more than some seconds to measure, and whether it is one over all variables."""

    def grid(level: Level, measure: Measure) -> Table:
        blocks = steps_of(lambda p: store(term.at(p)), term.variables, step)
        return build(lambda p: measure(term.at(p)), [v.size for v in term.variables], blocks, level)

    def ray(level: Level, measure: Measure) -> Table:
        points = [term.along(max(fraction, SMALLEST)) for fraction in level.fractions]
        return build_along([(amount, measure(call)) for amount, call in points])

    if term.variables:
        try:
            return _finest(grid, store, store(term.call), seconds), True
        except RuntimeError:  # its sizes depend on each other in a way that its axes do not show: all shrink at once
            pass
    return _finest(ray, store, store(term.call), seconds), False


def _finest(make: Callable[[Level, Measure], Table], store: Store, once: float, seconds: float) -> Table:
    """The table at the finest level that what is not known yet leaves time for; at the coarsest if none does."""
    for level in LEVELS[:-1]:
        new: dict[str, OpCall] = {}

        def planned(call: OpCall, new: dict[str, OpCall] = new) -> float:
            if call not in store:
                new[call.key] = call
            return 1.0

        make(level, planned)
        if len(new) * (once * SMALLER * RUNS + SETUP) <= seconds:
            return make(level, store)
    return make(LEVELS[-1], store)


def _parts(known: Sequence[tuple[Term, Table, bool]]) -> list[Part]:
    return [
        Part(table, term.variables if grid else (term.amount,), ((term.module, 1.0),), term.several and not grid)
        for term, table, grid in known
    ]


def _summed(found: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, amount in found:
        sums[name] = sums.get(name, 0.0) + amount
    return sums


def _calibrated(
    known: Sequence[tuple[Term, Table, bool]], fixed: Mapping[str, str], observed: Observed, coupling: Coupling
) -> Prediction:
    """The tables, scaled to what the calls take in the model, and what the model takes besides.

    Args:
        known: per call whose time depends on widths, its table.
        fixed: per other call, the path of its module.
        observed: the run.
        coupling: of the program that was run.
    """
    parts = _parts(known)
    alone = Prediction(parts, 0.0, {}, coupling.axes, coupling.atoms).seconds()
    inside = np.array([observed.seconds[term.node] for term, _, _ in known])
    watched = max(0.0, float(np.median(inside - alone))) if len(inside) else 0.0  # of each call, at any width
    inside = np.clip(inside - watched, alone / DOUBT, alone * DOUBT)
    inside *= min(1.0, observed.total / inside.sum()) if len(inside) else 1.0
    parts = [
        replace(part, calls=tuple((module, float(w)) for module, _ in part.calls))
        for part, w in zip(parts, inside / alone, strict=True)
    ]
    constant = observed.total - float(inside.sum())
    others = _summed((module, max(0.0, observed.seconds[node] - watched)) for node, module in fixed.items())
    scale = min(1.0, constant / (sum(others.values()) or 1.0))
    others = {module: scale * seconds for module, seconds in others.items()}
    return Prediction(_merged(parts, coupling), constant, others, coupling.axes, coupling.atoms)


def _merged(parts: Sequence[Part], coupling: Coupling) -> tuple[Part, ...]:
    """One part for those that take the same time at all widths."""
    expression = symbolic(coupling.axes, list(coupling.atoms.values()))
    same: dict[Any, Part] = {}
    for part in parts:
        products = tuple(tuple(tuple(map(expression, p)) for p in v.products) for v in part.variables)
        key = id(part.table), products, part.together
        first = same.get(key)
        same[key] = part if first is None else replace(first, calls=first.calls + part.calls)
    return tuple(same.values())


def _moved(model: nn.Module, inputs: Inputs, device: torch.device) -> tuple[nn.Module, Inputs]:
    """The model and its inputs on a device; copies, unless they are there."""
    if any(t.device != device for t in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).to(device)
    return model, inputs.map(lambda tensor: tensor.to(device))

"""Recurrent layers and cells: gates stacked in one dim, and states that all layers and directions share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphprune.axes import Atom, Axis, Prod
from graphprune.program import Value
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, table

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_CARRIED = {"lstm": 1, "gru": 0}
"""Which initial state a unit without weights carries on (halved at each step); the others forget it at once."""


@dataclass(frozen=True)
class _Weights:
    """The weights of one layer in one direction; `project` maps the cell's output to the state that is fed back."""

    enter: Value
    recur: Value
    biases: tuple[Value, ...]
    project: Value | None = None


@dataclass(frozen=True)
class _Flow:
    """An axis, and whether its removed positions hold zeros."""

    axis: Axis
    zero: bool


@dataclass(frozen=True)
class _Cell:
    """What all layers and directions have in common.

    Attributes:
        gates: how many rows of the weights belong to a unit.
        hidden: axis of the units.
        state: axis of the state that is fed back: `hidden`, unless it is projected.
        starts: per initial state, whether its removed positions hold zeros.
        carried: whether what a unit without weights carries on is zero.
        times: axes of the steps and the batch, for the multiply-adds.
    """

    gates: Axis
    hidden: Axis
    state: Axis
    starts: tuple[bool, ...]
    carried: bool
    times: tuple[Axis, ...]

    def step(self, call: Call, entering: _Flow, weights: _Weights) -> tuple[bool, bool]:
        """Tie one layer in one direction; whether its output and its inner state are zero where units are removed."""
        rows = Prod(self.gates, self.hidden)
        stacked = (weights.enter, weights.recur, *weights.biases)
        for value in stacked:
            call.axes.unify(call.dims(value)[0], rows, call.node)
        call.unify(call.dims(weights.enter)[1], entering.axis)
        call.unify(call.dims(weights.recur)[1], self.state)
        inner = self.carried and all(call.zeros(value)[0] for value in stacked)
        outer = inner
        for read in (entering.axis, self.state):
            call.multiply((*self.times, rows), (read,))
        if weights.project is not None:
            state, hidden = call.dims(weights.project)
            call.unify(state, self.state)
            call.unify(hidden, self.hidden)
            call.multiply((*self.times, self.state), (self.hidden,))
            outer = call.zeros(weights.project)[0]
            _summed(call, self.hidden, inner or call.zeros(weights.project)[1])
        _summed(call, entering.axis, entering.zero or call.zeros(weights.enter)[1])
        _summed(call, self.state, (self.starts[0] and outer) or call.zeros(weights.recur)[1])
        return outer, inner


def _summed(call: Call, axis: Axis, zero: bool) -> None:
    if not zero:
        call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")


def _cell(call: Call, kind: str, states: Sequence[Value], times: tuple[Axis, ...]) -> _Cell:
    starts = tuple(call.zeros(value)[-1] for value in states)
    hidden, state = call.dims(states[-1])[-1], call.dims(states[0])[-1]
    if states[0].shape[-1] == states[-1].shape[-1]:
        state = call.unify(state, hidden)
    else:
        reason = f"{call.node.op} tells a projected state from the cell's by their sizes"
        call.differ(state, hidden, reason)
    carried = kind not in _CARRIED or starts[_CARRIED[kind]]
    gates = call.pinned(_GATES[kind], f"{call.node.op} stacks its gates in it")
    return _Cell(gates, hidden, state, starts, carried, times)


def _layers(call: Call, projected: bool) -> Iterator[list[_Weights]]:
    """Per layer, the weights of each direction."""
    biases = 2 if call["has_biases"] else 0
    each, directions = 2 + biases + projected, 2 if call["bidirectional"] else 1
    params = list(call["params"])
    cells = [
        _Weights(p[0], p[1], tuple(p[2 : 2 + biases]), p[-1] if projected else None)
        for p in (params[i : i + each] for i in range(0, len(params), each))
    ]
    for i in range(0, len(cells), directions):
        yield cells[i : i + directions]


@function("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> Sequence[Dims]:
    """A stack of layers over a sequence, or over a packed one (`data` and `batch_sizes`).

    The states of all layers and directions lie in one tensor, so they all have one hidden axis.
    """
    kind = call.node.op
    states: list[Value] = list(call["hx"]) if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    batch = call.dims(states[0])[1]
    if call.has("batch_sizes"):
        call.pin(dims[0], f"{kind} packs steps and sequences in it")
        call.pin(batch, f"{kind} takes its sequences in order of length")
        call.pin(call.dims(call["batch_sizes"])[0], f"{kind} goes through it step by step")
    else:
        steps, sequences = (1, 0) if call["batch_first"] else (0, 1)
        call.pin(dims[steps], f"{kind} goes through it step by step")
        batch = call.unify(batch, dims[sequences])
    for value in states:
        call.pin(call.dims(value)[0], f"{kind} lists its layers and directions in it")
        call.unify(call.dims(value)[1], batch)
    cell = _cell(call, kind, states, dims[:-1])
    cell, zero = _cell(call, kind, states, dims[:-1]), [True, True]
    entering = _Flow(dims[-1], zeros[-1])
    for layer in _layers(call, projected=states[0].shape[-1] != states[-1].shape[-1]):
        found = [cell.step(call, entering, weights) for weights in layer]
        width = Prod(call.pinned(len(layer), f"{kind} joins its directions in it"), cell.state)
        entering = _Flow(width, all(outer for outer, _ in found))
        zero = [z and all(flags) for z, flags in zip(zero, zip(*found, strict=True), strict=True)]
    final = [(value, axis, z) for value, axis, z in zip(states, (cell.state, cell.hidden), zero, strict=False)]
    call.zero = [(*(False for _ in dims[:-1]), entering.zero), *((False, False, z) for _, _, z in final)]
    return [(*dims[:-1], entering.axis), *((*call.dims(value)[:2], axis) for value, axis, _ in final)]


@function("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call) -> Sequence[Dims]:
    """One step of one layer."""
    kind = call.node.op.removesuffix("_cell")
    states: list[Value] = list(call["hx"]) if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    batch = dims[:-1]
    for value in states:
        for a, b in zip(batch, call.dims(value), strict=False):
            call.unify(a, b)
    biases = tuple(v for v in (call["b_ih"], call["b_hh"]) if v is not None)
    made = _cell(call, kind, states, batch or (Atom(1),))
    outer, inner = made.step(call, _Flow(dims[-1], zeros[-1]), _Weights(call["w_ih"], call["w_hh"], biases))
    call.zero = [(*(False for _ in batch), zero) for zero in (outer, inner)][: len(states)]
    return [(*batch, made.hidden) for _ in states]


RECURRENT = table(module=globals())

"""What can shift the output of a layer: its bias, or the running mean of the batch norm behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from graphprune.calibrate import Consumer, layers
from graphprune.program import Node, Program, Value


class Shift(NamedTuple):
    """A tensor of the state that moves a layer's output, and with which sign."""

    name: str
    sign: int


def shifts(program: Program) -> dict[str, Shift]:
    """Per weight of a layer: a tensor that moves the output of each of its calls, and nothing else."""
    found: dict[str, list[tuple[Value | None, Node]]] = {}
    for layer in layers(program):
        found.setdefault(layer.weight, []).append(_shift(layer, program.readers, program.outputs))
    out = {}
    for weight, calls in found.items():
        tensor, nodes = calls[0][0], {node for _, node in calls}
        if tensor is not None and all(t is tensor for t, _ in calls) and set(program.readers[tensor]) == nodes:
            out[weight] = Shift(tensor.target, 1 if tensor.kind == "parameter" else -1)
    return out


def _shift(
    layer: Consumer, readers: Mapping[Value, Sequence[Node]], shown: Sequence[Value]
) -> tuple[Value | None, Node]:
    """What moves the output of one call, and the node that reads it."""
    if layer.bias:
        bias: Value = next(v for v in layer.node.values() if v.target == layer.bias)
        return bias, layer.node
    output = layer.node.outputs[0]
    after = readers.get(output, ())
    if len(after) != 1 or output in shown:
        return None, layer.node
    mean = after[0].arguments.get("running_mean")
    fits = after[0].op == "batch_norm" and not after[0].arguments.get("training")
    return (mean if fits and isinstance(mean, Value) and mean.kind == "buffer" else None), after[0]

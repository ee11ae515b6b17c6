"""What can shift the output of a layer: its bias, or the running mean of the batch norm behind it."""

from __future__ import annotations

from typing import NamedTuple

from graphprune.calibrate import layers
from graphprune.program import Node, Program, Value


class Shift(NamedTuple):
    """A tensor of the state that moves a layer's output, and with which sign."""

    name: str
    sign: int


def shifts(program: Program) -> dict[str, Shift]:
    """Per weight of a layer; layers that are called more than once need a bias of their own for it."""
    readers: dict[Value, list[Node]] = {}
    for node in program.nodes:
        for value in node.values():
            readers.setdefault(value, []).append(node)
    shown = set(program.outputs)
    found: dict[str, Shift | None] = {}
    for layer in layers(program):
        output = layer.node.outputs[0]
        after = readers.get(output, [])
        shift = Shift(layer.bias, 1) if layer.bias else None
        if shift is None and len(after) == 1 and output not in shown and (mean := _running_mean(after[0])):
            shift = Shift(mean, -1)
        found[layer.weight] = (
            shift if found.get(layer.weight, shift) == shift and _alone(shift, layer.weight, found) else None
        )
    return {weight: shift for weight, shift in found.items() if shift is not None}


def _alone(shift: Shift | None, weight: str, found: dict[str, Shift | None]) -> bool:
    """Whether no other layer shares the tensor."""
    return all(other != shift or name == weight for name, other in found.items())


def _running_mean(node: Node) -> str:
    mean = node.arguments.get("running_mean")
    fits = node.op == "batch_norm" and not node.arguments.get("training")
    return mean.target if fits and isinstance(mean, Value) and mean.kind == "buffer" else ""

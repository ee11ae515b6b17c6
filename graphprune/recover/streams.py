"""Layers whose output is added to a stream: what the stream lacks there can be put into the layer's output."""

from __future__ import annotations

from typing import NamedTuple

from graphprune.calibrate import layers
from graphprune.program import Node, Program, Value


class Branch(NamedTuple):
    """What a layer's output meets, perhaps behind a batch norm.

    Attributes:
        stream: the value it is added to, of the same shape.
        scale, variance: fully qualified names of what the batch norm multiplies by and divides by; empty for none.
        eps: what is added to the variance.
    """

    stream: Value
    scale: str
    variance: str
    eps: float


def branches(program: Program) -> dict[str, Branch]:
    """Per weight of a layer."""
    readers = program.readers
    found: dict[str, Branch] = {}
    node: Node | None
    for layer in layers(program):
        output, names = layer.node.outputs[0], ("", "", 0.0)
        node = _only(readers.get(output, []))
        if node is not None and node.op == "batch_norm" and not node.arguments.get("training"):
            scale, variance = node.arguments.get("weight"), node.arguments.get("running_var")
            if not isinstance(scale, Value) or not isinstance(variance, Value):
                continue
            names = scale.target, variance.target, float(node.arguments["eps"])
            output = node.outputs[0]
            node = _only(readers.get(output, []))
        if node is None or node.op not in ("add", "add_") or node.arguments.get("alpha", 1) != 1:
            continue
        others = [v for v in node.values() if v is not output]
        if len(others) == 1 and others[0].shape == output.shape and others[0].kind in ("node", "input"):
            found[layer.weight] = Branch(others[0], *names)
    return found


def _only(nodes: list[Node]) -> Node | None:
    return nodes[0] if len(nodes) == 1 else None

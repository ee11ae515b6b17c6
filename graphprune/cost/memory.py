"""How much memory a run needs: weights, and the activations that are alive at once where that is most."""

from __future__ import annotations

from graphprune.program import MAYBE_VIEWS, Program, Value

SHARING = MAYBE_VIEWS - {"contiguous", "to"} | {"dropout"}
"""Ops whose outputs are taken to share the memory of their first operand in eval mode, as in-place ops' do."""


def lives(program: Program) -> dict[Value, tuple[int, int]]:
    """Per activation of a run in eval mode, the first and the last op during which it is in memory.

    It lives from the op that makes it, or the start for an input, to the last that reads it or a view of it.
    """
    root: dict[Value, Value] = {}
    born: dict[Value, int] = dict.fromkeys(program.inputs, 0)
    last: dict[Value, int] = {}
    for k, node in enumerate(program.nodes):
        operands = [v for v in node.values() if v.kind in ("node", "input")]
        last |= {root.get(v, v): k for v in operands}
        for output in node.outputs:
            if operands and (node.op in SHARING or node.in_place):
                root[output] = root.get(operands[0], operands[0])
            else:
                born[output] = last[output] = k
    last |= {root.get(v, v): len(program.nodes) for v in program.outputs if root.get(v, v) in born}
    return {v: (first, last.get(v, first)) for v, first in born.items()}

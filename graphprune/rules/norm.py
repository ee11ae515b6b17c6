"""Normalisation: what takes statistics over an axis makes removing from that axis inexact."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.program import Node, Value
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule

_PER_CHANNEL = "b c *s, c?, c?, c?, c? -> b c *s"
_STORED = rule(_PER_CHANNEL, zero="a*b? + c + d*b?")
_OF_BATCH = rule(_PER_CHANNEL, zero="a*b? + c", statistics="b *s")
_OF_MAP = rule(_PER_CHANNEL, zero="a*b? + c", statistics="*s")


@function("batch_norm")
def batch_norm(call: Call) -> Sequence[Dims]:
    """Stored statistics are per channel; those of the batch are taken over everything else."""
    return (_OF_BATCH if call["training"] else _STORED)(call)


@function("instance_norm")
def instance_norm(call: Call) -> Sequence[Dims]:
    """Like batch_norm, with the statistics of each map on its own."""
    return (_OF_MAP if call["use_input_stats"] else _STORED)(call)


@function("_weight_norm")
def weight_norm(call: Call) -> Sequence[Dims]:
    """`v` scaled to the norm `g` over all dims but one: zeros add nothing to a norm, but a row of zeros has none."""
    v, g, dim = call["v"], call["g"], call["dim"]
    dims, zeros, flags = list(call.dims(v)), call.zeros(v), []
    for d, axis in enumerate(dims):
        if d == dim:
            dims[d] = call.unify(axis, call.dims(g)[d])
            if zeros[d]:
                call.pin(axis, "_weight_norm is not finite where its direction is zero")
        elif not zeros[d]:
            call.pin(axis, "_weight_norm sums over it, and its removed channels are not zero there")
        flags.append(call.zeros(g)[d] if d == dim else zeros[d])
        call.tie((0, d), *([(1, d)] if d == dim else []), (2, d))
    call.zero = [tuple(flags)]
    return [tuple(dims)]


def left(node: Node) -> tuple[Value, int] | None:
    """The operand of a node, and the dim of it, that must not be zeroed where channels are removed.

    The direction of a weight norm is such: its scale makes the result zero, and without a norm there is none.
    """
    value = node.arguments.get("v")
    if node.op != "_weight_norm" or not isinstance(value, Value) or node.arguments["dim"] < 0:
        return None
    return value, node.arguments["dim"]


NORM = table(
    op(
        "layer_norm rms_norm",
        "*b *n, *n?, *n? -> *b *n",
        n="normalized_shape",
        statistics="*n",
        zero="a*b? + c",
    ),
    op(
        "group_norm",
        "b (g c) *s, (g c)?, (g c)? -> b (g c) *s",
        g="num_groups",
        statistics="c *s",
        zero="a*b? + c",
    ),
    module=globals(),
)

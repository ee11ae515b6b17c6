"""Normalisation: what takes statistics over an axis makes removing from that axis inexact."""

from __future__ import annotations

from collections.abc import Sequence

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

"""Pooling, interpolation and patches: channels pass through, positions in space stay whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule

_IN = {1: "x!", 2: "x! y!", 3: "x! y! z!"}
_OUT = {1: "u!", 2: "u! v!", 3: "u! v! w!"}


def _ops(names: str, n: int) -> str:
    return " ".join(name.format(n=n) for name in names.split())


_POOL = "max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d reflection_pad{n}d replication_pad{n}d"
_POOL_WITH_INDEX = "adaptive_max_pool{n}d max_pool{n}d_with_indices"
_RESIZE = {1: "linear", 2: "bilinear bicubic", 3: "trilinear"}


def _resize(n: int) -> str:
    smooth = [f"{kind}{n}d" for kind in _RESIZE[n].split()]
    nearest = [f"nearest{n}d", f"nearest_exact{n}d"]
    return " ".join(
        [f"upsample_{k}" for k in (*smooth, nearest[0])]
        + [f"_upsample_{k}_aa" for k in smooth if n == 2]
        + [f"_upsample_{nearest[1]}"]
    )


_FOLD = rule("*b (c k!) l! -> *b c x! y!", zero="a")


@function("col2im")
def fold(call: Call) -> Sequence[Dims]:
    """Patches back to an image; the taps of a patch vary faster than its channel."""
    return _FOLD(call, k=math.prod(call["kernel_size"]))


SPACE = table(
    *(op(_ops(_POOL, n), f"*b {_IN[n]} -> *b {_OUT[n]}", zero="a") for n in _IN),
    *(op(_ops(_POOL_WITH_INDEX, n), f"*b {_IN[n]} -> *b {_OUT[n]}, *b {_OUT[n]}", zero="a") for n in _IN),
    *(op(_resize(n), f"*b {_IN[n]} -> *b {_OUT[n]}", zero="a") for n in _IN),
    op("grid_sampler", "b c *x!, b *u! k! -> b c *u!", zero="a"),
    op("pixel_shuffle", "*b (c r! s!) x! y! -> *b c u! v!", r="upscale_factor", s="upscale_factor", zero="a"),
    op("pixel_unshuffle", "*b c x! y! -> *b (c r! s!) u! v!", r="downscale_factor", s="downscale_factor", zero="a"),
    op("channel_shuffle native_channel_shuffle", "b (g c) *s -> b (c g) *s", g="groups", zero="a"),
    op("max_unpool2d", "*b x! y!, *b x! y! -> *b u! v!", zero="a"),
    op("max_unpool3d", "*b x! y! z!, *b x! y! z! -> *b u! v! w!", zero="a"),
    op("fractional_max_pool2d", "b c x! y!, b c k! -> b c u! v!, b c u! v!", zero="a"),
    op("fractional_max_pool3d", "b c x! y! z!, b c k! -> b c u! v! w!, b c u! v! w!", zero="a"),
    op("view_as_complex", "*b k! -> *b", zero="a"),
    op("view_as_real", "*b -> *b k!", zero="a"),
    op("im2col", "*b c x! y! -> *b (c k!) l!", zero="a"),
    module=globals(),
)

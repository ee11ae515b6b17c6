"""The ops of torchvision: channels pass through, boxes and positions stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Atom, Prod
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule
from graphprune.rules.whole import whole

_DEFORMED = rule(
    "b (g i) x! y!, (g o) i u! v!, b s! p! q!, b *m!, (g o) -> b (g o) p! q!",
    macs="b g i o u v p q",
    zero="a*b + e",
    g="groups",
)


@function("torchvision.deform_conv2d")
def deform_conv2d(call: Call) -> Sequence[Dims]:
    """A convolution whose taps move; runs of input channels share their offsets."""
    runs, channels = call["offset_groups"], call.dims(call["input"])[1]
    if runs > 1:
        run = Atom(channels.size // runs)
        call.axes.unify(
            channels, Prod(call.pinned(runs, "each run of channels has offsets of its own"), run), call.node
        )
    return _DEFORMED(call)


VISION = table(
    op("torchvision.roi_align", "b! c x! y!, k! j! -> k! c u! v!", zero="a"),
    op("torchvision.nms", whole("{op} compares all boxes")),
    module=globals(),
)

"""Blocks over a map of 4 x 4: convolutions and what stands between them in published networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

SIDE = 4
"""Height and width of every map."""


class Block(nn.Module):
    """A part of a network; `out` is the width after it."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out


class Row(nn.Sequential):
    def __init__(self, out: int, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.out = out


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def groups_of(width: int) -> int:
    return 2 if width % 2 == 0 else 1


class Residual(Block):
    """The branch added to what went in; in training whole branches are dropped, in eval mode none."""

    def __init__(self, width: int, *branch: nn.Module, scaled: bool = False, drop: float = 0.0) -> None:
        super().__init__(width)
        self.branch, self.drop = nn.Sequential(*branch), drop
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1e-6)) if scaled else None

    def forward(self, x):
        y = self.branch(x)
        if self.scale is not None:
            y = y * self.scale
        if self.drop and self.training:
            y = y * torch.empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop).to(y) / (1 - self.drop)
        return F.relu(x + y)


class Shared(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.conv = conv(width, width)

    def forward(self, x):
        return self.conv(F.silu(self.conv(x)))


class Concat(Block):
    """Branches side by side, or beside what went in."""

    def __init__(self, width: int, factor: int, dense: bool = False) -> None:
        super().__init__(2 * factor + 2 + (width if dense else 0))
        self.branches, self.dense = nn.ModuleList([conv(width, factor, 1), conv(width, factor + 2)]), dense

    def forward(self, x):
        return torch.cat([x] * self.dense + [F.gelu(branch(x)) for branch in self.branches], dim=1)


class CatGrouped(Block):
    """Branches of 2f and f channels side by side, under a convolution whose three groups do not know of them."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(6)
        self.wide, self.narrow = conv(width, 2 * factor, 1), conv(width, factor)
        self.merge = conv(3 * factor, 6, groups=3)

    def forward(self, x):
        return self.merge(torch.cat([F.relu(self.wide(x)), torch.sigmoid(self.narrow(x))], dim=1))


class Split(Block):
    """The later half of the channels depends on the earlier, as in a ghost module."""

    def __init__(self, width: int, factor: int) -> None:
        half = (width + width % 2) // 2
        super().__init__(half + factor)
        self.odd = width % 2
        self.first, self.second = conv(width + width % 2, half, 1), conv(half, factor, 1)

    def forward(self, x):
        first = self.first(F.pad(x, (0, 0, 0, 0, 0, self.odd)))
        return torch.cat([first, self.second(first)], dim=1)


class Unequal(Block):
    """Chunks of f + 1 and f channels, each with a convolution of its own."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.enter = conv(width, 2 * factor + 1, 1)
        self.left, self.right = conv(factor + 1, factor), conv(factor, factor)

    def forward(self, x):
        a, b = self.enter(x).chunk(2, dim=1)
        return torch.cat([self.left(a), self.right(F.elu(b))], dim=1)


class C2f(Block):
    """YOLOv8's block: half of the channels pass, the rest go through bottlenecks, and all are concatenated."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(factor + 2)
        self.enter = conv(width, 2 * factor, 1)
        self.inner = nn.ModuleList(Residual(factor, conv(factor, factor)) for _ in range(2))
        self.leave = conv(4 * factor, factor + 2, 1)

    def forward(self, x):
        y = list(self.enter(x).chunk(2, 1))
        y.extend(part(y[-1]) for part in self.inner)
        return self.leave(torch.cat(y, 1))


class Gate(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.gate = nn.Sequential(conv(width, factor, 1), nn.ReLU(), conv(factor, width, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True))


class SqueezeExcite(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.pool, self.fc = (
            nn.AdaptiveAvgPool2d(1),
            nn.Sequential(nn.Linear(width, factor + 1), nn.ReLU(inplace=True), nn.Linear(factor + 1, width)),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * F.hardsigmoid(self.fc(self.pool(x).view(b, c))).view(b, c, 1, 1)


class SelectiveKernel(Block):
    """Two branches, weighted by a softmax over the branches for every channel."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.branches = nn.ModuleList([conv(width, 2 * factor), conv(width, 2 * factor, 1)])
        self.squeeze, self.excite = nn.Linear(2 * factor, factor + 1), nn.Linear(factor + 1, 2 * 2 * factor)

    def forward(self, x):
        maps = torch.stack([branch(x) for branch in self.branches], dim=1)
        b, n, c, _, _ = maps.shape
        weights = self.excite(F.relu(self.squeeze(maps.sum(1).mean((2, 3))))).view(b, n, c, 1, 1).softmax(1)
        return (maps * weights).sum(1)


class Shuffle(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.groups = groups_of(width)

    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Pad(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width + 2 * factor)
        self.added = factor

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.added, self.added))


class LayerNorm2d(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Unfold(Block):
    """A convolution written as unfold and a matrix product."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.mix = nn.Linear(9 * width, 2 * factor)

    def forward(self, x):
        return self.mix(F.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2).unflatten(2, (SIDE, SIDE))


class Fold(Block):
    """Patches made by a 1 x 1 convolution and laid over each other."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(factor + 1)
        self.mix = conv(width, 9 * (factor + 1), 1)

    def forward(self, x):
        return F.fold(self.mix(x).flatten(2), (SIDE, SIDE), 3, padding=1)


class Involution(Block):
    """Every place has a kernel of its own, shared by all channels of a group."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.groups = groups_of(width)
        self.kernel = nn.Sequential(conv(width, factor + 1, 1), nn.ReLU(), conv(factor + 1, 9 * self.groups, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        kernel = self.kernel(x).view(b, self.groups, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(b, self.groups, c // self.groups, 9, h, w)
        return (patches * kernel).sum(3).view(b, c, h, w)


class Resize(Block):
    """Down by pooling or antialiased interpolation, a convolution, up again."""

    def __init__(self, width: int, factor: int, mode: str, antialias: bool = False) -> None:
        super().__init__(2 * factor)
        self.conv, self.mode, self.antialias = conv(width, 2 * factor), mode, antialias

    def forward(self, x):
        if self.antialias:
            small = F.interpolate(x, size=(2, 2), mode=self.mode, antialias=True)
        else:
            small = F.max_pool2d(x, 2)
        return F.interpolate(self.conv(small), scale_factor=2, mode=self.mode)


class Standardised(Block):
    """A convolution whose weights are standardised by a batch norm in training mode, as in timm."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.conv, self.gain = conv(width, 2 * factor), nn.Parameter(torch.ones(2 * factor))

    def forward(self, x):
        w = self.conv.weight
        flat = F.batch_norm(w.reshape(1, len(w), -1), None, None, weight=self.gain, training=True, momentum=0.0)
        return F.conv2d(x, flat.reshape_as(w), self.conv.bias, padding=1)


class Squashed(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight)


def _parametrized(width: int, factor: int) -> nn.Module:
    layer = conv(width, 2 * factor)
    parametrize.register_parametrization(layer, "weight", Squashed())
    return layer


def _fused(width: int, factor: int) -> nn.Module:
    return fuse_conv_bn_eval(conv(width, 2 * factor).eval(), nn.BatchNorm2d(2 * factor).eval())


class Flat(Block):
    """Convolutions over the map as a line of 16, or as a volume of 4 x 2 x 2."""

    def __init__(self, width: int, factor: int, dims: int) -> None:
        super().__init__(2 * factor)
        self.dims = dims
        kind = nn.Conv1d if dims == 1 else nn.Conv3d
        self.conv = kind(width, 2 * factor, 3, padding=1)

    def forward(self, x):
        if self.dims == 1:
            return self.conv(x.flatten(2)).unflatten(2, (SIDE, SIDE))
        return self.conv(x.unflatten(3, (2, 2))).relu().flatten(3)


class Checkpointed(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(width)
        self.inner = nn.Sequential(
            conv(width, factor + 1), nn.BatchNorm2d(factor + 1), nn.ReLU(), conv(factor + 1, width)
        )

    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Uncast(Block):
    """A region in which autocasting is off, as norms and rotary embeddings are written."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.enter, self.norm = conv(width, 2 * factor), nn.InstanceNorm2d(2 * factor, affine=True)

    def forward(self, x):
        y = self.enter(x)
        with torch.autocast("cpu", enabled=False):
            return self.norm(y) * torch.sigmoid(y)


class Glu(Block):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__(factor + 1)
        self.conv = conv(width, 2 * (factor + 1))

    def forward(self, x):
        return F.glu(self.conv(x), dim=1)


class Einsum(Block):
    """A 1 x 1 convolution of a given rank, as two sums over named indices."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__(2 * factor)
        self.down = nn.Parameter(torch.randn(width, factor + 1) / width)
        self.up = nn.Parameter(torch.randn(2 * factor, factor + 1))

    def forward(self, x):
        return torch.einsum("bchw,cr,or->bohw", x, self.down, self.up)


MAPS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda w, f: Row(2 * f, conv(w, 2 * f), nn.BatchNorm2d(2 * f), nn.ReLU()),
    "residual": lambda w, f: Residual(w, conv(w, w)),
    "bottleneck": lambda w, f: Residual(w, conv(w, f + 1, 1), nn.ReLU(inplace=True), conv(f + 1, w, 1)),
    "layer scale": lambda w, f: Residual(w, conv(w, f + 1), nn.GELU(), conv(f + 1, w, 1), scaled=True),
    "stochastic depth": lambda w, f: Residual(w, conv(w, f + 1), nn.GELU(), conv(f + 1, w), drop=0.2),
    "concat": Concat,
    "dense": lambda w, f: Concat(w, f, dense=True),
    "cat grouped": CatGrouped,
    "split": Split,
    "unequal chunks": Unequal,
    "c2f": C2f,
    "grouped": lambda w, f: Row(2 * f * groups_of(w), conv(w, 2 * f * groups_of(w), groups=groups_of(w))),
    "depthwise": lambda w, f: Row(w, conv(w, w, groups=w), nn.ReLU6(), conv(w, w, 1)),
    "gate": Gate,
    "squeeze-excite": SqueezeExcite,
    "selective kernel": SelectiveKernel,
    "shuffle": Shuffle,
    "shared": Shared,
    "pad": Pad,
    "prelu": lambda w, f: Row(w, nn.PReLU(w)),
    "group norm": lambda w, f: Row(w, nn.GroupNorm(groups_of(w), w)),
    "instance norm": lambda w, f: Row(w, nn.InstanceNorm2d(w, affine=True, track_running_stats=True)),
    "layer norm 2d": LayerNorm2d,
    "transposed": lambda w, f: Row(f + 1, nn.MaxPool2d(2), nn.ConvTranspose2d(w, f + 1, 2, 2)),
    "grouped transposed": lambda w, f: Row(
        2 * f * groups_of(w), nn.ConvTranspose2d(w, 2 * f * groups_of(w), 3, padding=1, groups=groups_of(w))
    ),
    "unfold": Unfold,
    "fold": Fold,
    "involution": Involution,
    "nearest": lambda w, f: Resize(w, f, "nearest"),
    "bilinear resize": lambda w, f: Resize(w, f, "bilinear"),
    "antialias": lambda w, f: Resize(w, f, "bilinear", antialias=True),
    "pixel shuffle": lambda w, f: Row(f + 1, conv(w, 4 * (f + 1)), nn.PixelShuffle(2), nn.AvgPool2d(2)),
    "pixel unshuffle": lambda w, f: Row(f, nn.PixelUnshuffle(2), conv(4 * w, 4 * f), nn.ReLU(), nn.PixelShuffle(2)),
    "weight norm": lambda w, f: Row(2 * f, parametrizations.weight_norm(conv(w, 2 * f)), nn.ReLU()),
    "spectral norm": lambda w, f: Row(2 * f, parametrizations.spectral_norm(conv(w, 2 * f)), nn.ReLU()),
    "parametrized": lambda w, f: Row(2 * f, _parametrized(w, f), nn.ReLU()),
    "standardised weights": Standardised,
    "fused batch norm": lambda w, f: Row(2 * f, _fused(w, f), nn.ReLU()),
    "conv1d": lambda w, f: Flat(w, f, 1),
    "conv3d": lambda w, f: Flat(w, f, 3),
    "checkpoint": Checkpointed,
    "autocast off": Uncast,
    "glu": Glu,
    "einsum": Einsum,
}
"""(width, factor) to a module with the width `out`; the factor sets the inner widths."""

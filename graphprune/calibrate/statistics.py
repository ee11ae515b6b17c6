"""What one pass collects: sums over samples, so that passes add up, over batches and over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F

from graphprune.calibrate.sites import Consumer, Reader
from graphprune.errors import CalibrationError
from graphprune.solvers import ranks

UNFOLDED_LIMIT = 4608
"""Second moments of a convolution's input are taken per tap up to this many columns per group, else per channel."""
CHUNK = 1 << 26
"""Elements of an unfolded input that are held at once."""


class Statistic:
    """Sums that grow with every batch; every tensor field is such a sum."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """The sums."""
        yield from (getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor))  # type: ignore[arg-type]


@dataclass(eq=False)
class Gradients(Statistic):
    """Per-sample derivatives q of the loss with respect to a mask on the channels of a group (Group Fisher, CCP).

    `q[n, i]` is the derivative of sample n's loss by a factor 1 on channel i at all ends of the group at once.

    Attributes:
        count: samples.
        total: sum of q over samples, (channels,).
        squares: sum of q^2, (channels,).
        products: sum of q q', (channels, channels); None unless it was asked for.
    """

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor | None = None

    @classmethod
    def empty(cls, size: int, *, products: bool) -> Gradients:
        """Of no samples."""
        matrix = _zeros(size, size) if products else None
        return cls(_zeros(), _zeros(size), _zeros(size), matrix)

    def add(self, q: torch.Tensor) -> None:
        """Add the samples of one batch, (samples, channels)."""
        q = q.double().cpu()
        self.count += len(q)
        self.total += q.sum(0)
        self.squares += q.square().sum(0)
        if self.products is not None:
            self.products += q.T @ q

    @property
    def first(self) -> torch.Tensor:
        """Mean of q over samples, (channels,)."""
        return self.total / self.count

    @property
    def second(self) -> torch.Tensor:
        """Mean of q^2 over samples, (channels,)."""
        return self.squares / self.count

    @property
    def matrix(self) -> torch.Tensor:
        """Mean of q q' over samples, (channels, channels).

        Raises:
            CalibrationError: it was not collected.
        """
        if self.products is None:
            raise CalibrationError("their products were not collected; calibrate with statistics=('products',)")
        return self.products / self.count


@dataclass(eq=False)
class Activations(Statistic):
    """What the channels of a group hold at its ends.

    Attributes:
        count: elements per channel, (channels,).
        looked: as `count`; of a group that layers read only after pooling also the elements of the maps before it.
        zeros: how many of those are 0.
        magnitude: sum of absolute values.
        total: sum of values.
        squares: sum of squares.
    """

    count: torch.Tensor
    looked: torch.Tensor
    zeros: torch.Tensor
    magnitude: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> Activations:
        """Of no samples."""
        return cls(*(_zeros(size) for _ in range(6)))

    @torch.no_grad()
    def add_maps(self, reader: Reader, x: torch.Tensor) -> None:
        """Look for zeros among the elements of one value."""
        self.looked += reader.count(x)
        self.zeros += reader.sum((x == 0).float()).sum(0).double().cpu()

    def add(self, reader: Reader, x: torch.Tensor) -> None:
        """Add the elements of one value."""
        self.add_maps(reader, x)
        self.count += reader.count(x)
        for held, values in (
            (self.magnitude, x.abs()),
            (self.total, x),
            (self.squares, (x if x.dtype == torch.float64 else x.float()).square()),
        ):
            held += reader.sum(values).sum(0).double().cpu()

    @property
    def mean(self) -> torch.Tensor:
        """Mean value per channel, (channels,)."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Variance per channel, (channels,)."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


@dataclass(eq=False)
class Ranks(Statistic):
    """Matrix ranks of feature maps (HRank).

    Attributes:
        count: maps per channel.
        total: sum of their ranks, (channels,).
        largest: sum of the largest ranks they could have had, the smaller side of each map.
    """

    count: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> Ranks:
        """Of no samples."""
        return cls(_zeros(size), _zeros(size), _zeros(size))

    def add(self, maps: torch.Tensor) -> None:
        """Add maps, (maps of each channel, channels, height, width)."""
        found = ranks(maps.flatten(0, 1)).view(maps.shape[:2])
        self.count += maps.shape[0]
        self.total += found.double().sum(0).cpu()
        self.largest += maps.shape[0] * min(maps.shape[-2:])

    @property
    def mean(self) -> torch.Tensor:
        """Mean rank, (channels,)."""
        return self.total / self.count

    @property
    def normalised(self) -> torch.Tensor:
        """Mean rank as a fraction of what it could be, (channels,)."""
        return self.total / self.largest


@dataclass(eq=False)
class Moments(Statistic):
    """First and second moments of what a consumer multiplies with its weight.

    The columns are those of its weight, seen as (outputs, columns): input channels, each with the taps of a kernel
    where `taps` is more than 1.

    Attributes:
        count: rows: samples times positions.
        total: sum of the columns, (groups, columns).
        squares: sum of their squares, (groups, columns).
        products: sum of products of columns, (groups, columns, columns); None unless it was asked for.
        taps: columns per channel: the size of the kernel, or 1 if moments are of the channels alone.
    """

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor | None
    taps: int

    @classmethod
    def empty(cls, consumer: Consumer, shape: tuple[int, ...], *, products: bool) -> Moments:
        """Of no samples, for a consumer whose weight has this shape."""
        inputs, taps = shape[0 if consumer.transposed else 1], math.prod(shape[2:])
        taps = taps if inputs * taps <= UNFOLDED_LIMIT and len(shape) < 5 else 1
        g, n = consumer.groups, inputs * taps
        return cls(_zeros(), _zeros(g, n), _zeros(g, n), _zeros(g, n, n) if products else None, taps)

    def add(self, consumer: Consumer, x: torch.Tensor, kernel: tuple[int, ...]) -> None:
        """Add the input of one call; `kernel` is the size of its kernel."""
        x = _batched(consumer, x, kernel)
        if self.products is None:  # sums of columns are columns of sums
            for sums, table in ((self.total, x), (self.squares, x.square())):
                for rows in _columns(consumer, table.sum(0, keepdim=True), kernel, self.taps):
                    sums += rows.double().sum(1).cpu()
            self.count += len(x) * rows.shape[1]
            return
        for rows in _columns(consumer, x, kernel, self.taps):
            self.count += rows.shape[1]
            total, _, products = summed(rows)
            self.total += total
            self.squares += products.diagonal(dim1=1, dim2=2)
            self.products += products

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the columns, (groups, columns)."""
        return self.total / self.count

    @property
    def energy(self) -> torch.Tensor:
        """Mean of the squares of the columns, (groups, columns)."""
        return self.squares / self.count

    @property
    def second(self) -> torch.Tensor:
        """Mean of products of columns, (groups, columns, columns).

        Raises:
            CalibrationError: it was not collected.
        """
        if self.products is None:
            raise CalibrationError("second moments were not collected; calibrate with statistics=('moments',)")
        return self.products / self.count


def summed(a: torch.Tensor, b: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the rows of two tables (groups, rows, columns), and of a'b, in float64; `b` is `a` by default.

    Only what is centred is multiplied in single precision: means of activations may be large beside their spread.
    """
    tables = (a,) if b is None else (a, b)
    means = [t.mean(1, keepdim=True) for t in tables]
    centred = [t - mean for t, mean in zip(tables, means, strict=True)]
    product = (centred[0].mT @ centred[-1]).double().cpu()
    (ma, ea), (mb, eb) = ((means[k].double().cpu(), centred[k].sum(1, keepdim=True).double().cpu()) for k in (0, -1))
    count = a.shape[1]
    product += ma.mT @ eb + ea.mT @ mb + count * ma.mT @ mb
    return (count * ma + ea)[:, 0], (count * mb + eb)[:, 0], product


def columns(
    consumer: Consumer, x: torch.Tensor, kernel: tuple[int, ...], taps: int, *, samples: int = 0, most: int = 0
) -> Iterator[torch.Tensor]:
    """What a layer multiplies with its weight, (groups, rows, columns), a piece at a time.

    Args:
        consumer: the layer.
        x: its input.
        kernel: size of its kernel.
        taps: columns per channel: the size of the kernel, or 1 for the channels alone.
        samples: how many samples a piece has; by default as many as `CHUNK` allows.
        most: how many positions of a sample to use, evenly spaced; by default all of them.
    """
    return _columns(consumer, _batched(consumer, x, kernel), kernel, taps, samples=samples, most=most)


def _batched(consumer: Consumer, x: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """An input as (samples, channels, *positions), in at least float32."""
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if not consumer.node.op.startswith("conv"):
        return x.reshape(len(x), -1, x.shape[-1]).mT if x.dim() > 2 else x.reshape(-1, x.shape[-1], 1)
    return x[None] if x.dim() == len(kernel) + 1 else x


def _columns(
    consumer: Consumer, x: torch.Tensor, kernel: tuple[int, ...], taps: int, *, samples: int = 0, most: int = 0
) -> Iterator[torch.Tensor]:
    for piece in torch.split(x, samples or max(1, CHUNK // max(1, x[0].numel() * taps))):
        unfold = taps > 1 or (math.prod(kernel) == 1 and _skips(consumer))
        positions = _unfolded(consumer, piece, kernel, most) if unfold else _thinned(piece.flatten(2), most)
        split = positions.unflatten(1, (consumer.groups, -1))  # type: ignore[no-untyped-call]
        yield split.permute(1, 0, 3, 2).flatten(1, 2)


def _skips(consumer: Consumer) -> bool:
    """Whether a convolution with one tap does not read every position once."""
    given = consumer.node.arguments
    return consumer.node.op.startswith("conv") and any(
        n != usual for name, usual in (("stride", 1), ("padding", 0)) for n in _sides(given[name], 1)
    )


def _unfolded(consumer: Consumer, x: torch.Tensor, kernel: tuple[int, ...], most: int) -> torch.Tensor:
    """The input of a convolution by tap, (samples, channels * taps, positions)."""
    given = consumer.node.arguments
    stride, dilation, padding = (_sides(given[name], len(kernel)) for name in ("stride", "dilation", "padding"))
    if isinstance(padding, str):
        both = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        x, padding = F.pad(x, [n for p in reversed(both) for n in (p // 2, p - p // 2)]), (0,) * len(kernel)
    if math.prod(kernel) == 1:
        x = F.pad(x, [n for n in reversed(padding) for _ in range(2)])
        for d, step in enumerate(stride, start=2):
            x = x.index_select(d, torch.arange(0, x.shape[d], step, device=x.device))
        return _thinned(x.flatten(2), most)
    if len(kernel) == 1:
        x, kernel, stride, dilation, padding = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation), (0, *padding)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    chosen = _thinned(torch.arange(math.prod(size), device=x.device), most)
    if len(chosen) == math.prod(size):
        return F.unfold(x, kernel, dilation, padding, stride)
    x = F.pad(x, [n for p in reversed(padding) for n in (p, p)])  # few of the positions: read them alone
    down, right = (
        place * s + torch.arange(k, device=x.device)[:, None] * d
        for place, s, k, d in zip((chosen // size[1], chosen % size[1]), stride, kernel, dilation, strict=True)
    )
    return x[:, :, down[:, None], right[None]].flatten(1, 3)


def _thinned(positions: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many along the last dim, evenly spaced; all with 0."""
    return positions[..., :: math.ceil(positions.shape[-1] / most)] if most else positions


def _sides(given: Any, rank: int) -> Any:
    return given if isinstance(given, str) else tuple(given) * (rank if len(given) == 1 else 1)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)

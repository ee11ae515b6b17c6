"""How long an op takes, as a function of widths: measured on a grid, interpolated in between.

Kernels work on blocks of channels, so that times rise in steps: a width that is no whole number of blocks takes at
least as long as the next one that is. Whether an op has steps along a width is measured; where it has, the grid is of
whole blocks, and what it costs not to fill one is a factor that is measured apart, for every set of widths that do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from graphprune.axes import Axis
from graphprune.cost.polynomial import Vector

Seconds = Callable[[Sequence[int]], float]
"""How long a call takes at the values of its variables."""


@dataclass(frozen=True)
class Level:
    """How many measurements a table gets: fractions of a width on its grid, and places where a factor is measured."""

    fractions: tuple[float, ...]
    places: int


LEVELS = (
    Level((0.0, 0.125, 0.25, 0.5, 0.75, 1.0), 3),
    Level((0.0, 0.25, 0.5, 0.75, 1.0), 2),
    Level((0.0, 0.25, 0.5, 1.0), 2),
    Level((0.0, 0.5, 1.0), 1),
    Level((0.0, 1.0), 1),
)
"""From fine to coarse."""


@dataclass(frozen=True)
class Variable:
    """What a call's time depends on.

    Attributes:
        products: axes whose widths multiply; the products are added.
        size: its value in the original.
    """

    products: Sequence[Sequence[Axis]]
    size: int


@dataclass(frozen=True, eq=False)
class Table:
    """Seconds on a grid.

    Attributes:
        knots: per variable, its values on the grid, ascending.
        steps: per variable, the block; 1 where there are none.
        seconds: per set of variables that do not fill their last block (bit d for variable d), the times, shape
            (2 ** variables, knots of the first, ...); they do not fall as widths grow.
    """

    knots: tuple[Vector, ...]
    steps: tuple[int, ...]
    seconds: Vector


FEWEST = 4
"""Channels in the smallest block that can be told from none."""
MIDDLE = 8
"""Blocks up to which a step shows above the noise."""


def block(device: torch.device) -> int:
    """How many channels the kernels of a device work on at once."""
    return 16 if device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


def build(seconds: Seconds, sizes: Sequence[int], stepped: Sequence[int], level: Level) -> Table:
    """Measure a table.

    Args:
        seconds: measures.
        sizes: per variable, its size in the original.
        stepped: per variable, its block, see `steps_of`.
        level: how finely.
    """
    knots = [_knots(size, step, level) for size, step in zip(sizes, stepped, strict=True)]
    shape = [len(k) for k in knots]
    grid = np.array([seconds(point) for point in itertools.product(*knots)]).reshape(shape)
    for d in range(len(knots)):  # what is noise, and what would make fewer channels cost more
        grid = np.maximum.accumulate(grid, axis=d)
    every = [grid]
    for unfilled in range(1, 2 ** len(knots)):
        held = [bool(unfilled >> d & 1) for d in range(len(knots))]
        if any(h and step == 1 for h, step in zip(held, stepped, strict=True)):
            every.append(grid)
            continue
        every.append(grid * _factors(seconds, knots, stepped, held, grid, level.places))
    return Table(tuple(np.array(k, dtype=float) for k in knots), tuple(stepped), np.stack(every))


def build_along(points: Sequence[tuple[float, float]]) -> Table:
    """A table of one variable from values and seconds."""
    found: dict[float, float] = {}
    for value, seconds in sorted(points):
        found[value] = max(seconds, found.get(value, 0.0))
    times = np.maximum.accumulate(list(found.values()))
    return Table((np.array(list(found)),), (1,), np.stack([times, times]))


def steps_of(seconds: Seconds, variables: Sequence[Variable], step: int) -> list[int]:
    """Per variable, the block in which times rise: `step`, less where it has no more; or 1 where they rise evenly.

    One channel more than some blocks is measured against those and the next: does it take what the next does?
    """
    found = []
    for d, variable in enumerate(variables):
        each = step if variable.size > step else 2 ** int(np.log2(variable.size // 2))
        if each < FEWEST:
            found.append(1)
            continue
        point = [v.size for v in variables]
        times = []
        blocks = min(MIDDLE, max(2, variable.size // (2 * each))) * each
        for value in (blocks - each, blocks - each + 1, blocks):
            point[d] = value
            times.append(seconds(point))
        one, more, two = times
        found.append(each if more - one > (two - one) / 2 else 1)
    return found


def _knots(size: int, step: int, level: Level) -> list[int]:
    top = -(-size // step)
    return sorted({max(1, round(f * top)) * step for f in level.fractions})


def _factors(
    seconds: Seconds,
    knots: Sequence[Sequence[int]],
    stepped: Sequence[int],
    held: Sequence[bool],
    grid: Vector,
    places: int,
) -> Vector:
    """How much longer it takes when the last blocks of some variables are not full, at every knot; at least 1."""
    at = [
        sorted({round(i) for i in np.linspace(0, len(k) - 1, places)}) if places > 1 else [len(k) // 2] for k in knots
    ]
    factors = np.empty([len(a) for a in at])
    for place in itertools.product(*(range(len(a)) for a in at)):
        index = tuple(a[i] for a, i in zip(at, place, strict=True))
        point = [k[i] - (s // 3 if h else 0) for k, i, s, h in zip(knots, index, stepped, held, strict=True)]
        factors[place] = max(1.0, seconds(point) / grid[index])
    for d, (a, k) in enumerate(zip(at, knots, strict=True)):
        factors = np.apply_along_axis(partial(_spread, a, len(k)), d, factors)
    return factors


def _spread(at: Sequence[int], count: int, known: Vector) -> Vector:
    return np.interp(np.arange(count), at, known)

"""How large channels were while a penalty shrank them: plain data, recorded step by step, that can be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphprune.errors import counted
from graphprune.report import plots

BELOW = 0.1
"""A drawing goes down to this part of what counts as near zero; what is smaller is drawn there."""


@dataclass(frozen=True)
class Track:
    """The sizes of one group's channels.

    Attributes:
        near: a channel is near zero below this size.
        sizes: per record, the smallest, that of 10 %, the median, that of 90 %, and the largest.
    """

    near: float
    sizes: tuple[tuple[float, ...], ...]

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest size that a drawing on a logarithmic scale needs."""
        high = max([1e-30, *(size for row in self.sizes for size in row if math.isfinite(size))])
        low = BELOW * self.near
        return (low, high) if 0 < low < high else (high * 1e-4, high)


@dataclass(frozen=True)
class History:
    """Sizes of channels during sparse training, as `Slimming`, `GroupLasso` and `GrowingL2` record them.

    Attributes:
        penalty: its class.
        steps: of the optimizer, ascending.
        near_zero: per record, the fraction of all channels that are near zero.
        groups: per group, its sizes.
    """

    penalty: str
    steps: tuple[int, ...]
    near_zero: tuple[float, ...]
    groups: Mapping[str, Track] = field(repr=False)

    def plot(self) -> Any:
        """A figure of matplotlib: the fraction near zero, and per group bands of sizes, over the steps.

        Raises:
            InputError: matplotlib is not installed.
        """
        return plots.history(self)

    def __str__(self) -> str:
        first, last = self.near_zero[0], self.near_zero[-1]
        trained = f"with {self.penalty} for {counted(self.steps[-1], 'step')}"
        return f"{trained}: {first:.2f} -> {last:.2f} of the channels near zero"

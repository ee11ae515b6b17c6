"""How large the channels of each group are, now and when a penalty began: what it has done so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from graphprune.errors import counted

NEAR = 1e-2
"""A channel is near zero below this fraction of what its group's median was at the start."""
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True, eq=False)
class Distribution:
    """Sizes of channels: the root mean square of what a penalty shrinks. `print` it for a table.

    Attributes:
        step: how many times the penalty was added.
        start: per group, the sizes when the penalty was made, (channels,).
        now: per group, the sizes now.
    """

    step: int
    start: Mapping[str, torch.Tensor] = field(repr=False)
    now: Mapping[str, torch.Tensor] = field(repr=False)

    def quantiles(self, group: str) -> tuple[float, ...]:
        """Smallest, 10 %, median, 90 % and largest of a group's sizes."""
        found = torch.quantile(self.now[group], torch.tensor(QUANTILES, dtype=self.now[group].dtype))
        return tuple(found.tolist())

    def near_zero(self, group: str | None = None) -> float:
        """Fraction of the channels, of a group or of all, that are near zero, see `NEAR`."""
        names = self.now if group is None else [group]
        small = [self.now[name] < NEAR * self.start[name].median() for name in names]
        return float(torch.cat(small).double().mean())

    def __str__(self) -> str:
        """One line per group, and one for all."""
        wide = max([len(name) for name in self.now] + [5])
        head = "channels     start       min      10 %    median      90 %       max  near zero"
        lines = [f"{'group':<{wide}}  {head}"]
        for name, sizes in self.now.items():
            figures = (float(self.start[name].median()), *self.quantiles(name))
            cells = "  ".join(f"{figure:8.2e}" for figure in figures)
            lines.append(f"{name:<{wide}}  {len(sizes):>8}  {cells}  {self.near_zero(name):>9.2f}")
        total = sum(map(len, self.now.values()))
        told = f"after {counted(self.step, 'step')} {self.near_zero():.2f} of {counted(total, 'channel')} are near zero"
        return "\n".join([*lines, told])

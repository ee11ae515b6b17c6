"""The time of a model, predicted from tables of its ops' times, for any widths of its groups."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from graphprune.axes import Atom, Axes
from graphprune.cost.polynomial import Polynomial, Vector
from graphprune.latency.table import Table, Variable

Ints = npt.NDArray[np.intp]
ALL = slice(None)
ROUNDING = 1e-6
WORTH = 0.5
"""A width is worth choosing if it saves at least this part of what its channels cost on average."""


@dataclass(frozen=True, eq=False)
class Part:
    """Ops that take the same time whatever the widths.

    Attributes:
        table: their times.
        variables: what they depend on.
        calls: per call, the path of the module that makes it, and what it took in the run of the original over what
            the table says.
        together: whether they depend on several sizes that no measurement tells apart, as all shrank at once in it.
    """

    table: Table
    variables: tuple[Variable, ...]
    calls: tuple[tuple[str, float], ...]
    together: bool = False

    @property
    def weight(self) -> float:
        """How many calls they are, in times of the table."""
        return sum(weight for _, weight in self.calls)


@dataclass(frozen=True, eq=False)
class Prediction:
    """Time of a run in eval mode at the example inputs, in nanoseconds.

    Attributes:
        parts: of which the time is the sum, with `constant`, the time of all that no width changes.
        constant: in seconds.
        fixed: per module's path, the seconds of its calls among the constant ones.
        axes: the equations the axes live in.
        atoms: per group name, the atom whose width the group sets.
    """

    parts: Sequence[Part] = field(repr=False)
    constant: float
    fixed: Mapping[str, float] = field(repr=False)
    axes: Axes = field(repr=False)
    atoms: Mapping[str, Atom] = field(repr=False)
    name: str = "latency"

    def of(self, widths: Vector) -> float:
        """Nanoseconds at a vector of widths."""
        return 1e9 * float(self.constant + self.seconds(widths) @ self._weights)

    def seconds(self, widths: Vector | None = None) -> Vector:
        """What one call of each part takes, without its weight; of the original if no widths are given."""
        values = self._values(self._vector({}) if widths is None else widths)
        return self._grid.interpolated(*self._grid.filled(values))[0]

    def gradient(self, widths: Vector) -> Vector:
        """What one channel of each group costs at these widths on average over a block of channels, shape (groups,)."""
        values = self._values(widths)
        _, slopes = self._grid.interpolated(values, np.zeros(len(values), dtype=np.intp))
        parts = (slopes * self._weights[:, None]).ravel()
        by_value = np.bincount(self._slots.ravel(), parts, self._polynomial.count + 1).astype(float)
        return 1e9 * self._polynomial.gradient(widths, by_value[:-1])

    def at(self, widths: Mapping[str, int]) -> int:
        """Nanoseconds when each group has the width given; a missing group keeps its size."""
        return round(self.of(self._vector(widths)))

    def _vector(self, widths: Mapping[str, int]) -> Vector:
        return np.array([widths.get(name, atom.size) for name, atom in self.atoms.items()], dtype=float)

    def worthwhile(self, groups: Sequence[int], widths: Vector) -> npt.NDArray[np.bool_]:
        """Which widths of some groups, together and ascending, save time against the next larger one that does.

        All other groups are whole. Widths that fill no block cost what the next whole block costs, and are left out.
        """
        times = self._along(groups, widths)
        chosen = np.zeros(len(widths), dtype=bool)
        chosen[[0, -1]] = True
        fair = WORTH * (times[-1] - times[0]) / max(1.0, widths[-1] - widths[0])
        last = len(widths) - 1
        for i in range(len(widths) - 2, 0, -1):
            if times[last] - times[i] >= fair * (widths[last] - widths[i]):
                chosen[i], last = True, i
        return chosen

    def by_module(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Nanoseconds of the calls that each module makes itself, by its path; a missing group keeps its size."""
        found = {path: 1e9 * seconds for path, seconds in self.fixed.items()}
        for part, seconds in zip(self.parts, self.seconds(self._vector(widths)), strict=True):
            for path, weight in part.calls:
                found[path] = found.get(path, 0.0) + 1e9 * weight * float(seconds)
        return found

    @property
    def together(self) -> tuple[int, float]:
        """How many calls were measured only as all their sizes shrank at once, and the original's nanoseconds for them.

        Their time at widths that keep different fractions follows from how much they compute, and is no measurement.
        """
        parts = [(part, s) for part, s in zip(self.parts, self.seconds(), strict=True) if part.together]
        return sum(len(part.calls) for part, _ in parts), 1e9 * sum(part.weight * float(s) for part, s in parts)

    # -- compiled ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _variables(self) -> dict[int, int]:
        """Number of each variable of the parts, by its identity."""
        every = [v for part in self.parts for v in part.variables]
        return {key: i for i, key in enumerate(dict.fromkeys(map(id, every)))}

    @functools.cached_property
    def _polynomial(self) -> Polynomial:
        """The values of all variables."""
        held = {id(v): v for part in self.parts for v in part.variables}
        return Polynomial([held[key].products for key in self._variables], self.axes, list(self.atoms.values()))

    @functools.cached_property
    def _slots(self) -> Ints:
        """Per part, the numbers of its variables; the one after the last stands for 0."""
        found = np.full((len(self.parts), self._grid.dims), len(self._variables), dtype=np.intp)
        for row, part in zip(found, self.parts, strict=True):
            row[: len(part.variables)] = [self._variables[id(v)] for v in part.variables]
        return found

    @functools.cached_property
    def _weights(self) -> Vector:
        return np.array([part.weight for part in self.parts], dtype=float)

    @functools.cached_property
    def _grid(self) -> Grid:
        return Grid([part.table for part in self.parts])

    def _values(self, widths: Vector) -> Vector:
        return np.append(self._polynomial.at(widths), 0.0)[self._slots]

    def _along(self, groups: Sequence[int], widths: Vector) -> Vector:
        """Seconds of what changes, at each of some widths of some groups."""
        whole = np.array([atom.size for atom in self.atoms.values()], dtype=float)
        ends = []
        for width in widths[[0, -1]]:
            whole[list(groups)] = width
            ends.append(self._values(whole))
        rows = np.flatnonzero((ends[0] != ends[1]).any(1))
        share = (widths - widths[0]) / max(1.0, widths[-1] - widths[0])
        values = ends[0][rows] + share[:, None, None] * (ends[1] - ends[0])[rows]  # exact but for tied products
        seconds, _ = self._grid.interpolated(*self._grid.filled(values, rows), rows)
        found: Vector = seconds @ self._weights[rows]
        return found


class Grid:
    """Tables in one array, all interpolated at once."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.dims = max((len(t.knots) for t in tables), default=1)
        self.bits = 2 ** np.arange(self.dims)
        count = len(tables)
        self.steps = np.ones((count, self.dims))
        self.base, self.pattern = np.zeros(count, dtype=np.intp), np.zeros(count, dtype=np.intp)
        self.stride = np.zeros((count, self.dims), dtype=np.intp)
        self.first, self.last = np.zeros((count, self.dims), dtype=np.intp), np.zeros((count, self.dims), dtype=np.intp)
        knots: list[Vector] = [np.array([0.0, 1.0])]
        where, used, offset = {}, 2, 0
        seconds: list[Vector] = []
        for t, table in enumerate(tables):
            self.last[t] = 1
            if id(table) not in where:
                where[id(table)] = (
                    offset,
                    [used + sum(len(k) for k in table.knots[:d]) for d in range(len(table.knots))],
                )
                knots += table.knots
                used += sum(len(k) for k in table.knots)
                seconds.append(table.seconds.ravel())
                offset += table.seconds.size
            self.base[t], starts = where[id(table)]
            self.pattern[t] = table.seconds[0].size
            for d, (start, k) in enumerate(zip(starts, table.knots, strict=True)):
                self.first[t, d], self.last[t, d] = start, start + len(k) - 1
                self.steps[t, d] = table.steps[d]
                self.stride[t, d] = int(np.prod(table.seconds.shape[d + 2 :]))
        self.knots = np.concatenate(knots)
        self.seconds = np.concatenate([np.zeros(0), *seconds])
        self.rounds = int(np.ceil(np.log2(1 + (self.last - self.first).max(initial=1))))

    def filled(self, values: Vector, rows: Ints | slice = ALL) -> tuple[Vector, Ints]:
        """Values as whole blocks, and which of them were not, as bits."""
        steps = self.steps[rows]
        whole = np.where(steps > 1, np.ceil(values / steps - ROUNDING) * steps, values)
        return whole, (np.abs(whole - values) > ROUNDING) @ self.bits

    def interpolated(self, values: Vector, unfilled: Ints, rows: Ints | slice = ALL) -> tuple[Vector, Vector]:
        """Seconds and their derivatives by every variable.

        Args:
            values: of the variables, shape (..., tables, dims).
            unfilled: which of them fill no whole number of blocks, as bits, shape (..., tables).
            rows: which tables; all if not given.
        """
        low, high = np.broadcast_to(self.first[rows], values.shape), np.broadcast_to(self.last[rows], values.shape)
        for _ in range(self.rounds):  # the last knot but one, or before, that is not above the value
            middle = (low + high) // 2
            above = self.knots[middle] > values
            low, high = np.where(above, low, middle), np.where(above, np.maximum(middle, low + 1), high)
        width = self.knots[low + 1] - self.knots[low]
        share = (values - self.knots[low]) / width
        at = self.base[rows] + unfilled * self.pattern[rows] + ((low - self.first[rows]) * self.stride[rows]).sum(-1)
        total, slopes = np.zeros(values.shape[:-1]), np.zeros(values.shape)
        for corner in itertools.product((0, 1), repeat=self.dims):
            up = np.array(corner)
            weights = np.where(up, share, 1 - share)
            held = self.seconds[at + (self.stride[rows] * up).sum(-1)]
            total += held * weights.prod(-1)
            for d in range(self.dims):
                slopes[..., d] += held * np.delete(weights, d, axis=-1).prod(-1) * (2 * up[d] - 1) / width[..., d]
        return np.maximum(total, 0.0), slopes

"""Sums of products of axis widths, compiled: values and gradients for any widths without running the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes import Atom, Axes, Axis

Vector = npt.NDArray[np.float64]


class Polynomial:
    """Polynomials in the widths of groups, a vector of them at once.

    Each is a sum of products of factors, and a factor is the width of an axis: a sum of monomials.

    Args:
        sums: per polynomial, its products, each of any number of axes.
        axes: the equations the axes live in.
        atoms: the atom of each variable, in order.
    """

    def __init__(self, sums: Sequence[Iterable[Sequence[Axis]]], axes: Axes, atoms: Sequence[Atom]) -> None:
        self.count, self.variables = len(sums), len(atoms)
        symbols: dict[Atom, Any] = {atom: _Sum({(i,): 1}) for i, atom in enumerate(atoms)}
        memo: dict[Axis, Any] = {}
        factors: dict[Any, int] = {}
        rows: list[tuple[int, int, list[int]]] = []
        for number, products in enumerate(sums):
            for product in products:
                constant, found = 1, []
                for axis in product:
                    width = axes.width(axis, symbols, memo)
                    if isinstance(width, _Sum):
                        found.append(factors.setdefault(width.key, len(factors)))
                    else:
                        constant *= width
                rows.append((number, constant, sorted(found)))
        self._monomials(list(factors))
        self._products(rows)

    def _monomials(self, factors: list[Any]) -> None:
        flat = [(k, c, m) for k, key in enumerate(factors) for m, c in key]
        degree = max((len(m) for _, _, m in flat), default=1)
        self.factors = len(factors)
        self.of_factor = np.array([k for k, _, _ in flat], dtype=np.intp)
        self.weight = np.array([c for _, c, _ in flat], dtype=float)
        self.variable = np.full((len(flat), degree), self.variables, dtype=np.intp)  # the last stands for 1
        for row, (_, _, m) in enumerate(flat):
            self.variable[row, : len(m)] = m

    def _products(self, rows: list[tuple[int, int, list[int]]]) -> None:
        degree = max((len(f) for _, _, f in rows), default=1) or 1
        self.of_sum = np.array([n for n, _, _ in rows], dtype=np.intp)
        self.constant = np.array([c for _, c, _ in rows], dtype=float)
        self.factor = np.full((len(rows), degree), self.factors, dtype=np.intp)
        for row, (_, _, found) in enumerate(rows):
            self.factor[row, : len(found)] = found

    def at(self, widths: Vector) -> Vector:
        """The values, shape (polynomials,), exact up to 2^53."""
        products = self.constant * self._factors(widths)[self.factor].prod(1)
        return np.bincount(self.of_sum, products, self.count).astype(float)

    def gradient(self, widths: Vector, weights: Vector) -> Vector:
        """The derivatives of their sum, each times its weight, by every width, shape (variables,)."""
        values = self._factors(widths)
        rows = weights[self.of_sum] != 0
        scaled = self.constant[rows] * weights[self.of_sum[rows]]
        parts = scaled[:, None] * _others(values[self.factor[rows]])
        by_factor = np.bincount(self.factor[rows].ravel(), parts.ravel(), self.factors + 1)
        held = np.append(widths, 1.0)[self.variable]
        parts = (by_factor[self.of_factor] * self.weight)[:, None] * _others(held)
        return np.bincount(self.variable.ravel(), parts.ravel(), self.variables + 1)[:-1].astype(float)

    def _factors(self, widths: Vector) -> Vector:
        monomials = self.weight * np.append(widths, 1.0)[self.variable].prod(1)
        return np.append(np.bincount(self.of_factor, monomials, self.factors), 1.0)


def symbolic(axes: Axes, atoms: Sequence[Atom]) -> Callable[[Axis], Any]:
    """What the width of an axis is in those of the atoms: an int if it is constant, else a tuple that compares."""
    symbols: dict[Atom, Any] = {atom: _Sum({(i,): 1}) for i, atom in enumerate(atoms)}
    memo: dict[Axis, Any] = {}

    def expression(axis: Axis) -> Any:
        width = axes.width(axis, symbols, memo)
        return width.key if isinstance(width, _Sum) else width

    return expression


def _others(values: Vector) -> Vector:
    """Per element of a row, the product of the others."""
    out = np.ones_like(values)
    for k in range(values.shape[1]):
        out[:, k] = np.delete(values, k, axis=1).prod(1)
    return out


class _Sum:
    """A sum of monomials while it is put together; a monomial is the sorted numbers of its variables."""

    def __init__(self, terms: Mapping[tuple[int, ...], int]) -> None:
        self.terms = terms

    @property
    def key(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """The same for equal sums."""
        return tuple(sorted(self.terms.items()))

    def __add__(self, other: _Sum | int) -> _Sum:
        terms = dict(self.terms)
        for m, c in _terms(other).items():
            terms[m] = terms.get(m, 0) + c
        return _Sum(terms)

    def __mul__(self, other: _Sum | int) -> _Sum:
        terms: dict[tuple[int, ...], int] = {}
        for a, x in self.terms.items():
            for b, y in _terms(other).items():
                m = tuple(sorted((*a, *b)))
                terms[m] = terms.get(m, 0) + x * y
        return _Sum(terms)

    __radd__, __rmul__ = __add__, __mul__


def _terms(value: _Sum | int) -> Mapping[tuple[int, ...], int]:
    return value.terms if isinstance(value, _Sum) else {(): value}

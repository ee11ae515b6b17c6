"""The algebra of channel coupling: index sets, and which of them must be the same.

Every dim of every tensor carries an axis, an index set built from three forms

    Atom(n)         n positions that nothing has taken apart yet
    Prod(a, b, ..)  row-major pairs, as `view` and `groups` make them;  size = product
    Sum(a, b, ..)   one after the other, as `cat` and `split` make them;  size = sum

An op says that two axes are one and the same; `Axes.unify` works out what that means for the atoms inside.
Which positions stay, how many there are and which atoms are free are folds over the resulting expression.
This file knows nothing of tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Mask: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]
Places: TypeAlias = tuple[int, Positions, Positions]
"""Size of an axis, positions in it, and what occurs there."""
T = TypeVar("T")


class Atom:
    """An index set of `size` positions without inner structure; equal only to itself."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"Atom({self.size})"


class Prod:
    """Row-major pairs of positions: the last factor varies fastest."""

    __slots__ = ("factors", "only", "size")

    def __init__(self, *factors: Axis) -> None:
        self.factors = factors
        self.size: int = math.prod(f.size for f in factors)
        wide = [f for f in factors if f.size != 1]
        self.only: Axis | None = wide[0] if len(wide) == 1 else None

    def __repr__(self) -> str:
        return f"Prod({', '.join(map(repr, self.factors))})"


class Sum:
    """Index sets laid one after the other."""

    __slots__ = ("only", "size", "terms")

    def __init__(self, *terms: Axis) -> None:
        self.terms = terms
        self.size: int = sum(t.size for t in terms)
        wide = [t for t in terms if t.size != 0]
        self.only: Axis | None = wide[0] if len(wide) == 1 else None

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.terms))})"


Axis: TypeAlias = Atom | Prod | Sum


@dataclass(frozen=True)
class Pin:
    """Why an index set must stay whole.

    Attributes:
        reason: what needs every position, as a clause ("the batch reaches an input").
        where: the op that said so, its `str` giving the source line; empty where there is none.
    """

    reason: str
    where: object = ""

    def __str__(self) -> str:
        return f"{self.reason}, at {self.where}" if self.where != "" else self.reason


@dataclass(frozen=True)
class Misalignment:
    """Two expressions of one index set whose inner boundaries do not line up; both are pinned whole."""

    left: Axis
    right: Axis
    where: object


class Axes:
    """Equations between axes, solved as they come (union-find over atoms; an atom may be bound to an expression).

    `unify` and `pin` state facts in any order; `settle` closes the system, after which the folds `mask`, `width`,
    `leaves` and `pin_of` may be read. The result does not depend on the order of the facts.

    Example:
        >>> axes = Axes()
        >>> flat, heads, dim = Atom(6), Atom(2), Atom(3)
        >>> axes.unify(flat, Prod(heads, dim))
        >>> axes.settle()
        >>> axes.mask(flat, {heads: np.array([True, False])}).tolist()
        [True, True, True, False, False, False]
    """

    def __init__(self) -> None:
        self._bound: dict[Atom, Axis] = {}
        self._pins: list[tuple[Axis, Pin]] = []
        self._misaligned: list[Misalignment] = []
        self._pinned: dict[Atom, Pin] = {}

    # -- facts ---------------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis, where: object = "") -> None:
        """State that `a` and `b` are the same index set.

        Boundaries that do not line up never raise: they are kept until `settle`, which pins what is still misaligned.

        Args:
            a, b: axes of equal size.
            where: op and source line, for the reason of a pin; anything whose `str` says it.
        Raises:
            ValueError: the sizes differ, which no op can mean.
        """
        work = [(a, b)]
        while work:
            a, b = work.pop()
            if a.size != b.size:
                raise ValueError(f"cannot unify axes of sizes {a.size} and {b.size}: {a!r}, {b!r}")
            a, b = self.find(a), self.find(b)
            if a is b or a.size <= 1:
                continue
            if isinstance(a, Atom):
                self._bound[a] = b
            elif isinstance(b, Atom):
                self._bound[b] = a
            else:
                work.extend(self._align(a, b, where))

    def pin(self, axis: Axis, pin: Pin) -> None:
        """State that every position of `axis` must stay."""
        if axis.size > 1:
            self._pins.append((axis, pin))

    def settle(self) -> None:
        """Close the system: retry what was misaligned, pin what still is, and spread the pins to the atoms."""
        while True:
            before, retry = len(self._bound), self._misaligned
            self._misaligned = []
            for m in retry:
                self.unify(m.left, m.right, m.where)
            if len(self._bound) == before:
                break
        for m in self._misaligned:
            reason = f"{self.describe(m.left)} does not line up with {self.describe(m.right)}"
            for axis in (m.left, m.right):
                self.pin(axis, Pin(reason, m.where))
        for axis, pin in self._pins:
            for leaf in self.leaves(axis):
                self._pinned.setdefault(leaf, pin)
        self._pins.clear()

    # -- folds ---------------------------------------------------------------------------------------------------

    def find(self, axis: Axis) -> Axis:
        """The representative of `axis`: a free atom, or an expression of at least two parts."""
        path = []
        while True:
            if isinstance(axis, Atom):
                bound = self._bound.get(axis)
                if bound is None:
                    break
                path.append(axis)
                axis = bound
            elif axis.only is not None:
                axis = axis.only
            else:
                break
        for atom in path:
            self._bound[atom] = axis
        return axis

    def leaves(self, axis: Axis) -> list[Atom]:
        """The free atoms of more than one position inside `axis`, in order of first occurrence."""
        seen: dict[Atom, None] = {}
        done: set[int] = set()
        work = [axis]
        while work:
            part = self.find(work.pop())
            if id(part) in done or part.size <= 1:
                continue
            done.add(id(part))
            if isinstance(part, Atom):
                seen[part] = None
            else:
                work.extend(reversed(_parts(part)))
        return list(seen)

    def pin_of(self, atom: Atom) -> Pin | None:
        """Why the free atom `atom` must stay whole; None if it may shrink. Valid after `settle`."""
        return self._pinned.get(atom)

    def mask(self, axis: Axis, keep: Mapping[Atom, Mask], memo: dict[Axis, Mask] | None = None) -> Mask:
        """Which positions of `axis` stay.

        Args:
            axis: an index set of n positions.
            keep: per free atom, which of its positions stay; a missing atom stays whole.
            memo: results of earlier calls with the same `keep`, shared by expressions that share parts.
        Returns:
            Bool array of shape (n,), True = stays.
        """

        def of_prod(factors: list[Mask]) -> Mask:
            joint = factors[0]
            for f in factors[1:]:
                joint = np.logical_and.outer(joint, f).reshape(-1)
            return joint

        def of_atom(atom: Atom) -> Mask:
            return keep[atom] if atom in keep else np.ones(atom.size, dtype=bool)

        return self._fold(axis, of_atom, of_prod, np.concatenate, {} if memo is None else memo)

    def width(self, axis: Axis, widths: Mapping[Atom, T], memo: dict[Axis, T | int] | None = None) -> T | int:
        """The size of `axis` when each free atom has the width given, a polynomial in those widths.

        Args:
            axis: an index set.
            widths: width per free atom: ints, or anything with + and * (a symbol gives the polynomial itself);
                a missing atom keeps its size.
            memo: results of earlier calls with the same `widths`.
        """

        def of_atom(atom: Atom) -> T | int:
            return widths.get(atom, atom.size)

        def add(parts: list[T | int]) -> T | int:
            return sum(parts[1:], parts[0])  # type: ignore[arg-type]

        return self._fold(axis, of_atom, math.prod, add, {} if memo is None else memo)  # type: ignore[arg-type]

    def places(
        self, axis: Axis, first: Mapping[Atom, int], memo: dict[Axis, Places] | None = None
    ) -> tuple[Positions, Positions]:
        """Where free atoms occur in `axis`.

        Args:
            axis: an index set.
            first: per free atom, the number of its first position in a common numbering; a missing atom is left out.
            memo: results of earlier calls with the same `first`.
        Returns:
            Two arrays of one shape: positions in the axis, and the number of the atom's position that occurs there.
            A position of a product occurs once per factor.
        """

        def of_atom(atom: Atom) -> Places:
            every = np.arange(atom.size if atom in first else 0)
            return atom.size, every, every + first.get(atom, 0)

        found = self._fold(axis, of_atom, _placed_in_product, _placed_in_sum, {} if memo is None else memo)
        return found[1], found[2]

    def describe(self, axis: Axis) -> str:
        """`axis` as text: `3 x 64` for a product, `8 + 16 + 8` for a sum."""
        terms = self.terms(axis)
        if len(terms) > 1:
            return " + ".join(self.describe(t) for t in terms)
        factors = self.factors(terms[0])
        text = (str(f.size) if isinstance(f, Atom) else f"({self.describe(f)})" for f in factors)
        return " x ".join(text) if factors else "1"

    def _fold(
        self,
        axis: Axis,
        of_atom: Callable[[Atom], T],
        of_prod: Callable[[list[T]], T],
        of_sum: Callable[[list[T]], T],
        memo: dict[Axis, T],
    ) -> T:
        """A bottom-up fold with an explicit stack: concatenations can nest as deep as the network."""
        top = self.find(axis)
        work = [top]
        while work:
            part = work[-1]
            if part in memo:
                work.pop()
            elif isinstance(part, Atom):
                memo[work.pop()] = of_atom(part)
            else:
                parts = [self.find(p) for p in _parts(part)]
                if missing := [p for p in parts if p not in memo]:
                    work.extend(missing)
                else:
                    values = [memo[p] for p in parts]
                    memo[work.pop()] = of_prod(values) if isinstance(part, Prod) else of_sum(values)
        return memo[top]

    # -- alignment -----------------------------------------------------------------------------------------------

    def _align(self, a: Axis, b: Axis, where: object) -> list[tuple[Axis, Axis]]:
        """The smaller equations that `a` = `b` comes down to; what does not line up goes to the misalignments."""
        left, right = self.terms(a), self.terms(b)
        if len(left) == len(right) == 1:
            return self._align_products(left[0], right[0], where)
        for start in _boundaries(right):
            self._cut(a, start)
        for start in _boundaries(left):
            self._cut(b, start)
        pairs: list[tuple[Axis, Axis]] = []
        for some, others in _segments(self.terms(a), self.terms(b), sum):
            if len(some) == len(others) == 1:
                pairs.append((some[0], others[0]))
            else:
                self._misaligned.append(Misalignment(_sum(some), _sum(others), where))
        return pairs

    def _align_products(self, a: Axis, b: Axis, where: object) -> list[tuple[Axis, Axis]]:
        """`_align` for two products without sums in front: compare factor by factor, splitting the larger one."""
        pairs: list[tuple[Axis, Axis]] = []
        for some, others in _segments(self.factors(a)[::-1], self.factors(b)[::-1], math.prod):
            some, others = some[::-1], others[::-1]
            if len(some) == 1 or len(others) == 1:
                pairs.append((_prod(some), _prod(others)))
                continue
            strides = sorted(set(_strides(some)) | set(_strides(others)))
            if any(big % small for small, big in itertools.pairwise(strides)):
                self._misaligned.append(Misalignment(_prod(some), _prod(others), where))
                continue
            fine = [Atom(big // small) for small, big in itertools.pairwise(strides)][::-1]
            pairs.extend(_regroup(fine, some))
            pairs.extend(_regroup(fine, others))
        return pairs

    def _cut(self, axis: Axis, at: int) -> bool:
        """Make `at` a boundary between two terms of `axis`, if its structure allows that."""
        while True:
            axis = self.find(axis)
            if at in (0, axis.size):
                return True
            if isinstance(axis, Atom):
                self._bound[axis] = Sum(Atom(at), Atom(axis.size - at))
                return True
            if isinstance(axis, Prod):
                factors = self.factors(axis)
                rest = math.prod(f.size for f in factors[1:])
                if at % rest:
                    return False
                axis, at = factors[0], at // rest
                continue
            for term in axis.terms:
                if at <= term.size:
                    axis = term
                    break
                at -= term.size

    def terms(self, axis: Axis) -> list[Axis]:
        """`axis` as a list of terms, with a sum in front of a product multiplied out."""
        out: list[Axis] = []
        work: list[tuple[Axis, tuple[Axis, ...]]] = [(axis, ())]
        while work:
            part, rest = work.pop()
            part = self.find(part)
            if part.size == 0:
                continue
            if isinstance(part, Sum):
                work.extend((t, rest) for t in reversed(part.terms))
            elif isinstance(part, Prod):
                head, *tail = self.factors(part) or [Atom(1)]
                work.append((head, (*tail, *rest)))
            elif rest and part.size == 1:
                work.append((rest[0], rest[1:]))
            else:
                out.append(_prod([part, *rest]))
        return out

    def factors(self, axis: Axis) -> list[Axis]:
        """`axis` as a flat list of factors, each a free atom or a sum, without units."""
        out: list[Axis] = []
        work = [axis]
        while work:
            part = self.find(work.pop())
            if isinstance(part, Prod):
                work.extend(reversed(part.factors))
            elif part.size != 1:
                out.append(part)
        return out


def _parts(axis: Prod | Sum) -> tuple[Axis, ...]:
    return axis.factors if isinstance(axis, Prod) else axis.terms


def _placed_in_sum(parts: list[Places]) -> Places:
    starts = np.cumsum([0, *(size for size, _, _ in parts)])
    at = np.concatenate([at for _, at, _ in parts])
    at += np.repeat(starts[:-1], [len(at) for _, at, _ in parts])
    return int(starts[-1]), at, np.concatenate([which for _, _, which in parts])


def _placed_in_product(parts: list[Places]) -> Places:
    total = stride = math.prod(size for size, _, _ in parts)
    ats, numbers = [], []
    for size, at, which in parts:
        stride //= size
        outer, inner = np.arange(total // (stride * size)) * stride * size, np.arange(stride)
        grid = outer[:, None, None] + (at * stride)[None, :, None] + inner[None, None, :]
        ats.append(grid.reshape(-1))
        numbers.append(np.broadcast_to(which[None, :, None], grid.shape).reshape(-1))
    return total, np.concatenate(ats), np.concatenate(numbers)


def _prod(factors: list[Axis]) -> Axis:
    wide = [f for f in factors if f.size != 1] or factors[:1]
    return wide[0] if len(wide) == 1 else Prod(*wide)


def _sum(terms: list[Axis]) -> Axis:
    return terms[0] if len(terms) == 1 else Sum(*terms)


def _boundaries(terms: list[Axis]) -> list[int]:
    """Where one term ends and the next begins: the running sums, without 0 and the total."""
    ends, total = [], 0
    for term in terms[:-1]:
        total += term.size
        ends.append(total)
    return ends


def _strides(factors: list[Axis]) -> Iterator[int]:
    """How many positions one step of each factor skips, and the total: the running products from the last factor."""
    stride = 1
    yield stride
    for factor in reversed(factors):
        stride *= factor.size
        yield stride


def _segments(
    left: list[Axis], right: list[Axis], total: Callable[[Iterable[int]], int]
) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Cut both lists wherever their running totals agree."""
    i = j = 0
    while i < len(left):
        some, others = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        a, b = some[0].size, others[0].size
        while a != b:
            if a < b:
                some.append(left[i])
                a, i = total((a, left[i].size)), i + 1
            else:
                others.append(right[j])
                b, j = total((b, right[j].size)), j + 1
        yield some, others


def _regroup(fine: list[Atom], factors: list[Axis]) -> Iterator[tuple[Axis, Axis]]:
    """Each of `factors` beside the product of the finer atoms that make it up."""
    rest = iter(fine)
    for factor in factors:
        group: list[Axis] = []
        while math.prod(f.size for f in group) < factor.size:
            group.append(next(rest))
        yield factor, _prod(group)

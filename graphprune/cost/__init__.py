"""What a model costs, as polynomials in the widths of its groups: no plan has to be built or run to know its cost.

MACs are multiply-adds (one multiply-add = 1) of convolutions, linear layers, matrix products and attention at the
example inputs; parameters are counted once each, tied ones too. Memory is what a run in eval mode holds at most: all
weights and buffers, and the activations that are alive at once.

Published tables count in other ways, and their figures can be compared only with figures counted likewise: `flops` are
two to a multiply-add, and `macs` and `flops` with `convention="outputs"` let a layer cost less for the channels it no
longer computes but not for those it no longer reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from graphprune.axes import Atom, Axes, Axis
from graphprune.cost.memory import lives
from graphprune.cost.polynomial import Polynomial, Vector
from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.plan import Plan

Products = Sequence[Sequence[Axis]]
Convention: TypeAlias = Literal["left", "outputs"]


class Costs(Protocol):
    """What a budget is spent on, as allocation needs it."""

    @property
    def name(self) -> str:
        """What it counts."""

    def of(self, widths: Vector, /) -> float:
        """The cost at a vector of the widths of all groups, in order."""

    def gradient(self, widths: Vector, /) -> Vector:
        """What one channel of each group costs at these widths, shape (groups,)."""

    def at(self, widths: Mapping[str, int], /) -> int:
        """The cost when each group has the width given; a missing group keeps its size."""

    def worthwhile(self, groups: Sequence[int], widths: Vector, /) -> npt.NDArray[np.bool_]:
        """Which widths of some groups, together and ascending, are worth choosing: larger ones cost more."""


@dataclass(frozen=True, eq=False)
class Cost:
    """Sums of products of axis widths: their total, or, where they come and go, the largest total at any time.

    Attributes:
        name: what it counts.
        sums: per sum, axes whose widths multiply; the products are added.
        axes: the equations the axes live in.
        atoms: per group name, the atom whose width the group sets.
        spans: per sum, the first and the last time at which it counts; None where all do at all times.
    """

    name: str
    sums: Sequence[Products] = field(repr=False)
    axes: Axes = field(repr=False)
    atoms: Mapping[str, Atom] = field(repr=False)
    spans: Sequence[tuple[int, int]] | None = field(repr=False, default=None)

    @functools.cached_property
    def polynomial(self) -> Polynomial:
        """The sums, compiled; variables are the groups in order."""
        return Polynomial(self.sums, self.axes, list(self.atoms.values()))

    def vector(self, widths: Mapping[str, int]) -> Vector:
        """Widths of all groups in order; a missing group keeps its size."""
        return np.array([widths.get(name, atom.size) for name, atom in self.atoms.items()], dtype=float)

    def of(self, widths: Vector) -> float:
        """The cost at a vector of widths."""
        sums = self.polynomial.at(widths)
        return float(sums.sum() if self.spans is None else self._over_time(sums).max())

    def gradient(self, widths: Vector) -> Vector:
        """What one channel of each group costs at these widths, shape (groups,)."""
        taken = np.ones(len(self.sums))
        if self.spans is not None:
            peak = int(self._over_time(self.polynomial.at(widths)).argmax())
            taken = np.array([float(first <= peak <= end) for first, end in self.spans])
        return self.polynomial.gradient(widths, taken)

    def worthwhile(self, groups: Sequence[int], widths: Vector) -> npt.NDArray[np.bool_]:
        """Which widths of some groups are worth choosing: all, as one channel more never costs less."""
        return np.ones(len(widths), dtype=bool)

    def _over_time(self, sums: Vector) -> Vector:
        first, last = np.array(self.spans, dtype=np.intp).T
        ticks = int(last.max()) + 2
        return (np.bincount(first, sums, ticks) - np.bincount(last + 1, sums, ticks)).cumsum()

    def at(self, widths: Mapping[str, int]) -> int:
        """The cost when each group has the width given; a missing group keeps its size."""
        return round(self.of(self.vector(widths)))


def macs(coupling: Coupling, *, convention: Convention = "left") -> Cost:
    """Multiply-adds of a model at the example inputs.

    Args:
        coupling: of the model.
        convention: "left" counts what the smaller model does. "outputs" counts as HRank does (Lin et al., CVPR 2020): a
            layer's multiply-adds fall with the channels that it computes, and what it sums over stays as it was. That
            is more than the smaller model does; it is there to compare with tables that count so.
    Raises:
        InputError: another convention.

    Example:
        >>> import torch, graphprune as gp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
        >>> coupling = gp.couple(gp.trace(net, torch.zeros(1, 3)))
        >>> [macs(coupling, convention=c).at({"0": 4}) for c in ("left", "outputs")]
        [32, 52]
    """
    return Cost("macs", [list(_multiplied(coupling, convention))], coupling.axes, coupling.atoms)


def flops(coupling: Coupling, *, convention: Convention = "left") -> Cost:
    """Twice the multiply-adds: a multiplication and an addition each.

    Args:
        coupling: of the model.
        convention: as for `macs`.
    Raises:
        InputError: another convention.
    """
    twice = [(*product, Atom(2)) for product in _multiplied(coupling, convention)]
    return Cost("flops", [twice], coupling.axes, coupling.atoms)


def _multiplied(coupling: Coupling, convention: Convention) -> Iterator[Sequence[Axis]]:
    """The products that are multiply-adds.

    Raises:
        InputError: an unknown convention.
    """
    if convention not in get_args(Convention):
        raise InputError(f"convention={convention!r}: it is one of {', '.join(get_args(Convention))}")
    for applied in coupling.applied.values():
        for made, summed in applied.macs:
            yield *made, *(summed if convention == "left" else (Atom(axis.size) for axis in summed))


def params(coupling: Coupling) -> Cost:
    """Number of parameter elements."""
    products = [coupling.dims[value] for value in coupling.program.parameters]
    return Cost("params", [products], coupling.axes, coupling.atoms)


def memory(coupling: Coupling) -> Cost:
    """Bytes that a run at the example inputs holds at most: parameters, buffers, and activations that live at once."""
    program = coupling.program
    spans = {v: (0, len(program.nodes)) for v in program.state if v.kind != "constant"} | lives(program)
    sums = [[(*coupling.dims[v], Atom(v.dtype.itemsize))] for v in spans]
    return Cost("memory", sums, coupling.axes, coupling.atoms, list(spans.values()))


def channels(coupling: Coupling) -> Cost:
    """Number of channels of all groups together."""
    return Cost("channels", [[(atom,) for atom in coupling.atoms.values()]], coupling.axes, coupling.atoms)


def activations(coupling: Coupling) -> Cost:
    """Elements of the outputs of everything that multiplies and adds, at the example inputs."""
    products = [dims for applied in coupling.applied.values() if applied.macs for dims in applied.outputs]
    return Cost("activations", [products], coupling.axes, coupling.atoms)


COSTS: Mapping[str, Callable[[Coupling], Cost]] = {
    "macs": macs,
    "params": params,
    "memory": memory,
    "channels": channels,
}
"""Cost models by the name a `Target` uses."""


def widths(plan: Plan) -> dict[str, int]:
    """How many channels of each group a plan keeps."""
    return {name: len(kept) for name, kept in plan.groups.items()}

"""What a model costs, as polynomials in the widths of its groups: no plan has to be built or run to know its cost.

MACs are multiply-adds (one multiply-add = 1) of convolutions, linear layers, matrix products and attention at the
example inputs; parameters are counted once each, tied ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphprune.axes import Atom, Axes, Axis
from graphprune.coupling import Coupling
from graphprune.plan import Plan


@dataclass(frozen=True, eq=False)
class Cost:
    """A sum of products of axis widths.

    Attributes:
        name: what it counts.
        products: axes whose widths multiply; the products are added.
        axes: the equations the axes live in.
        atoms: per group name, the atom whose width the group sets.
    """

    name: str
    products: tuple[tuple[Axis, ...], ...]
    axes: Axes
    atoms: Mapping[str, Atom]

    def at(self, widths: Mapping[str, int]) -> int:
        """The cost when each group has the width given; a missing group keeps its size."""
        memo: dict[Axis, Any] = {}
        by_atom = {self.atoms[name]: width for name, width in widths.items()}
        total = 0
        for product in self.products:
            term = 1
            for axis in product:
                term *= self.axes.width(axis, by_atom, memo)
            total += term
        return total


def macs(coupling: Coupling) -> Cost:
    """Multiply-adds of a model at the example inputs."""
    products = tuple(product for applied in coupling.applied.values() for product in applied.macs)
    return Cost("macs", products, coupling.axes, coupling.atoms)


def params(coupling: Coupling) -> Cost:
    """Number of parameter elements."""
    products = tuple(coupling.dims[value] for value in coupling.program.parameters)
    return Cost("params", products, coupling.axes, coupling.atoms)


def activations(coupling: Coupling) -> Cost:
    """Elements of the outputs of everything that multiplies and adds, at the example inputs."""
    products = tuple(dims for applied in coupling.applied.values() if applied.macs for dims in applied.outputs)
    return Cost("activations", products, coupling.axes, coupling.atoms)


COSTS: Mapping[str, Callable[[Coupling], Cost]] = {"macs": macs, "params": params}
"""Cost models by the name a `Target` uses."""


def widths(plan: Plan) -> dict[str, int]:
    """How many channels of each group a plan keeps."""
    return {name: len(kept) for name, kept in plan.groups.items()}

"""The weights behind a channel: in which dims of which parameters it occurs, and at which positions."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from graphprune.axes import Atom, Axis
from graphprune.coupling import Coupling, ties
from graphprune.errors import InputError
from graphprune.program import Value
from graphprune.rules.call import operand_values
from graphprune.trace import parameters

Over = Literal["all", "filters"]
"""Of the weights removed with a channel: all of them, or those that compute it, without biases and scales."""
OVER: tuple[Over, ...] = get_args(Over)
NO_FILTER = "no weight of two dims or more computes the channels of"
_Dim: TypeAlias = tuple[Value, int]


@dataclass(frozen=True)
class Slot:
    """A dim of a tensor of the model's state in which channels occur.

    Attributes:
        value: the tensor.
        dim: which of its dims.
        axis: the index set of that dim.
        atoms: the groups whose channels are meant.
    """

    value: Value
    dim: int
    axis: Axis
    atoms: frozenset[Atom]


def slots(coupling: Coupling, over: Over) -> list[Slot]:
    """The dims of parameters in which channels of groups occur, in order of the parameters.

    Of "filters" a group may have none: the columns of a table of constants, or what a scale makes of an input.
    """
    grouped = frozenset(coupling.atoms.values())
    filters = _filters(coupling) if over == "filters" else None

    @functools.cache
    def groups(axis: Axis) -> frozenset[Atom]:
        return grouped.intersection(coupling.axes.leaves(axis))

    found = []
    for value in coupling.program.parameters:
        for d, dim in enumerate(coupling.dims[value]):
            axis = coupling.axes.find(dim)
            meant = groups(axis)
            if filters is not None:
                meant &= filters[value, d]
            if meant:
                found.append(Slot(value, d, axis, meant))
    return found


def _filters(coupling: Coupling) -> dict[_Dim, set[Atom]]:
    """Per dim of a weight, the channels that it computes: where the weight meets the data, they go on into the result.

    A dim that only the weight and the data have is summed over: its channels are read there, and computed elsewhere.
    A weight that is reshaped or scaled first is followed to where it meets the data. Channels that never meet the data
    are computed where weights meet constants, as in a small network over a table of positions.
    """
    axes, program = coupling.axes, coupling.program
    weights = [value for value in program.parameters if len(value.shape) > 1]
    origin: dict[_Dim, set[_Dim]] = {(w, d): {(w, d)} for w in weights for d in range(len(w.shape))}
    stored = set(program.state)
    found, still = defaultdict[_Dim, set[Atom]](set), defaultdict[_Dim, set[Atom]](set)
    for node in program.nodes:
        operands = operand_values(node)
        places = [*operands, *node.outputs]
        if constant := all(value is None or value in stored for value in operands):
            stored.update(node.outputs)
        for tie in ties(coupling.applied[node.name], axes):
            named = [(value, d, i >= len(operands)) for i, d in tie if (value := places[i]) is not None]
            sources = set[_Dim]().union(*(origin.get((value, d), ()) for value, d, _ in named))
            for value, d in [(value, d) for value, d, written in named if written and sources]:
                if constant:
                    origin.setdefault((value, d), set()).update(sources)
                made = set(axes.leaves(coupling.dims[value][d]))
                for source in sources:
                    (still if constant else found)[source] |= made.intersection(axes.leaves(_axis(source, coupling)))
    reached = set[Atom]().union(*found.values())
    for source, made in still.items():
        found[source] |= made - reached
    return found


def _axis(at: _Dim, coupling: Coupling) -> Axis:
    return coupling.dims[at[0]][at[1]]


def elements(model: nn.Module, coupling: Coupling, over: Over = "all") -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of every group, one member after the other: all that a criterion over weights needs.

    Args:
        model: whose weights are read.
        coupling: whose groups are meant.
        over: "all" members, or the "filters" only (see `Magnitude`).
    Yields:
        A group's name, and the elements of one dim of one parameter that belong to each of its channels: float64, shape
        (channels, elements of each). A group occurs as often as it has members; without filters it does not.
    Raises:
        InputError: a weight is on the meta device, or holds NaN or infinity.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> [(name, *e.shape) for name, e in elements(net, gp.couple(gp.trace(net, torch.zeros(1, 3))))]
        [('0', 8, 3), ('0', 8, 1), ('0', 8, 5)]
    """
    weights = dict(parameters(model))
    names = {atom: name for name, atom in coupling.atoms.items()}
    for slot in slots(coupling, over):
        for atom in slot.atoms:
            yield names[atom], rows(weights[slot.value.target], slot, atom, coupling)


def rows(tensor: torch.Tensor, slot: Slot, atom: Atom, coupling: Coupling) -> torch.Tensor:
    """The elements of a tensor that belong to each channel of one group, float64, shape (channels, elements each).

    The elements of all channels are in one order, so that they can be compared one by one; a complex one counts as two.

    Args:
        tensor: the weight, of the shape that `slot` says.
        slot: the dim along which the channels lie.
        atom: the group.
        coupling: whose axes those are.
    Raises:
        InputError: one of them is NaN or infinite, or the weight is on the meta device.
    """
    loaded(tensor, slot.value.target)
    at, which = (torch.from_numpy(a) for a in coupling.axes.places(slot.axis, {atom: 0}))
    every = at[which.argsort(stable=True)].to(tensor.device)
    picked = tensor.detach().movedim(slot.dim, 0)[every].cpu()
    picked = (torch.view_as_real(picked) if picked.is_complex() else picked).double().reshape(atom.size, -1)
    if not picked.isfinite().all():
        raise InputError(f"{slot.value.target} holds NaN or infinity; channels cannot be compared by it")
    return picked


def loaded(tensor: torch.Tensor, name: str) -> None:
    """Refuse a weight without values.

    Raises:
        InputError: it is on the meta device.
    """
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device and has no values to rank; load weights first")

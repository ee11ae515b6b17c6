"""Where the channels of groups lie in live parameters, and sums over each channel's elements."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance.weights import Slot


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a parameter that the channels of one group take, along one dim.

    Attributes:
        name: of the parameter.
        parameter: the model's own.
        dim: along which the channels lie.
        at, which: positions along it, and the channel at each.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    at: torch.Tensor
    which: torch.Tensor

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of the parameter, or of a tensor of its shape: (positions, elements at each), at least float32."""
        rows = tensor.detach().movedim(self.dim, 0).index_select(0, self.at.to(tensor.device))
        rows = rows.reshape(len(self.at), -1)
        return rows if rows.dtype == torch.float64 or rows.is_complex() else rows.float()

    def add(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        """Add something of the shape of `held` to that piece of a tensor of the parameter's shape, in place."""
        laid_out = tensor.movedim(self.dim, 0)
        shaped = rows.reshape(len(self.at), *laid_out.shape[1:]).to(tensor.dtype)
        laid_out.index_add_(0, self.at.to(tensor.device), shaped)


@dataclass(frozen=True, eq=False)
class Channels:
    """All pieces of one group.

    Attributes:
        size: number of channels.
        pieces: where they lie.
    """

    size: int
    pieces: Sequence[Piece] = field(repr=False)

    @functools.cached_property
    def count(self) -> torch.Tensor:
        """How many elements each channel has, (size,)."""
        each = torch.zeros(self.size, dtype=torch.float64)
        for piece in self.pieces:
            elements = piece.parameter.numel() // piece.parameter.shape[piece.dim]
            each.index_add_(0, piece.which, torch.full((len(piece.which),), float(elements), dtype=torch.float64))
        return each

    def norms(self) -> torch.Tensor:
        """The Euclidean norm of each channel's elements, (size,), float64."""
        squares: torch.Tensor | None = None
        for piece in self.pieces:
            rows = piece.held(piece.parameter).abs().square().sum(1).double()
            squares = rows.new_zeros(self.size) if squares is None else squares
            squares.index_add_(0, piece.which.to(rows.device), rows.to(squares.device))
        assert squares is not None, "a group without pieces is left out"
        return squares.sqrt()

    def sizes(self) -> torch.Tensor:
        """The root mean square of each channel's elements, (size,), float64, on the CPU."""
        return self.norms().cpu() / self.count.sqrt()


def channels(model: nn.Module, coupling: Coupling, slots: Iterable[Slot]) -> dict[str, Channels]:
    """Per group name, where its channels lie among these slots; groups that have none are left out.

    Raises:
        InputError: the coupling is of another model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {atom: name for name, atom in coupling.atoms.items()}
    found: dict[str, list[Piece]] = {}
    for slot in slots:
        target = slot.value.target
        if target not in parameters:
            continue
        parameter = parameters[target]
        if tuple(parameter.shape) != slot.value.shape:
            raise InputError(
                f"{target} is {list(parameter.shape)} in the model and {list(slot.value.shape)} in the coupling; "
                "couple this model: gp.couple(gp.trace(model, example_inputs))"
            )
        for atom in slot.atoms:
            at, which = (torch.from_numpy(a) for a in coupling.axes.places(slot.axis, {atom: 0}))
            found.setdefault(names[atom], []).append(Piece(target, parameter, slot.dim, at, which))
    return {name: Channels(coupling.atoms[name].size, found[name]) for name in coupling.atoms if name in found}


def distinct(groups: Mapping[str, Channels]) -> dict[str, nn.Parameter]:
    """The parameters that the groups lie in, by name, each once."""
    return {piece.name: piece.parameter for held in groups.values() for piece in held.pieces}

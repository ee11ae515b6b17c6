"""Magnitude: the norm of the weights of a channel (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import nn

from graphprune.axes import Atom, Axis, Positions
from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance import choice
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Importance, Scores
from graphprune.importance.weights import NO_FILTER, OVER, Over, Slot, loaded, slots
from graphprune.trace import parameters

PART = 1 << 16
"""Elements of a weight that are widened to float64 at a time."""
Reduce = Literal["norm", "mean", "max"]
Normalize = Literal["mean", "max", "size"] | None
_Members: TypeAlias = list[tuple[torch.Tensor, int]]
"""Per member, the sum of the p-th powers at each position of its axis, and how many elements a position has."""


@dataclass(frozen=True)
class Magnitude:
    """Score channel i by the p-norm of the parameter elements removed with it, over the members of its group.

    A member is one dim of one parameter in which the group occurs, such as the rows of a weight, a bias, or the columns
    of the next weight. Filters alone, as in the paper, are `Magnitude(p=1, over="filters")`; everything that goes with
    a channel, as in DepGraph (Fang et al., CVPR 2023), is the default.

    Args:
        p: order of the norm, positive and finite.
        over: "all" members, or only the "filters" that compute the channel: weights of two dims or more, in the dims
            that go on into the result, without biases, scales and the weights that read the channel.
        reduce: "norm" takes one norm of the elements of all members; "mean" and "max" are those of the members' norms.
        normalize: what makes groups comparable with each other. "mean" and "max" divide the scores of a group by their
            mean or maximum; "size" takes the mean of the p-th powers in every norm instead of their sum, so that
            the number of elements of a channel does not count. None leaves the norms as they are.
        otherwise: scores groups without filters, such as those that a scale makes of an input; with None they are an
            error.
    Raises:
        InputError: `p` is not positive and finite, or another option is none of its words.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> Magnitude(p=1)(net, gp.couple(gp.trace(net, torch.zeros(1, 3))))["0"].shape
        torch.Size([8])
    """

    p: float = 2
    over: Over = "all"
    reduce: Reduce = "norm"
    normalize: Normalize = None
    otherwise: Importance | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p < math.inf:
            raise InputError(f"Magnitude(p={self.p}): the order of a norm is positive and finite, such as 1 or 2")
        words = (None, "mean", "max", "size")
        choice.check(
            self, over=(self.over, OVER), reduce=(self.reduce, get_args(Reduce)), normalize=(self.normalize, words)
        )

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group, in float64.

        Raises:
            InputError: a weight is on the meta device, or holds NaN or infinity.
            CriterionError: only filters are meant, a group has none, and `otherwise` is None.
        """
        return complete(self.norms(model, coupling), model, coupling, self.otherwise, f"Magnitude: {NO_FILTER}")

    def norms(self, model: nn.Module, coupling: Coupling) -> dict[str, torch.Tensor]:
        """The scores of the groups that have members.

        Raises:
            InputError: a weight is on the meta device, or holds NaN or infinity.
        """
        weights = dict(parameters(model))
        sizes = {name: atom.size for name, atom in coupling.atoms.items()}
        starts = dict(zip(sizes, itertools.accumulate((0, *sizes.values())), strict=False))
        first = {atom: starts[name] for name, atom in coupling.atoms.items()}
        memo: dict[Axis, Any] = {}
        found = slots(coupling, self.over)
        placed: list[tuple[_Members, tuple[Positions, Positions]]] = []
        for (axis, atoms), members in _by_axis(found, weights, self.p).items():
            whole = len(atoms) == sum(atom in first for atom in coupling.axes.leaves(axis))
            given = (first, memo) if whole else ({atom: first[atom] for atom in atoms}, {})
            placed.append((members, coupling.axes.places(axis, *given)))
        total = torch.zeros(sum(sizes.values()), dtype=torch.float64)
        (self._one_norm if self.reduce == "norm" else self._of_norms)(placed, total)
        scores = torch.split(total.pow(1 / self.p) if self.reduce == "norm" else total, list(sizes.values()))
        held = {atom for slot in found for atom in slot.atoms}
        return {
            name: self._normalized(score)
            for (name, atom), score in zip(coupling.atoms.items(), scores, strict=True)
            if atom in held
        }

    def _one_norm(self, placed: Sequence[tuple[_Members, tuple[Positions, Positions]]], total: torch.Tensor) -> None:
        """Add up what the elements of each channel are worth, or take the mean."""
        if not placed:
            return
        channels = torch.from_numpy(np.concatenate([which for _, (_, which) in placed]))
        powers = [_together([powers for powers, _ in members])[torch.from_numpy(at)] for members, (at, _) in placed]
        total.index_add_(0, channels, torch.cat(powers))
        if self.normalize == "size":
            elements = [total.new_full(at.shape, sum(n for _, n in members)) for members, (at, _) in placed]
            total /= torch.zeros_like(total).index_add_(0, channels, torch.cat(elements))

    def _of_norms(self, placed: Sequence[tuple[_Members, tuple[Positions, Positions]]], total: torch.Tensor) -> None:
        """The mean or the maximum of the norms of the members that each channel has."""
        count = torch.zeros_like(total)
        for members, (at, which) in placed:
            unique = np.unique(which, return_inverse=True, return_counts=True)
            channels, inverse, repeats = (torch.from_numpy(a) for a in unique)
            for powers, n in members:
                own = powers.new_zeros(len(channels)).index_add_(0, inverse, powers[torch.from_numpy(at)])
                norm = (own / (n * repeats) if self.normalize == "size" else own).pow(1 / self.p)
                total[channels] = total[channels].maximum(norm) if self.reduce == "max" else total[channels] + norm
                count[channels] += 1
        if self.reduce == "mean":
            total /= count

    def _normalized(self, scores: torch.Tensor) -> torch.Tensor:
        if self.normalize not in ("mean", "max"):
            return scores
        by = scores.mean() if self.normalize == "mean" else scores.max()
        return scores / by if by > 0 else scores


def _together(powers: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(powers)).sum(0) if len(powers) > 1 else powers[0]


def _by_axis(
    found: Sequence[Slot], weights: Mapping[str, torch.Tensor], p: float
) -> dict[tuple[Axis, frozenset[Atom]], _Members]:
    """The members, by what they have in common: the axis, and the groups that are meant in it."""
    members: dict[tuple[Axis, frozenset[Atom]], _Members] = {}
    vectors = _vectors({slot.value.target: weights[slot.value.target] for slot in found}, p)
    for value, same in itertools.groupby(found, key=lambda slot: slot.value):
        held = list(same)
        powers = vectors.get(value.target)
        if powers is None:
            powers = _powers(weights[value.target], value.target, [slot.dim for slot in held], p)
        for slot, power in zip(held, powers, strict=True):
            elements = math.prod(value.shape) // value.shape[slot.dim]
            members.setdefault((slot.axis, slot.atoms), []).append((power, elements))
    return members


def _vectors(weights: Mapping[str, torch.Tensor], p: float) -> dict[str, list[torch.Tensor]]:
    """What `_powers` says of weights with one dim, most of which are small: many at once, and none that is not finite.

    Those that are not are left to `_powers`, which says so.
    """
    alike: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        if weight.dim() == 1 and not weight.is_meta:
            alike.setdefault((weight.device, weight.dtype), []).append(name)
    found: dict[str, list[torch.Tensor]] = {}
    for names in alike.values():
        joined = torch.cat([weights[name].detach() for name in names])
        powers = _power((joined.abs() if joined.is_complex() else joined).double(), p).cpu()
        if math.isfinite(powers.sum()):
            parts = torch.split(powers, [len(weights[name]) for name in names])
            found |= {name: [part] for name, part in zip(names, parts, strict=True)}
    return found


def _powers(parameter: torch.Tensor, name: str, dims: Sequence[int], p: float) -> list[torch.Tensor]:
    """The sum of the p-th powers of a weight at each position of each of `dims`, in float64.

    Raises:
        InputError: the weight is on the meta device, or a sum is not finite.
    """
    loaded(parameter, name)
    others, weight = [d for d in range(parameter.dim()) if d not in dims], parameter.detach()
    if any(parameter.shape[d] > 1 for d in others):
        sums = _along(_summed(weight, others, p))
    else:
        first: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for part in _powered(weight.reshape([parameter.shape[d] for d in dims]) if others else weight, p):
            rows, *along = _along(part)
            first.append(rows)
            rest = [held.add_(more) for held, more in zip(rest, along, strict=True)] if rest else along
        sums = [torch.cat(first), *rest]
    sums = [along.cpu() for along in sums]
    if not math.isfinite(sums[0].sum()):  # of one dim, as each sum is over all elements
        raise InputError(f"{name} holds NaN or infinity, or values too large for the {p}-th power; it has no norm")
    return sums


def _summed(weight: torch.Tensor, dims: list[int], p: float) -> torch.Tensor:
    """The sum of the p-th powers over `dims`, without a copy of the whole weight in float64."""
    if 0 not in dims:
        wide = torch.complex128 if weight.is_complex() else torch.float64
        return _power(torch.linalg.vector_norm(weight, p, dim=dims, dtype=wide), p)
    sums = (part.sum(dims) for part in _powered(weight, p))  # a norm over dim 0 is slow
    return functools.reduce(torch.Tensor.add_, sums)


def _powered(weight: torch.Tensor, p: float) -> Iterator[torch.Tensor]:
    """The p-th powers in float64, so many rows at a time as stay in a cache; each part is written over the last."""
    weight = weight.abs() if weight.is_complex() else weight
    rows = max(1, PART // max(1, weight[0].numel())) if weight.numel() > PART else max(1, len(weight))
    wide = torch.empty((rows, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    for part in torch.split(weight, rows):
        yield _power(wide[: len(part)].copy_(part), p)


def _along(held: torch.Tensor) -> list[torch.Tensor]:
    """The sums at each position of each dim."""
    every = range(held.dim())
    return [held.sum([k for k in every if k != d]) for d in every] if held.dim() > 1 else [held.clone()]


def _power(x: torch.Tensor, p: float) -> torch.Tensor:
    """The p-th powers of real numbers, in their place."""
    return x.square_() if p == 2 else x.abs_().pow_(p)

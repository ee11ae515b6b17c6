"""Which channels of the original are left, and which of its groups those of a model pruned from it are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from graphprune.allocate import Target
from graphprune.coupling import Coupling, Group
from graphprune.errors import InputError, UnknownName
from graphprune.importance import Order, Removal, Scores, ordered
from graphprune.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Lifted:
    """The order of what is left of a group as one of the whole group: what is gone goes first and costs nothing.

    Attributes:
        order: of the channels that are left.
        left: their positions in the whole group, ascending.
        size: of the whole group.
    """

    order: Order
    left: tuple[int, ...]
    size: int

    def keep(self, width: int) -> list[int]:
        """The positions that stay when `width` of them do, ascending."""
        if width <= len(self.left):
            return [self.left[i] for i in self.order.keep(width)]
        gone = sorted(set(range(self.size)) - set(self.left))
        return sorted([*self.left, *gone[: width - len(self.left)]])

    @property
    def lost(self) -> torch.Tensor:
        """Shape (size + 1,): nothing more is lost where more than what is left may stay."""
        lost = self.order.lost
        return torch.cat([lost, lost.new_zeros(self.size - len(self.left))])


@dataclass(frozen=True, eq=False)
class Lineage:
    """An original, and what is left of it.

    Attributes:
        coupling: of the original.
        plan: of the original; what is left.
    """

    coupling: Coupling
    plan: Plan

    def origins(self, later: Coupling) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Per group of a model with what is left, the original's group, and each channel's position in that.

        A group that is no group of the original has no entry.
        """
        found = {}
        for group in later.groups:
            origin = self._origin(group, later)
            if origin is not None:
                found[group.name] = origin
        return found

    def _origin(self, group: Group, later: Coupling) -> tuple[str, tuple[int, ...]] | None:
        """Where a group comes from, read off the positions of a dim that it occurs in, before and now."""
        for member in group.members:
            try:
                dims, now = self.coupling.dims[self.coupling.slot(member.name)], later.slot(member.name)
            except UnknownName:
                continue
            axis = dims[member.dim]
            left = self.plan.kept.get(member.name, {}).get(member.dim, torch.arange(axis.size)).numpy()
            at, channel = later.axes.places(later.dims[now][member.dim], {later.atoms[group.name]: 0})
            leaves = set(self.coupling.axes.leaves(axis))
            for name, atom in self.coupling.atoms.items():
                if atom not in leaves or len(self.plan.groups[name]) != group.size:
                    continue
                before = np.full(axis.size, -1)
                positions, numbers = self.coupling.axes.places(axis, {atom: 0})
                before[positions] = numbers
                origin = np.full(group.size, -1)
                origin[channel] = before[left[at]]
                same = np.array_equal(origin[channel], before[left[at]])
                if same and tuple(origin.tolist()) == self.plan.groups[name]:
                    return name, self.plan.groups[name]
        return None

    def stuck(self, later: Coupling) -> dict[str, str]:
        """Per group of the original of which several channels are left but make no group any more: why not."""
        matched = {original for original, _ in self.origins(later).values()}
        left = {name for name, channels in self.plan.groups.items() if len(channels) > 1} - matched
        return {name: self._cause(self.coupling.group(name), later) for name in self.plan.groups if name in left}

    def _cause(self, group: Group, later: Coupling) -> str:
        """Why a group is none any more: what pins its channels, or what they are part of now."""
        names = {atom: name for name, atom in later.atoms.items()}
        parts: dict[str, None] = {}
        for member in group.members:
            try:
                axis, now = self.coupling.dims[self.coupling.slot(member.name)][member.dim], later.slot(member.name)
            except UnknownName:
                continue
            if member.name in later.program.unused:
                continue
            left = self.plan.kept.get(member.name, {}).get(member.dim, torch.arange(axis.size)).numpy()
            positions, _ = self.coupling.axes.places(axis, {self.coupling.atoms[group.name]: 0})
            own = np.flatnonzero(np.isin(left, positions))
            there = later.dims[now][member.dim]
            for atom in later.axes.leaves(there):
                if not np.isin(later.axes.places(there, {atom: 0})[0], own).any():
                    continue
                if pin := later.axes.pin_of(atom):
                    return str(pin)
                parts[names[atom]] = None
        return f"it is part of {', '.join(parts)}" if parts else "no tensor of it is left that the forward reads"

    def lifted(self, scores: Scores, later: Coupling) -> dict[str, torch.Tensor | Order]:
        """Scores of a model with what is left, as scores of the groups of the original.

        What is left of a group may be no group any more, as its ops may tie or pin other parts at other sizes. It gets
        no scores, so that it stays, and counts as a whole group. A single channel is never a group; it counts as one.

        Raises:
            InputError: an order is of another size than its group.
        """
        origins = self.origins(later)
        found: dict[str, torch.Tensor | Order] = {}
        for name, score in scores.items():
            group = later.group(name)
            if name not in origins:
                continue
            original, left = origins[name]
            whole = self.plan.sizes[original]
            if len(left) == whole:
                found[original] = score
                continue
            order = ordered(score)
            if order.size != group.size:
                raise InputError(f"the order of group {name!r} is of {order.size} channels; the group has {group.size}")
            found[original] = Lifted(order, left, whole)
        matched = {original for original, _ in origins.values()}
        one = Removal(torch.zeros(1, dtype=torch.long), torch.zeros(1))
        for name, left in self.plan.groups.items():
            if name not in matched and len(left) == 1 < self.plan.sizes[name]:
                found[name] = Lifted(one, left, self.plan.sizes[name])
        return found

    def named(self, found: Mapping[str, T], later: Coupling) -> dict[str, T]:
        """What was found of the groups of a model with what is left, by the names of the original's groups."""
        origins = self.origins(later) if found else {}
        return {origins[name][0]: item for name, item in found.items() if name in origins}

    def capped(self, target: Target) -> Target:
        """The target under which no group gets more than is left of it, where it says nothing of channels itself."""
        if target.channels is not None:
            return target
        return replace(target, channels={n: len(left) / self.plan.sizes[n] for n, left in self.plan.groups.items()})

    def below(self, plan: Plan, later: Coupling) -> Plan:
        """The plan of a model with what is left that leaves of that what `plan`, of the original, keeps."""
        keep = {}
        for name, (original, left) in self.origins(later).items():
            stays = set(plan.groups[original])
            keep[name] = [channel for channel, position in enumerate(left) if position in stays]
        return Plan.of(later, keep)

    def after(self, plan: Plan, later: Coupling) -> Lineage:
        """What is left once `plan`, of a model with what is left now, is carried out."""
        groups: Mapping[str, tuple[int, ...]] = self.plan.groups
        cut = {
            original: [left[channel] for channel in plan.groups[name]]
            for name, (original, left) in self.origins(later).items()
        }
        return Lineage(self.coupling, Plan.of(self.coupling, {**groups, **cut}))

"""What stays: kept positions per group, and what that means for every parameter and buffer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.axes import Axis, Mask
from graphprune.coupling import Coupling
from graphprune.errors import PlanError, nearest
from graphprune.trace import held

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A decision about every group of a model.

    Attributes:
        groups: kept positions per group name, ascending; every group is listed, whole ones too.
        sizes: channels per group name before pruning.
        shapes: shape of every parameter and buffer the plan was made for, by fully qualified name.
        kept: per fully qualified name of each parameter and buffer that shrinks, `{dim: LongTensor of kept positions}`.
        left: per fully qualified name, the dim along which a parameter is left as it is when the rest is zeroed.

    Example:
        >>> import graphprune as gp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5))
        >>> plan = Plan.of(gp.couple(gp.trace(net, torch.zeros(1, 3))), {"0": [0, 2]})
        >>> plan.kept["2.weight"]
        {1: tensor([0, 2])}
    """

    groups: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, torch.Tensor]] = field(compare=False, repr=False)
    left: Mapping[str, int] = field(compare=False, repr=False, default_factory=dict)

    @classmethod
    def of(cls, coupling: Coupling, keep: Mapping[str, Sequence[int]]) -> Plan:
        """The plan that keeps these positions of these groups, and everything else.

        Args:
            coupling: whose groups are meant.
            keep: kept positions per group name, in any order; a missing group stays whole.
        Raises:
            UnknownName: no such group.
            PlanError: a position is out of range or repeated, or nothing of a group would stay.
        """
        groups = {g.name: tuple(range(g.size)) for g in coupling.groups}
        for name, positions in keep.items():
            groups[name] = _valid(name, positions, coupling.group(name).size)
        return cls(
            groups=groups,
            sizes={g.name: g.size for g in coupling.groups},
            shapes={v.target: v.shape for v in coupling.program.state if v.target},
            kept=_kept(coupling, groups),
            left={
                **coupling.left,
                **{a: coupling.left[t] for a, t in coupling.program.aliases.items() if t in coupling.left},
            },
        )

    @property
    def removed(self) -> int:
        """How many channels go, over all groups."""
        return sum(self.sizes[name] - len(positions) for name, positions in self.groups.items())

    def check(self, coupling: Coupling) -> None:
        """Refuse a coupling that this plan was not made for.

        Raises:
            PlanError: groups or shapes differ; the message names the first differences.
        """
        sizes = {g.name: g.size for g in coupling.groups}
        shapes = {v.target: v.shape for v in coupling.program.state if v.target}
        wrong = [
            f"group {name!r} has {self.sizes[name]} channels in the plan and {sizes.get(name, 'is not')} in the model"
            + (nearest(name, sizes) if name not in sizes else "")
            for name in self.sizes
            if sizes.get(name) != self.sizes[name]
        ]
        wrong += [f"group {name!r} is not in the plan" for name in sizes if name not in self.sizes]
        wrong += [
            f"{name} is {list(self.shapes[name])} in the plan, {list(shapes.get(name, ())) or 'missing'} in the model"
            for name in self.shapes
            if shapes.get(name) != self.shapes[name]
        ]
        if wrong:
            more = f"\n  and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise PlanError(
                "the plan was made for another model:\n  "
                + "\n  ".join(wrong[:4])
                + more
                + "\nmake a new plan from this model's coupling: Plan.of(coupling, {...})"
            )

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Raises:
            PlanError: a parameter or buffer has another shape; the message names the first ones.
        """
        of_model = dict(held(model))
        wrong = [
            f"{name} is {list(self.shapes[name])} in the plan, {list(tensor.shape)} in the model"
            for name, tensor in of_model.items()
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]
        ]
        if not of_model.keys() & self.shapes.keys():
            wrong = ["they have no parameter or buffer in common"]
        if wrong:
            raise PlanError("the plan was made for another model:\n  " + "\n  ".join(wrong[:4]))

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data: lists, tables, numbers and texts."""
        return {
            "format": FORMAT,
            "groups": {name: list(positions) for name, positions in self.groups.items()},
            "sizes": dict(self.sizes),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "left": dict(self.left),
            "kept": {n: {str(d): k.tolist() for d, k in dims.items()} for n, dims in self.kept.items()},
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_data())

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """The plan that `to_data` gave.

        Raises:
            PlanError: it is not such a plan.
        """
        try:
            if data["format"] != FORMAT:
                raise PlanError(f"plan format {data['format']} is not {FORMAT}, the one this version reads")
            plan = cls(
                groups={name: tuple(positions) for name, positions in data["groups"].items()},
                sizes={name: _size(size) for name, size in data["sizes"].items()},
                shapes={name: tuple(map(_size, shape)) for name, shape in data["shapes"].items()},
                left={name: _size(dim) for name, dim in data.get("left", {}).items()},
                kept={
                    name: {int(d): torch.tensor(k, dtype=torch.long) for d, k in dims.items()}
                    for name, dims in data["kept"].items()
                },
            )
            for name, positions in plan.groups.items():
                _valid(name, positions, plan.sizes[name])
            for name, dims in plan.kept.items():
                for dim, kept in dims.items():
                    _check_kept(name, plan.shapes.get(name), dim, kept)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, IndexError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}; write plans with plan.to_json()") from error
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not such a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}; write plans with plan.to_json()") from error
        return cls.from_data(data)


def _size(value: object) -> int:
    """A size.

    Raises:
        TypeError: it is none.
    """
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.40} is no size")
    return value


def _check_kept(name: str, shape: tuple[int, ...] | None, dim: int, kept: torch.Tensor) -> None:
    """Refuse kept positions that are not those of a dim of this shape; names without a shape are further names.

    Raises:
        PlanError: they are not.
    """
    fits = kept.dim() == 1 and len(kept) > 0 and int(kept[0]) >= 0 and bool((kept[1:] > kept[:-1]).all())
    if not fits or dim < 0 or (shape is not None and (dim >= len(shape) or int(kept[-1]) >= shape[dim])):
        raise PlanError(f"the positions kept of dim {dim} of {name} are not those of a dim of {shape}, ascending")


def _valid(name: str, positions: Sequence[int], size: int) -> tuple[int, ...]:
    """Kept positions, checked and in order.

    Raises:
        PlanError: none, no ints, out of range, or repeated.
    """
    given = positions.tolist() if hasattr(positions, "tolist") else list(positions)
    if any(isinstance(p, bool) or not isinstance(p, int) for p in given):
        raise PlanError(f"group {name!r}: positions are ints, not {given[:4]}; for a mask use mask.nonzero().flatten()")
    if not given:
        raise PlanError(f"group {name!r}: keeping none of {size} channels would cut the network; keep at least one")
    wrong = sorted({p for p in given if not 0 <= p < size})
    if wrong:
        raise PlanError(f"group {name!r} has positions 0..{size - 1}, not {wrong[:8]}")
    if len(set(given)) != len(given):
        twice = sorted({p for p in given if given.count(p) > 1})
        raise PlanError(f"group {name!r}: positions {twice[:8]} are listed twice; list each kept position once")
    return tuple(sorted(given))


def _kept(coupling: Coupling, groups: Mapping[str, Sequence[int]]) -> dict[str, dict[int, torch.Tensor]]:
    """Kept positions per dim of each state tensor that shrinks, under all its names."""
    keep = coupling.keep({n: k for n, k in groups.items() if len(k) < coupling.atoms[n].size})
    memo: dict[Axis, Mask] = {}

    @functools.cache
    def positions(axis: Axis) -> torch.Tensor | None:
        mask = coupling.axes.mask(axis, keep, memo)
        return None if mask.all() else torch.from_numpy(np.flatnonzero(mask))

    kept: dict[str, dict[int, torch.Tensor]] = {}
    for value in coupling.program.state:
        found = [positions(coupling.axes.find(axis)) for axis in coupling.dims[value]]
        dims = {d: stay for d, stay in enumerate(found) if stay is not None}
        if value.target and dims:
            kept[value.target] = dims
    for alias, target in coupling.program.aliases.items():
        if target in kept:
            kept[alias] = kept[target]
    return kept


def sliced(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """`tensor` with only the kept positions of each dim given."""
    out = tensor.detach()
    for dim, positions in kept.items():
        out = out.index_select(dim, positions.to(out.device))
    return out.clone() if out.data_ptr() == tensor.data_ptr() else out

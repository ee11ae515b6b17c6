"""What a pruned model must compute: the original with everything zeroed that the plan removes.

The direction of a weight norm stays where its scale is zeroed: a direction of zeros has no norm.

Nothing but the plan is needed for it, unless a renormalised group loses channels: then it is the traced graph in which
those normalisations see only the kept positions. Also here: the inputs and weights to compare on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphprune.axes import Axis, Mask
from graphprune.coupling import Coupling
from graphprune.interpret import interpret
from graphprune.plan import Plan
from graphprune.program import Node
from graphprune.rules import Applied
from graphprune.trace import Inputs, held, parameters, run

FAINT = 1e-2
"""A parameter whose largest value is below this is drawn anew for the comparison on fresh inputs."""


def zeroed(model: nn.Module, plan: Plan, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state of `model`, or `state` where it says otherwise, with everything that `plan` removes set to 0.

    Returns:
        Copies of the tensors that the plan shrinks, by fully qualified name, at their original shapes.
    """
    out: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for name, tensor in held(model):
        if name not in plan.kept:
            continue
        if id(tensor) not in made:
            kept = {d: positions for d, positions in plan.kept[name].items() if d != plan.left.get(name)}
            made[id(tensor)] = _zero_removed((state or {}).get(name, tensor).detach(), kept)
        out[name] = made[id(tensor)]
    return out


def _zero_removed(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    out = tensor.clone()
    bits = out.view(torch.uint8) if tensor.element_size() == 1 else out  # there is no index_fill_ for float8
    for dim, positions in kept.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        gone[positions.to(tensor.device)] = False
        bits.index_fill_(dim, gone.nonzero().flatten(), 0)
    return out


def run_zeroed(model: nn.Module, plan: Plan, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs of `model` in eval mode with everything that `plan` removes zeroed; the model is left untouched."""
    return run(model, inputs, zeroed(model, plan))


def reference(
    model: nn.Module, coupling: Coupling, plan: Plan, inputs: Inputs, state: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What the pruned model must compute, with some weights replaced."""
    masked = Masked(coupling, plan)
    if not masked.nodes:
        return run(model, inputs, {**state, **zeroed(model, plan, state)})
    every = {**dict(held(model)), **state, **zeroed(model, plan, state)}
    return interpret(coupling.program, every, inputs, stand_in=masked.stand_in)


class Masked:
    """Normalisations over renormalised groups, computed over the kept positions and put back among zeros."""

    def __init__(self, coupling: Coupling, plan: Plan) -> None:
        self.coupling = coupling
        self.keep = coupling.keep({n: k for n, k in plan.groups.items() if len(k) < plan.sizes[n]})
        self.memo: dict[Axis, Mask] = {}
        self.nodes: dict[str, Applied] = {
            name: applied
            for name, applied in coupling.applied.items()
            if any(not self.mask(axis).all() for axis in applied.renormalised)
        }

    def mask(self, axis: Axis) -> Mask:
        """Which positions of `axis` the plan keeps."""
        return self.coupling.axes.mask(axis, self.keep, self.memo)

    def gather(self, tensor: torch.Tensor, dims: tuple[Axis, ...]) -> torch.Tensor:
        """The kept positions of every dim."""
        for d, axis in enumerate(dims):
            kept = torch.from_numpy(self.mask(axis)).nonzero().flatten()
            tensor = tensor.index_select(d, kept.to(tensor.device)) if len(kept) < axis.size else tensor
        return tensor

    def scatter(self, tensor: torch.Tensor, dims: tuple[Axis, ...]) -> torch.Tensor:
        """The same positions back in a tensor of zeros."""
        for d, axis in enumerate(dims):
            kept = torch.from_numpy(self.mask(axis)).nonzero().flatten().to(tensor.device)
            if len(kept) < axis.size:
                shape = [*tensor.shape[:d], axis.size, *tensor.shape[d + 1 :]]
                tensor = tensor.new_zeros(shape).index_copy(d, kept, tensor)
        return tensor

    def stand_in(self, node: Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The op over the kept positions; None for an op that is not concerned."""
        applied = self.nodes.get(node.name)
        if applied is None:
            return None
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = self.gather(value, self.coupling.dims[node.arguments[name]])
        for literal in applied.literals:
            name, *index = literal.path
            size = int(self.mask(literal.axis).sum())
            if literal.path[0] not in given:
                continue
            if index:
                items = list(given[str(name)])
                items[int(index[0])] = size
                given[str(name)] = items
            else:
                given[str(name)] = size
        result = target(**given)
        if isinstance(result, torch.Tensor):
            return self.scatter(result, applied.outputs[0])
        return tuple(self.scatter(r, dims) for r, dims in zip(result, applied.outputs, strict=True))


# -- what to compare on ---------------------------------------------------------------------------------------------


def lively(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Values for the parameters of `model` that are too small to matter, such as zero-initialised scales.

    Behind such a scale a branch could be wrong without moving the output.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for name, parameter in parameters(model):
        if not parameter.is_floating_point() or parameter.numel() == 0 or parameter.detach().abs().max() >= FAINT:
            continue
        if id(parameter) not in made:
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                noise = (noise - 0.5) * 2 / max(1, parameter[0].numel()) ** 0.5
            made[id(parameter)] = noise.to(parameter)
        state[name] = made[id(parameter)]
    return state


def like(inputs: Inputs, seed: int) -> Inputs:
    """Random inputs like the example: noise of the same mean and spread for floats, ints in another order."""
    generator = torch.Generator().manual_seed(seed)

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            known = tensor.double().cpu()
            return (noise * known.std() + known.mean()).to(tensor)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].reshape(tensor.shape)

    return inputs.map(new)


def shuffled(inputs: Inputs, seed: int) -> Inputs:
    """The rows of the example (its positions along dim 0) in another order, the same for all tensors."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, torch.Tensor] = {}

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim():
            return tensor
        order = orders.setdefault(tensor.shape[0], torch.randperm(tensor.shape[0], generator=generator))
        return tensor.index_select(0, order.to(tensor.device))

    return inputs.map(new)

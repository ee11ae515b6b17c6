"""Magnitude: the norm of the weights of a channel (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError


@dataclass(frozen=True)
class Magnitude:
    """Score channel i by the p-norm of all parameter elements removed with it, over all members of its group.

    Args:
        p: order of the norm, positive.
    Raises:
        InputError: `p` is not positive.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> Magnitude(p=1)(net, gp.couple(gp.trace(net, torch.zeros(1, 3))))["0"].shape
        torch.Size([8])
    """

    p: float = 2

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise InputError(f"Magnitude(p={self.p}): the order of a norm is positive, such as 1 or 2")

    def __call__(self, model: nn.Module, coupling: Coupling) -> dict[str, torch.Tensor]:
        """Score every channel of every group, in float64.

        Raises:
            InputError: a weight is on the meta device.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = {atom: name for name, atom in coupling.atoms.items()}
        scores = {name: torch.zeros(atom.size, dtype=torch.float64) for name, atom in coupling.atoms.items()}
        for value in coupling.program.parameters:
            weight = parameters[value.target].detach()
            if weight.is_meta:
                raise InputError(f"{value.target} is on the meta device and has no values to rank; load weights first")
            dims = coupling.dims[value]
            found = {d: [p for p in coupling.axes.places(axis) if p[0] in names] for d, axis in enumerate(dims)}
            if not any(found.values()):
                continue
            power = weight.double().abs().pow(self.p)
            for d, places in found.items():
                if places:
                    along = (
                        power.sum(dim=[k for k in range(power.dim()) if k != d]).cpu()
                        if power.dim() > 1
                        else power.cpu()
                    )
                    for atom, at, of in places:
                        scores[names[atom]].index_add_(0, torch.from_numpy(of.copy()), along[torch.from_numpy(at)])
        return {name: score.pow(1 / self.p) for name, score in scores.items()}

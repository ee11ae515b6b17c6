"""Growing L2: what is to be removed decays faster and faster (Wang et al., Neural Pruning via Growing Regularization,
ICLR 2021; its GReg-1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance.weights import slots
from graphprune.plan import Plan
from graphprune.training.penalty import Penalty
from graphprune.training.pieces import channels


class GrowingL2(Penalty):
    """Adds strength * weight for all weights that a plan removes; the strength grows by `by` every `every` steps.

    So the network gives those channels up little by little, and their removal changes nothing in the end. After the
    strength has come to its ceiling, go on for a while, then remove them: `gp.rewrite(model, inputs, coupling, plan)`.

    Args:
        model: what is trained; of a `DistributedDataParallel` its `module`.
        coupling: of it.
        plan: what is to be left; the paper's is `gp.allocate(Magnitude(p=1)(model, coupling), target, coupling)`.
        by: by how much the strength grows each time.
        every: after how many steps it does.
        ceiling: the largest strength; lr * ceiling must stay below 1.
    Raises:
        InputError: a number is not positive, or the plan removes nothing.
        PlanError: the plan is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        plan: Plan,
        *,
        by: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ) -> None:
        if not (by > 0 and every > 0 and ceiling > 0):
            raise InputError(f"GrowingL2: by={by}, every={every}, ceiling={ceiling}: each must be more than 0")
        plan.check(coupling)
        plan.check_model(model)
        if not plan.removed:
            raise InputError("GrowingL2: the plan removes nothing; allocate one with a target below 1")
        super().__init__(channels(model, coupling, slots(coupling, "all")), self._strength)
        self.by, self.every, self.ceiling = by, every, ceiling
        self._removed = {
            name: _removed(parameter, kept)
            for name, parameter in self._parameters.items()
            if (kept := {d: k for d, k in plan.kept.get(name, {}).items() if d != plan.left.get(name)})
        }

    def _strength(self, step: int) -> float:
        return min(self.ceiling, self.by * (1 + step // self.every))

    @property
    def full(self) -> bool:
        """Whether the strength has come to its ceiling."""
        return self._strength(self.step) >= self.ceiling

    def _add(self, strength: float) -> None:
        for name, removed in self._removed.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                here = removed.to(parameter.device)
                parameter.grad.add_(torch.where(here, parameter.detach(), 0), alpha=strength)


def _removed(parameter: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Which elements a plan removes, of the shape of the parameter."""
    gone = torch.ones(parameter.shape, dtype=torch.bool)
    index = [torch.arange(n) for n in parameter.shape]
    for dim, positions in kept.items():
        index[dim] = positions.cpu()
    gone[torch.meshgrid(*index, indexing="ij")] = False
    return gone

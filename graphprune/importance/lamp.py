"""LAMP: magnitude relative to what would be left of the group (Lee et al., ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance.magnitude import Magnitude


@dataclass(frozen=True)
class LAMP:
    """Score channel i by |w_i|^2 / sum of |w_j|^2 over the channels j of its group with |w_j| >= |w_i|.

    "Layer-adaptive Sparsity for the Magnitude-based Pruning" scores single weights of a layer like that (equation 4);
    here a group is the layer and everything removed with a channel is the weight. Inside a group the ranking is that
    of `Magnitude(p=2)`. Across groups scores are comparable: each is the squared part of what is left of the group
    that removing the channel would distort. Of channels of equal norm the first counts as the larger, so that one
    channel of every group scores 1, however many are equal. Zeros score 0.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
        >>> net[0].weight = nn.Parameter(torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64))
        >>> net[2].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        >>> LAMP()(net, gp.couple(gp.trace(net, torch.zeros(1, 1, dtype=torch.float64))))["0"].tolist()
        [0.2, 1.0, 0.0]
    """

    def __call__(self, model: nn.Module, coupling: Coupling) -> dict[str, torch.Tensor]:
        """Score every channel of every group, in float64, between 0 and 1.

        Raises:
            InputError: a weight is on the meta device, or holds NaN or infinity.
        """
        return {name: relative(norm.square()) for name, norm in Magnitude(p=2).norms(model, coupling).items()}


def relative(squares: torch.Tensor) -> torch.Tensor:
    """Each value divided by the sum of itself and all that rank above it, of equal ones the first; 0 for 0."""
    order = squares.argsort(descending=True, stable=True)
    left = torch.empty_like(squares).index_copy_(0, order, squares[order].cumsum(0))
    return torch.where(squares > 0, squares / left, 0.0)

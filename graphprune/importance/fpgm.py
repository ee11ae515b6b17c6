"""FPGM: channels near the geometric median of their group can be replaced by the others (He et al., CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Importance, Scores
from graphprune.importance.weights import NO_FILTER, OVER, Over, elements

CHUNK = 2**24
"""How many distances are held at a time (128 MiB)."""


@dataclass(frozen=True)
class FPGM:
    """Score channel i by g(i) = sum_j |w_i - w_j|, the sum of its distances to the other channels of its group.

    That is equation 6 of "Filter Pruning via Geometric Median": the lowest g is nearest to the geometric median, and
    goes first. A group has several members, dims of parameters in which it occurs: g is summed over them, with w_i all
    elements of a member that belong to channel i. The scale of g grows with the width of a group, so that it ranks
    channels inside a group and not across groups.

    Args:
        over: only the "filters" that compute the channel, as in the paper: weights of two dims or more, in the dims
            that go on into the result; or "all" members.
        otherwise: scores groups without filters, such as those that a scale makes of an input; with None they are an
            error.
    Raises:
        InputError: `over` is neither.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).double()
        >>> net[0].weight = nn.Parameter(torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64))
        >>> FPGM()(net, gp.couple(gp.trace(net, torch.zeros(1, 1, dtype=torch.float64))))["0"].tolist()
        [6.0, 5.0, 9.0]
    """

    over: Over = "filters"
    otherwise: Importance | None = None

    def __post_init__(self) -> None:
        choice.check(self, over=(self.over, OVER))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group, in float64.

        Raises:
            InputError: a weight is on the meta device, or holds NaN or infinity.
            CriterionError: only filters are meant, a group has none, and `otherwise` is None.
        """
        scores: dict[str, torch.Tensor] = {}
        for name, members in elements(model, coupling, self.over):
            scores[name] = distances(members) + scores.get(name, 0)
        return complete(scores, model, coupling, self.otherwise, f"FPGM: {NO_FILTER}")


def distances(points: torch.Tensor) -> torch.Tensor:
    """The sum of the distances from each point to all others, shape (n,) from (n, d).

    Distances come from products of the points, |a|^2 + |b|^2 - 2 ab, so no (n, n, d) is made; the points are centred
    first, which keeps that difference from cancelling where all points are far from zero and near to each other. What
    is left of rounding in the distance from a point to itself is taken out.
    """
    points = points - points.mean(0)
    rows_at_a_time, mode = max(1, CHUNK // len(points)), "use_mm_for_euclid_dist"
    sums = []
    for k, chunk in enumerate(torch.split(points, rows_at_a_time)):
        apart = torch.cdist(chunk, points, compute_mode=mode)
        apart.diagonal(k * rows_at_a_time).zero_()
        sums.append(apart.sum(1))
    return torch.cat(sums)

"""Rank: the mean matrix rank of a channel's feature maps (Lin et al., HRank, CVPR 2020)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import nn

from graphprune.calibrate import Activations
from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.data import FromData, seen
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Scores

Variant = Literal["rank", "edge", "reverse"]


@dataclass(frozen=True)
class Rank(FromData):
    """Score a channel by the mean rank of its feature maps where layers read them: after the activation, after the add.

    The tolerance of a rank is that of `torch.linalg.matrix_rank`. A value that several layers read counts once, and
    different values with channels of one group are averaged. A map is what a value holds for one sample and channel:
    its image, or the tokens and dims of a head; groups without at least two such dims are left to `otherwise`. Ranks
    tie often on small maps: of equal ones the channel with the larger mean square stays.

    Args:
        variant: "rank"; or, from the paper's ablation, "edge", which cuts the lowest and the highest ranks in turn, and
            "reverse", which cuts the highest.
        normalised: divide by the smaller side of the maps, so that ranks of different layers compare.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> Rank([images])(net, gp.couple(gp.trace(net, images)))["0"].shape
        torch.Size([8])
    """

    _: KW_ONLY
    variant: Variant = "rank"
    normalised: bool = False

    def __post_init__(self) -> None:
        choice.check(self, variant=(self.variant, ("rank", "edge", "reverse")))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group that has maps, in float64.

        Raises:
            CalibrationError: the batches cannot be used.
            CriterionError: a group has no maps and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["ranks", "activations"])
        scores = {}
        for name in seen(found.ranks):
            held = found.ranks[name]
            total = held.total + _between(found.activations[name]) / 2  # less than one rank more
            score = total / (held.largest if self.normalised else held.count)
            scores[name] = _varied(score, self.variant)
        return complete(scores, model, coupling, self.otherwise, "Rank: there are no feature maps in")


def _between(held: Activations) -> torch.Tensor:
    """Places by mean square, in [0, 1)."""
    return (held.squares / held.count).argsort().argsort() / len(held.squares)


def _varied(score: torch.Tensor, variant: Variant) -> torch.Tensor:
    if variant == "reverse":
        return -score
    if variant == "edge":
        place = score.argsort().argsort().double()
        return -(place - (len(score) - 1) / 2).abs()
    return score

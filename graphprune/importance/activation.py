"""Activation: what a channel carries into the layers that read it (An et al., Fluctuation-based Adaptive Structured
Pruning, AAAI 2024; Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.data import FromData
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Scores
from graphprune.importance.reading import Read, readings


@dataclass(frozen=True)
class Activation(FromData):
    """Score a channel by the sum of x_j^2 |w_j|^2 over its columns j in the layers that read it.

    Args:
        moment: "energy" takes the mean of x_j^2; "fluctuation" its variance, since a bias can make up for a mean.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> rows = torch.randn(64, 3)
        >>> Activation([rows])(net, gp.couple(gp.trace(net, rows)))["0"].shape
        torch.Size([8])
    """

    _: KW_ONLY
    moment: Literal["energy", "fluctuation"] = "energy"

    def __post_init__(self) -> None:
        choice.check(self, moment=(self.moment, ("energy", "fluctuation")))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group that a linear layer or convolution reads, in float64.

        Raises:
            CalibrationError: the batches cannot be used.
            CriterionError: no such layer reads a group and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["means"]).moments
        reads = readings(model, coupling, found)
        scores = {name: torch.stack([self._carried(r) for r in each]).sum(0) for name, each in reads.items()}
        return complete(scores, model, coupling, self.otherwise, "Activation: no linear layer or convolution reads")

    def _carried(self, read: Read) -> torch.Tensor:
        """Of every channel, into one layer."""
        moment = read.moments.energy
        if self.moment == "fluctuation":
            moment = (moment - read.moments.mean.square()).clamp(min=0)
        return read.of_channels((read.weight.square().sum((1, 3)) * moment).sum(0))

"""APoZ: how often a channel is zero (Hu et al., Network Trimming, 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance.data import FromData, seen
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Scores


@dataclass(frozen=True)
class APoZ(FromData):
    """Score a channel by the fraction of its activations that are not zero, where layers read them.

    Of a group that layers read only after pooling, zeros of the maps before it are counted, too: a mean over a map is
    hardly ever zero. Groups in which nothing is ever zero, as behind activations other than ReLU, are
    left to `otherwise`.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> rows = torch.randn(64, 3)
        >>> APoZ([rows])(net, gp.couple(gp.trace(net, rows)))["0"].shape
        torch.Size([8])
    """

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group that has zeros, in float64.

        Raises:
            CalibrationError: the batches cannot be used.
            CriterionError: no activation of a group is zero and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["activations"]).activations
        scores = {name: 1 - found[name].zeros / found[name].looked for name in seen(found) if found[name].zeros.any()}
        return complete(scores, model, coupling, self.otherwise, "APoZ: no activation is zero in")

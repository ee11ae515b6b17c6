"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling import Coupling


@dataclass(frozen=True)
class Random:
    """Score channels at random, the same way for the same seed; the global random state is left alone.

    Args:
        seed: of the generator.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> coupling = gp.couple(gp.trace(net, torch.zeros(1, 3)))
        >>> torch.equal(Random(seed=1)(net, coupling)["0"], Random(seed=1)(net, coupling)["0"])
        True
    """

    seed: int = 0

    def __call__(self, model: nn.Module, coupling: Coupling) -> dict[str, torch.Tensor]:
        """Score every channel of every group uniformly in [0, 1)."""
        generator = torch.Generator().manual_seed(self.seed)
        return {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in coupling.groups}

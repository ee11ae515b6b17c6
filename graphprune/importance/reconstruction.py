"""Reconstruction: how well the layers that read a group do without a channel (Luo et al., ThiNet, ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.data import FromData
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Order, Removal, Scores
from graphprune.importance.reading import Read, readings
from graphprune.solvers import forward_selection, greedy_removal

Search = Literal["removal", "selection"]


@dataclass(frozen=True)
class Reconstruction(FromData):
    """Let go, one after the other, of the channels without which the outputs of the layers that read them change least.

    Everything is computed from exact second moments of what those layers read, over all samples and positions. Gives an
    order of removal: what a channel is worth depends on those that went before it.

    Args:
        search: "removal" is ThiNet's greedy algorithm, the change of the outputs with the weights as they are, summed
            over all layers that read the group. "selection" adds channels to none, each time the one that helps a least
            squares fit most (the journal version's better variant); groups that are read as several values or only in
            part, such as a residual stream, take "removal".

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> rows = torch.randn(64, 3)
        >>> order = Reconstruction([rows])(net, gp.couple(gp.trace(net, rows)))["0"]
        >>> len(order.keep(3)), order.lost.shape
        (3, torch.Size([9]))
    """

    _: KW_ONLY
    search: Search = "removal"

    def __post_init__(self) -> None:
        choice.check(self, search=(self.search, ("removal", "selection")))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """An order for every group that a linear layer or convolution reads.

        Raises:
            CalibrationError: the batches cannot be used.
            CriterionError: no such layer reads a group and `otherwise` is None.
        """
        moments = self.calibration(model, coupling, ["moments"]).moments
        scores: dict[str, torch.Tensor | Order] = {}
        for name, reads in readings(model, coupling, moments).items():
            selected = _selected(reads) if self.search == "selection" else None
            scores[name] = selected or Removal(*greedy_removal(torch.stack([r.gram for r in reads]).sum(0)))
        return complete(scores, model, coupling, self.otherwise, "Reconstruction: no linear layer or convolution reads")


def _selected(reads: Sequence[Read]) -> Removal | None:
    """Forward selection, where all layers read the same columns; None elsewhere."""
    first = reads[0]
    order = torch.argsort(first.which, stable=True)
    columns = first.at[order]
    each = len(columns) // first.size
    alike = all(r.value == first.value and r.weight.shape[::2] == first.weight.shape[::2] for r in reads)
    whole = len(columns) == first.weight.shape[2] == each * first.size and bool((first.which.bincount() == each).all())
    if not alike or not whole or first.weight.shape[0] > 1 or first.weight.shape[3] > 1:
        return None
    stacked = torch.cat([r.weight[0, :, columns, 0] for r in reads])
    found = forward_selection(first.moments.second[0][columns][:, columns], stacked, taps=each)
    return Removal(found.order, found.lost.diff().flip(0).neg())

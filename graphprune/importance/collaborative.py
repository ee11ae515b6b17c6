"""Collaborative: channels chosen together, by the second-order loss of removing the whole set (Peng et al.,
Collaborative Channel Pruning for Deep Networks, ICML 2019).
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import nn

from graphprune.calibrate import Loss
from graphprune.coupling import Coupling
from graphprune.importance.data import FromData, moved
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Order, Scores
from graphprune.solvers import selections

WIDTHS = 17
"""At how many widths the loss of a selection is computed; between them it is interpolated."""


@dataclass(frozen=True, eq=False)
class Selections:
    """The best set to remove at each width; sets of different widths need not be nested.

    Attributes:
        linear, matrix: removing the channels with z = 1 costs linear.z + z' matrix z.
    """

    linear: torch.Tensor
    matrix: torch.Tensor

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.linear)

    def keep(self, width: int) -> list[int]:
        """The positions that stay when `width` of them do, ascending."""
        (removed,) = selections(self.linear, self.matrix, [self.size - width])
        return sorted(set(range(self.size)) - set(removed.tolist()))

    @functools.cached_property
    def lost(self) -> torch.Tensor:
        """What removal costs at each width, shape (size + 1,), interpolated between a few widths."""
        counts = sorted({round(x) for x in np.linspace(0, self.size, WIDTHS)})
        costs = []
        for removed in selections(self.linear, self.matrix, counts):
            costs.append(float(self.linear[removed].sum() + self.matrix[removed][:, removed].sum()))
        every = np.interp(np.arange(self.size + 1), counts, costs)
        return torch.from_numpy(every[::-1].copy())


@dataclass(frozen=True)
class Collaborative(FromData):
    """Choose the channels of a group together: minimise -mean(q).z + 1/2 z' mean(q q') z over z in {0, 1}^n.

    q is the derivative of one sample's loss by masks on the channels; mean(q q') stands for the Hessian, as it does for
    cross entropy. The programme is relaxed, rounded and improved by exchanges. It gives an order, not scores.

    Args:
        loss: `loss(output, targets)`, see `graphprune.calibrate`; not needed if `batches` is a calibration.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))]
        >>> order = Collaborative(data, nn.functional.cross_entropy)(net, gp.couple(gp.trace(net, data[0][0])))["0"]
        >>> len(order.keep(5))
        5
    """

    loss: Loss | None = None
    _: KW_ONLY

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """An order for every group.

        Raises:
            InputError: there is no loss.
            CalibrationError: the batches or the loss cannot be used.
            CriterionError: the gradient of a group is zero in all samples and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["gradients", "products"], self.loss).gradients
        scores: dict[str, torch.Tensor | Order] = {}
        for name in moved(found):
            scores[name] = Selections(-found[name].first, found[name].matrix / 2)
        return complete(scores, model, coupling, self.otherwise, "Collaborative: no gradient reaches")

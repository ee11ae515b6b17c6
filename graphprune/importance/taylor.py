"""Taylor: how much the loss moves to first order (Molchanov et al., Pruning CNNs for Resource Efficient Inference,
ICLR 2017; Importance Estimation for Neural Network Pruning, CVPR 2019).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import nn

from graphprune.calibrate import Loss
from graphprune.coupling import Coupling
from graphprune.importance.data import FromData, moved
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Scores


@dataclass(frozen=True)
class Taylor(FromData):
    """Score channel i by |mean of q_i|, with q the derivative of a sample's loss by a mask on the channel.

    The mask sits at all ends of the group at once, so coupled layers add up with their signs.

    Args:
        loss: `loss(output, targets)`, see `graphprune.calibrate`; not needed if `batches` is a calibration.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))]
        >>> taylor = Taylor(data, nn.functional.cross_entropy)
        >>> taylor(net, gp.couple(gp.trace(net, data[0][0])))["0"].shape
        torch.Size([8])
    """

    loss: Loss | None = None
    _: KW_ONLY

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group, in float64.

        Raises:
            InputError: there is no loss.
            CalibrationError: the batches or the loss cannot be used.
            CriterionError: the gradient of a group is zero in all samples and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["gradients"], self.loss).gradients
        scores = {name: found[name].first.abs() for name in moved(found)}
        return complete(scores, model, coupling, self.otherwise, "Taylor: no gradient reaches")

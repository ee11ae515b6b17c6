"""Fisher: how much the loss moves to second order (Liu et al., Group Fisher Pruning, ICML 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import nn

from graphprune.calibrate import Loss
from graphprune.cost import Cost, activations, macs, params
from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.data import FromData, moved
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Scores

_COSTS: Mapping[str | None, Callable[[Coupling], Cost] | None] = {
    "memory": activations,
    "macs": macs,
    "params": params,
    None: None,
}


@dataclass(frozen=True)
class Fisher(FromData):
    """Score channel i by 1/2 mean of q_i^2, divided by what the channel costs.

    q is the derivative of one sample's loss by a mask on the channel, at all ends of its group at once: coupled layers
    are added up before squaring. Inside a group the division changes nothing.

    Args:
        loss: `loss(output, targets)`, see `graphprune.calibrate`; not needed if `batches` is a calibration.
        normalize: what one channel frees: "memory", the elements of the outputs of layers that go with it (the paper's
            choice for speed); "macs"; "params"; or None.
    Raises:
        InputError: `normalize` is none of these.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))]
        >>> fisher = Fisher(data, nn.functional.cross_entropy, normalize="memory")
        >>> fisher(net, gp.couple(gp.trace(net, data[0][0])))["0"].shape
        torch.Size([8])
    """

    loss: Loss | None = None
    _: KW_ONLY
    normalize: Literal["memory", "macs", "params"] | None = None

    def __post_init__(self) -> None:
        choice.check(self, normalize=(self.normalize, _COSTS))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group, in float64.

        Raises:
            InputError: there is no loss.
            CalibrationError: the batches or the loss cannot be used.
            CriterionError: the gradient of a group is zero in all samples and `otherwise` is None.
        """
        found = self.calibration(model, coupling, ["gradients"], self.loss).gradients
        scores = {name: found[name].second / 2 for name in moved(found)}
        if (make := _COSTS[self.normalize]) is not None:
            cost = make(coupling)
            whole = cost.at({})
            freed = {name: whole - cost.at({name: coupling.atoms[name].size - 1}) for name in scores}
            scores = {name: score / max(1, freed[name]) for name, score in scores.items()}
        return complete(scores, model, coupling, self.otherwise, "Fisher: no gradient reaches")

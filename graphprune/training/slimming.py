"""Slimming: an L1 penalty on the scales of normalisations (Liu et al., Network Slimming, ICCV 2017)."""

from __future__ import annotations

from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance.gamma import scales
from graphprune.training.penalty import Penalty, Strength, shrink
from graphprune.training.pieces import channels


class Slimming(Penalty):
    """Shrinks the scales of channels that can be removed, so that many come to zero; `Gamma` then ranks by them.

    The gradient added is strength * sign(scale). Where several normalisations scale one channel, as in a residual
    stream, they are one group: the penalty is the Euclidean norm of the k scales times sqrt(k), so that they come to
    zero together. Scales of channels that nothing can remove are left alone.

    The paper trains from scratch with strength 1e-4 (VGG) or 1e-5 (ResNet-164, DenseNet-40), all scales 0.5 at first.

    Args:
        model: what is trained; of a `DistributedDataParallel` its `module`.
        coupling: of it.
        strength: a number, or a callable that gives one for the number of the step, such as `ramp(1e-4, steps=1000)`.
        grouped: whether scales of one channel are a group; otherwise each is shrunk by itself.
    Raises:
        InputError: the strength is negative, the coupling is of another model, or no scale can be slimmed.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1))
        >>> slimming = Slimming(net, gp.couple(gp.trace(net, torch.zeros(1, 3, 4, 4))), 0.5)
        >>> net(torch.zeros(1, 3, 4, 4)).sum().mul(0).backward()
        >>> slimming()
        >>> net[1].weight.grad
        tensor([0.5000, 0.5000])
    """

    def __init__(self, model: nn.Module, coupling: Coupling, strength: Strength, *, grouped: bool = True) -> None:
        found = channels(model, coupling, scales(coupling))
        if not found:
            raise InputError(
                f"Slimming: {coupling.program.model_class} has no batch, instance, group, layer or rms norm with a "
                "scale over channels that can be removed; shrink its weights instead, with gp.training.GroupLasso"
            )
        super().__init__(found, strength)
        self.grouped = grouped

    def _add(self, strength: float) -> None:
        if self.grouped:
            shrink(self.groups, strength)
            return
        for held in self.groups.values():
            for piece in held.pieces:
                if piece.parameter.grad is not None:
                    piece.add(piece.parameter.grad, strength * piece.held(piece.parameter).sgn())

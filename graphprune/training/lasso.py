"""Group lasso: all weights of a channel, in every layer that is coupled to it, are shrunk as one."""

from __future__ import annotations

from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.importance.weights import Over, slots
from graphprune.training.penalty import Penalty, Strength, shrink
from graphprune.training.pieces import channels


class GroupLasso(Penalty):
    """Adds the gradient of strength * sum over channels of sqrt(n) * norm of the channel's n weights.

    Channels come to zero as wholes: their filters, biases and scales, and the columns of all layers that read them
    (Yuan and Lin 2006; over coupled layers Fang et al., DepGraph, 2023). `Magnitude` then ranks by them.

    Args:
        model: what is trained; of a `DistributedDataParallel` its `module`.
        coupling: of it.
        strength: a number, or a callable that gives one for the number of the step.
        over: "all" that is removed with a channel, or the "filters" that compute it.
    Raises:
        InputError: the strength is negative, the coupling is of another model, or it has no channels to shrink.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, strength: Strength, *, over: Over = "all") -> None:
        found = channels(model, coupling, slots(coupling, over))
        if not found:
            raise InputError(
                f"GroupLasso: {coupling.program.model_class} has no channels that can be removed; print the coupling "
                "to see what is pinned, and why"
            )
        super().__init__(found, strength)

    def _add(self, strength: float) -> None:
        shrink(self.groups, strength)

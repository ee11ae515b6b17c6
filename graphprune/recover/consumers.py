"""What a pruned layer loses, made good in the weights that are left: least squares, or the mean alone.

A consumer computes W x. Where channels P of x go, W_P x_P is missing; what of it can be told from the channels K that
stay is W_P (B x_K + m), with B = C_PK (C_KK + ridge)^-1 and m = mean_P - B mean_K from the moments of x. So W_K grows
by W_P B and the bias by W_P m (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.calibrate import CONSUMERS, Moments, consumers, layers, shared
from graphprune.coupling import Coupling
from graphprune.plan import Plan
from graphprune.program import Value
from graphprune.recover.shifts import shifts
from graphprune.solvers import coefficients
from graphprune.trace import held

RIDGE = 1e-4
"""Added to the diagonal of second moments, at least, relative to its mean."""
NOISE = 1e-12
"""A variance below this part of the squared mean is rounding: the channel is constant."""
_RECURRENT = "it is recurrent: what it hands on to itself is not seen"
_UNFIT: Mapping[str, str] = {
    **dict.fromkeys(CONSUMERS, "its weight is computed"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "it is a transposed convolution"),
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), _RECURRENT),
}
SHARED = "other parts of the model read its weight, too"


@dataclass(frozen=True)
class Change:
    """New values for the original's tensors, at their original shapes, and what was not possible.

    Attributes:
        state: per fully qualified name.
        ridges: per weight, what was added to the diagonal of its second moments, relative to their mean; least squares.
        left: weights of consumers that lost inputs and could not be repaired, with the reason.
    """

    state: Mapping[str, torch.Tensor]
    ridges: Mapping[str, float]
    left: Mapping[str, str]


def changed(
    model: nn.Module, coupling: Coupling, plan: Plan, moments: Mapping[str, Moments], *, means_only: bool
) -> Change:
    """Repair every consumer that loses inputs.

    Args:
        model: the original.
        coupling, plan: what is removed.
        moments: of what the consumers read.
        means_only: change biases alone.
    """
    tensors = dict(held(model))
    moved, tied = shifts(coupling.program), shared(coupling.program)
    state: dict[str, torch.Tensor] = {}
    ridges: dict[str, float] = {}
    left: dict[str, str] = {}
    done: set[str] = set()
    for consumer in consumers(coupling):
        kept = plan.kept.get(consumer.weight, {}).get(0 if consumer.transposed else 1)
        if kept is None or consumer.weight in done:
            continue
        done.add(consumer.weight)
        known = moments.get(consumer.weight)
        if known is None or not known.count:
            left[consumer.weight] = "no batch reached it"
            continue
        if consumer.weight in tied and not means_only:
            left[consumer.weight] = SHARED
            continue
        shift = moved.get(consumer.weight)
        if means_only and shift is None:
            left[consumer.weight] = "it has no bias and no batch norm behind it to take the mean"
            continue
        columns = _Columns(tensors[consumer.weight], known, consumer.transposed, consumer.groups, kept)
        delta = columns.mean_alone() if means_only else columns.least_squares(centred=shift is not None)
        if not means_only:
            state[consumer.weight] = columns.weight()
            ridges[consumer.weight] = columns.ridge
        if shift is not None:
            state[shift.name] = tensors[shift.name].detach().double().cpu() + shift.sign * delta
    return Change({n: t.to(tensors[n]) for n, t in state.items()}, ridges, left)


def unfit(coupling: Coupling, plan: Plan) -> dict[str, str]:
    """Layers that lose inputs and that no method repairs, by module path, with the reason."""
    keep, memo = coupling.keep(plan.groups), {}  # type: ignore[var-annotated]
    known = {layer.node for layer in layers(coupling.program)}
    out = {}
    for node in coupling.program.nodes:
        given, reason = node.arguments.get("input"), _UNFIT.get(node.op)
        if node in known or reason is None or not isinstance(given, Value):
            continue
        read = (given, *node.outputs) if reason == _RECURRENT else (given,)
        if not all(coupling.axes.mask(axis, keep, memo).all() for value in read for axis in coupling.dims[value]):
            out[node.module] = reason
    return out


class _Columns:
    """The weight of one consumer as (groups, outputs, columns, taps), where the moments are those of its columns."""

    def __init__(
        self, weight: torch.Tensor, moments: Moments, transposed: bool, groups: int, kept: torch.Tensor
    ) -> None:
        self.transposed = transposed
        self.moments = moments
        w = weight.detach().double().cpu()
        w = w.T if transposed else w
        self.shape = w.shape
        columns = moments.total.shape[1]
        self.w = w.reshape(groups, w.shape[0] // groups, columns, -1).clone()
        inputs = torch.zeros(w.shape[1], dtype=torch.bool)
        inputs[kept.cpu()] = True
        mask = inputs.repeat_interleave(columns // w.shape[1])
        self.kept, self.removed = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        self.ridge = 0.0

    def mean_alone(self) -> torch.Tensor:
        """What the output loses on average, (outputs,)."""
        return self._times(self.moments.mean[:, self.removed])

    def least_squares(self, *, centred: bool) -> torch.Tensor:
        """Refit the kept columns; returns what is left for the bias, (outputs,)."""
        mean = self.moments.mean if centred else None
        second = self.moments.second + torch.diag_embed(NOISE * self.moments.mean.square())
        fit = coefficients(second, self.kept, self.removed, mean=mean, ridge=RIDGE)
        self.ridge = fit.ridge
        self.w[:, :, self.kept] += torch.einsum("gopt,gpk->gokt", self.w[:, :, self.removed], fit.matrix)
        return self._times(torch.zeros(()).double().expand(fit.matrix.shape[:2]) if fit.offset is None else fit.offset)

    def _times(self, held: torch.Tensor) -> torch.Tensor:
        """The weight of the removed columns times a value for each, (outputs,)."""
        return torch.einsum("gopt,gp->go", self.w[:, :, self.removed], held).reshape(-1)

    def weight(self) -> torch.Tensor:
        """The weight in its own shape."""
        w = self.w.reshape(self.shape)
        return w.T if self.transposed else w

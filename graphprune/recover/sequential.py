"""Least squares layer by layer: each layer is fitted to the original's output from what the repaired layers before it
give (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.2).

The original runs once, on all samples together, and what its layers read is kept. Then the small model runs: at each
layer its weights are fitted and written before the layer is called, so one pass repairs the whole network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphprune.calibrate import CHUNK, UNFOLDED_LIMIT, Consumer, columns, layers
from graphprune.interpret import Replay
from graphprune.plan import Plan
from graphprune.program import Node
from graphprune.recover.shifts import Shift
from graphprune.rewrite.state import held
from graphprune.trace import Inputs, StandIn, signature

RIDGE = 1e-3
"""Added to the diagonal of second moments, relative to their mean: how much a weight is held where it is."""


def refit(
    model: nn.Module, small: nn.Module, plan: Plan, shifts: Mapping[str, Shift], inputs: Inputs
) -> dict[str, torch.Tensor]:
    """Fit the layers of `small` one after the other.

    Args:
        model: the original.
        small: the smaller model; in the end it is as before.
        plan: what was removed.
        shifts: per weight, what can shift the output of its layer.
        inputs: all samples.
    Returns:
        New values by fully qualified name.
    """
    work = _Refit(model, small, plan, shifts)
    with torch.no_grad():
        work.run(Replay(model), inputs, work.keep)
        work.run(Replay(small), inputs, work.fit)
    return work.written


class _Refit:
    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan, shifts: Mapping[str, Shift]) -> None:
        self.dense, self.small = dict(held(model)), dict(held(small))
        self.plan, self.shifts = plan, shifts
        self.inputs: dict[str, tuple[torch.Tensor, Consumer]] = {}
        self.written: dict[str, torch.Tensor] = {}

    def run(self, replay: Replay, inputs: Inputs, each: Any) -> None:
        """Run a model, with `each` called for the layers that are fitted and what they read."""
        program = replay.program(inputs)
        calls = Counter(layer.weight for layer in layers(program))
        found = {layer.node.name: layer for layer in layers(program) if calls[layer.weight] == 1 and self._fits(layer)}
        overwritten = {v for node in program.nodes if node.op.endswith("_") for v in node.values()}

        def stand_in(node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            layer = found.get(node.name)
            if layer is not None:
                given = dict(zip(signature(func)[1], args, strict=False)) | dict(kwargs)
                x = given[layer.argument].detach()
                each(layer, x.clone() if layer.value in overwritten else x)

        looking: StandIn = stand_in
        replay.run(inputs, looking, restart=self.inputs.clear)

    def _fits(self, layer: Consumer) -> bool:
        """Whether a layer sums over channels, few enough for one system of equations."""
        shape = self.dense[layer.weight].shape
        return shape[1] > 1 and len(shape) < 5 and shape[1:].numel() <= UNFOLDED_LIMIT

    def keep(self, layer: Consumer, x: torch.Tensor) -> None:
        """Keep what a layer of the original reads."""
        self.inputs[layer.weight] = x, layer

    def fit(self, layer: Consumer, x: torch.Tensor) -> None:
        """Fit the weight of a layer of the small model, and write it."""
        name = layer.weight
        if name not in self.inputs:
            return
        dense, now = (held[name].detach().double().cpu() for held in (self.dense, self.small))
        dense, now = (dense.T, now.T) if layer.transposed else (dense, now)
        out = self.plan.kept.get(name, {}).get(1 if layer.transposed else 0)
        dense = dense if out is None else dense.index_select(0, out)
        shift, shape = self.shifts.get(name), now.shape
        d, w = (t.reshape(layer.groups, shape[0] // layer.groups, -1) for t in (dense, now))
        got, want, second, cross = self._moments(layer, x)
        if shift is not None:
            second = second - got[:, :, None] * got[:, None, :]
            cross = cross - want[:, :, None] * got[:, None, :]
        ridge = RIDGE * second.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        system = second + torch.diag_embed(ridge[:, None].expand(-1, second.shape[1]))
        w = w + torch.linalg.solve(system, (d @ cross - w @ second).transpose(1, 2)).transpose(1, 2)
        made = w.reshape(shape)
        self._write(name, made.T if layer.transposed else made)
        if shift is not None:
            delta = torch.einsum("goc,gc->go", d, want) - torch.einsum("goc,gc->go", w, got)
            base = self.dense[shift.name].detach().double().cpu()
            self._write(shift.name, (base if out is None else base.index_select(0, out)) + shift.sign * delta.reshape(-1))

    def _moments(self, layer: Consumer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Means of both inputs, second moments of the small one's, and cross moments, per group of the convolution."""
        kernel = tuple(self.dense[layer.weight].shape[2:])
        taps = self.dense[layer.weight].shape[2:].numel()
        original, theirs = self.inputs.pop(layer.weight)
        samples = max(1, CHUNK // max(1, original[0].numel() * taps))
        pieces = (columns(which, t, kernel, taps, samples) for which, t in ((theirs, original), (layer, x)))
        rows, sums = 0, [torch.zeros(()).double() for _ in range(4)]
        for want, got in zip(*pieces, strict=True):
            if want.shape[0] > got.shape[0]:  # whole groups of the convolution are gone
                each = self.dense[layer.weight].shape[0] // want.shape[0]
                want = want[(self.plan.kept[layer.weight][0] // each).unique()]
            rows += got.shape[1]
            parts = got.sum(1), want.sum(1), got.mT @ got, want.mT @ got
            sums = [a + b.double().cpu() for a, b in zip(sums, parts, strict=True)]
        return tuple(s / rows for s in sums)

    def _write(self, name: str, value: torch.Tensor) -> None:
        self.written[name] = value
        self.small[name].copy_(value)

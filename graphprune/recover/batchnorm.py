"""BatchNorm statistics of a pruned network, taken anew from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from graphprune.calibrate import Batch
from graphprune.interpret import Replay
from graphprune.program import Node, Value
from graphprune.trace import signature


def reestimated(model: nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Running means and variances of every batch norm of `model` over all samples; nothing is written.

    Each batch norm normalises by the statistics of the batch on the way, as in training.

    Args:
        model: any module; it is left as it was.
        batches: what to run it on.
    Returns:
        Per fully qualified name of a buffer, its new value; empty for a model without batch norms.
    """
    sums, replay = _Sums(), Replay(model)
    with torch.no_grad():
        for batch in batches:
            replay.run(batch.inputs, sums.stand_in, restart=sums.__init__)  # type: ignore[misc]
    return sums.state()


class _Sums:
    """Per running mean: its variance's name, elements per channel, sums and sums of squares."""

    def __init__(self) -> None:
        self.variances: dict[str, str] = {}
        self.count: dict[str, int] = {}
        self.total: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}

    def stand_in(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A batch norm with running statistics runs as in training; any other node is left alone."""
        mean, variance = (node.arguments.get(name) for name in ("running_mean", "running_var"))
        if node.op != "batch_norm" or not isinstance(mean, Value) or not isinstance(variance, Value):
            return None
        given = dict(zip(signature(func)[1], args, strict=False)) | dict(kwargs)
        x, name = given["input"], mean.target
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        if x.numel() == x.shape[1]:  # one value per channel has no variance
            return None
        self.variances[name] = variance.target
        self.count[name] = self.count.get(name, 0) + x.numel() // x.shape[1]
        self.total[name] = self.total.get(name, 0) + wide.sum(dims).double().cpu()
        self.squares[name] = self.squares.get(name, 0) + wide.square().sum(dims).double().cpu()
        return F.batch_norm(x, None, None, given["weight"], given["bias"], training=True, eps=given["eps"])

    def state(self) -> dict[str, torch.Tensor]:
        """The statistics; variances are unbiased, as PyTorch keeps them."""
        out: dict[str, torch.Tensor] = {}
        for name, count in self.count.items():
            mean = self.total[name] / count
            spread = (self.squares[name] / count - mean.square()).clamp(min=0)
            out[name], out[self.variances[name]] = mean, spread * count / (count - 1)
        return out

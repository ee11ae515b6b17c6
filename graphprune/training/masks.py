"""Channels that are gone while a model is trained on: their slices of all weights are zero, and stay so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from graphprune.plan import Plan
from graphprune.trace import held


class Masks:
    """Zeroes what a plan removes, in place.

    Nothing else is needed for a model to compute what the smaller one will: that is what makes a removal exact.

    Args:
        model: its parameters and buffers are written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gone: dict[str, dict[int, torch.Tensor]] = {}

    def set(self, plan: Plan) -> None:
        """Remove what this plan removes."""
        shapes = plan.shapes
        self.gone = {
            name: {d: _others(shapes[name][d], kept) for d, kept in dims.items() if d != plan.left.get(name)}
            for name, dims in plan.kept.items()
        }
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero it: weights move with every step of an optimizer, and statistics with every forward."""
        for name, tensor in held(self.model):
            if name in self.gone and tensor.is_floating_point():
                _zero(tensor, self.gone[name])

    @torch.no_grad()
    def forget(self, optimizer: Optimizer) -> None:
        """Zero what an optimizer remembers of it, so that nothing moves on."""
        for name, tensor in held(self.model):
            for state in optimizer.state.get(tensor, {}).values() if name in self.gone else ():
                if isinstance(state, torch.Tensor) and state.shape == tensor.shape:
                    _zero(state, self.gone[name])

    @contextmanager
    def filled(self, before: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """For the block, what is gone has the values it had before, and everything else those it has now.

        A comparison with the zeroed original could not fail if the original were zero there already.
        """
        now = {name: tensor.detach().clone() for name, tensor in held(self.model) if name in self.gone}
        try:
            with torch.no_grad():
                for name, tensor in held(self.model):
                    if name in self.gone:
                        here = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
                        for dim, positions in self.gone[name].items():
                            here.index_fill_(dim, positions.to(tensor.device), True)
                        tensor.copy_(torch.where(here, before[name].to(tensor), now[name]))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in held(self.model):
                    if name in now:
                        tensor.copy_(now[name])


def _others(size: int, kept: torch.Tensor) -> torch.Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone.nonzero().flatten()


def _zero(tensor: torch.Tensor, gone: Mapping[int, torch.Tensor]) -> None:
    for dim, positions in gone.items():
        tensor.index_fill_(dim, positions.to(tensor.device), 0)

"""The layers that read a group: their weights by column, their moments, and which columns are which channel's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from graphprune.calibrate import Moments, consumers
from graphprune.coupling import Coupling


@dataclass(frozen=True)
class Read:
    """One layer that reads channels of one group.

    Attributes:
        value: name of the value it reads.
        weight: (groups of the convolution, outputs, columns, taps that the moments do not tell apart), float64.
        moments: of its columns.
        at, which: columns, and the channel that each belongs to.
        size: channels of the group.
    """

    value: str
    weight: torch.Tensor
    moments: Moments
    at: torch.Tensor
    which: torch.Tensor
    size: int

    def of_channels(self, per_column: torch.Tensor) -> torch.Tensor:
        """Sum something per column over the columns of each channel: (columns,) to (channels,)."""
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.which, per_column[self.at])

    @property
    def gram(self) -> torch.Tensor:
        """E<W_i x_i, W_j x_j> of every two channels, summed over the outputs, (channels, channels)."""
        products = torch.einsum("goct,godt->gcd", self.weight, self.weight)
        columns = (products * self.moments.second).sum(0)[self.at][:, self.at]
        rows = torch.zeros(self.size, len(self.at), dtype=torch.float64).index_add_(0, self.which, columns)
        return torch.zeros(self.size, self.size, dtype=torch.float64).index_add_(1, self.which, rows)


def readings(model: nn.Module, coupling: Coupling, moments: Mapping[str, Moments]) -> dict[str, list[Read]]:
    """Per group, the layers that read it and were reached by any sample; groups without such layers are left out."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dims = {v.target: coupling.dims[v] for v in coupling.program.parameters}
    found: dict[str, list[Read]] = {}
    met: set[str] = set()
    for consumer in consumers(coupling):
        held = moments.get(consumer.weight)
        if held is None or not held.count or consumer.weight in met:
            continue
        met.add(consumer.weight)
        weight = parameters[consumer.weight].detach().double().cpu()
        weight = weight.T if consumer.transposed else weight
        axis = dims[consumer.weight][0 if consumer.transposed else 1]
        shaped = weight.reshape(consumer.groups, weight.shape[0] // consumer.groups, held.total.shape[1], -1)
        leaves = coupling.axes.leaves(axis)
        for name, atom in coupling.atoms.items():
            if atom in leaves:
                at, which = coupling.axes.places(axis, {atom: 0})
                columns = at[:, None] * held.taps + np.arange(held.taps)[None]
                numbers = torch.from_numpy(np.repeat(which, held.taps))
                read = Read(
                    consumer.value.name, shaped, held, torch.from_numpy(columns.reshape(-1)), numbers, atom.size
                )
                found.setdefault(name, []).append(read)
    return found

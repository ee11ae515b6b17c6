"""What an importance criterion is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import torch
from torch import nn

from graphprune.coupling import Coupling

Scores: TypeAlias = Mapping[str, torch.Tensor]
"""Per group name, one score per channel, shape (size,); higher = keep."""


class Importance(Protocol):
    """Anything that scores the channels of every group."""

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score the channels of each group of `coupling`, reading the weights from `model`."""

"""torch-pruning's pruners, used as its documentation and its own CIFAR benchmark do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

STEPS = 10
"""Bisections of the fraction that is pruned."""
FLOOR = 0.1
"""What stays of every layer at least: else whole layers go, and nothing is left to train."""


@dataclass(frozen=True)
class Peer:
    """One of its pruners.

    Attributes:
        pruner, importance: classes of torch-pruning.
        trains: whether it has a regulariser, by the name of its strength here.
        options: of its importance.
    """

    pruner: type
    importance: type
    trains: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


PEERS: Mapping[str, Peer] = {
    "torch-pruning magnitude": Peer(tp.pruner.BasePruner, tp.importance.GroupMagnitudeImportance),
    "torch-pruning BN scale": Peer(tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, "strength"),
    "torch-pruning group norm": Peer(
        tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance, "group_strength", {"normalizer": "max"}
    ),
}


def made(peer: Peer, model: nn.Module, example: torch.Tensor, strength: Mapping[str, float], ratio: float) -> Any:
    """The pruner of a model; those that train sparsely cut at one threshold over all layers."""
    options = {"reg": strength[peer.trains], "global_pruning": True} if peer.trains else {}
    stream = [m for n, m in model.named_modules() if n == "conv1" or n.endswith(".conv2")]
    return peer.pruner(
        model,
        example[:1],
        importance=peer.importance(**peer.options),
        pruning_ratio=ratio,
        max_pruning_ratio=1 - FLOOR,
        ignored_layers=[model.linear, *stream],
        **options,
    )


def penalty(peer: Peer, model: nn.Module, example: torch.Tensor, strength: Mapping[str, float]) -> Callable[[], None]:
    """What its sparse training adds to the gradients of a model."""
    model.requires_grad_(True)
    pruner = made(peer, model, example, strength, 0.5)
    return lambda: pruner.regularize(model)


def within(
    peer: Peer,
    model: nn.Module,
    example: torch.Tensor,
    strength: Mapping[str, float],
    fits: Callable[[nn.Module], bool],
) -> nn.Module:
    """Of what the pruner leaves of copies of a model the largest that fits."""
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = copy.deepcopy(model).requires_grad_(True)
        made(peer, small, example, strength, middle).step()
        if fits(small):
            best, high = small.eval(), middle
        else:
            low = middle
    assert best is not None, "pruning everything does not fit"
    return best

"""Copies in float64 of what the emitters make, so that a comparison is not blurred by rounding."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn

from graphprune.rewrite.graft import retold, source_of
from graphprune.rewrite.state import results


def copied(module: nn.Module) -> nn.Module:
    """A copy to compare with, in eval mode: casting may compute weights anew, which in training moves buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on copying the signature of a graph module
        made = copy.deepcopy(module, dict(results(module)))
    for part in made.modules():
        part.training = False
    return made


def raised(module: nn.Module) -> nn.Module:
    """A copy in float64, with the dtypes that its graphs and grafts state."""
    made = copied(module).double()

    def wider(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for part in made.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, wider)
                node.kwargs = fx.node.map_aggregate(node.kwargs, wider)
            part.recompile()
        elif source_of(part):
            retold(part, source_of(part).replace("torch.float32", "torch.float64"))
    return made


def is_traced(module: nn.Module) -> bool:
    """Whether some of its code comes from a trace, which states dtypes that the user's code may only have inherited."""
    return any(isinstance(part, fx.GraphModule) or source_of(part) for part in module.modules())

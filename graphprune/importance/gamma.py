"""Gamma: the scale that a normalisation gives a channel (Liu et al., Network Slimming, ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.importance import choice
from graphprune.importance.fallback import complete
from graphprune.importance.protocol import Importance, Scores
from graphprune.importance.weights import Slot, rows
from graphprune.program import Value

NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
"""Ops whose `weight` scales channels after they are normalised."""
Reduction = Literal["sum", "mean", "max"]
_REDUCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda found: found.sum(1),
    "mean": lambda found: found.mean(1),
    "max": lambda found: found.amax(1),
}


@dataclass(frozen=True)
class Gamma:
    """Score channel i by |gamma_i|, the scales of the normalisations that belong to its group.

    A scale is the `weight` of a call of batch, instance, group, layer or RMS norm that runs over channels of the group,
    whichever module makes that call. It is a parameter or buffer: a scale that is computed first has no values to read.
    Normalisations written out in other ops, such as a multiplication with a weight, are not among them.

    Args:
        reduction: what becomes of several scales of one channel: the norms of several layers that share a group, or
            the entries of one scale in which the channel occurs (a head, a group of a grouped convolution).
        otherwise: scores groups without a scale, on its own scale of values: those compare with each other and not
            with the others. With None such groups are an error.
    Raises:
        InputError: `reduction` is none of its words.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1)).eval()
        >>> net[1].weight = nn.Parameter(torch.tensor([0.5, -2.0]))
        >>> Gamma()(net, gp.couple(gp.trace(net, torch.zeros(1, 3, 4, 4))))["0"].tolist()
        [0.5, 2.0]
    """

    reduction: Reduction = "sum"
    otherwise: Importance | None = None

    def __post_init__(self) -> None:
        choice.check(self, reduction=(self.reduction, _REDUCTIONS))

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """Score every channel of every group that has a scale, in float64, and the rest by `otherwise`.

        Raises:
            InputError: a scale is on the meta device, or holds NaN or infinity.
            CriterionError: groups have no scale and `otherwise` is None.
        """
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        names = {atom: name for name, atom in coupling.atoms.items()}
        found: dict[str, list[torch.Tensor]] = {}
        for slot in scales(coupling):
            for atom in slot.atoms:
                scale = rows(held[slot.value.target], slot, atom, coupling).abs()
                found.setdefault(names[atom], []).append(scale)
        reduce = _REDUCTIONS[self.reduction]
        scores = {name: reduce(torch.cat(found[name], dim=1)) for name in coupling.atoms if name in found}
        why = "Gamma: no batch, instance, group, layer or rms norm has a scale over"
        return complete(scores, model, coupling, self.otherwise, why)


def scales(coupling: Coupling) -> Iterator[Slot]:
    """The scales of normalisations that run over channels of groups, each once."""
    grouped, seen = frozenset(coupling.atoms.values()), set[Value]()
    for node in coupling.program.nodes:
        value = node.arguments.get("weight") if node.op in NORMS else None
        if not isinstance(value, Value) or value.kind not in ("parameter", "buffer") or value in seen:
            continue
        seen.add(value)
        for d, dim in enumerate(coupling.dims[value]):
            axis = coupling.axes.find(dim)
            if meant := grouped.intersection(coupling.axes.leaves(axis)):
                yield Slot(value, d, axis, meant)

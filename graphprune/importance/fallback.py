"""What is done about groups that a criterion has nothing to say about: another one's scores, if the caller named it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import CriterionError, counted
from graphprune.importance.protocol import Importance, Order, Scores


class Completed(dict[str, "torch.Tensor | Order"]):
    """Scores of several criteria.

    Args:
        scores: of all groups.
        others: per group that the first criterion had nothing to say about, the one that scored it.
    """

    def __init__(self, scores: Scores, others: Mapping[str, Importance]) -> None:
        super().__init__(scores)
        self.others = others


def complete(scores: Scores, model: nn.Module, coupling: Coupling, otherwise: Importance | None, why: str) -> Scores:
    """`scores`, and those of `otherwise` for the groups that are missing among them.

    The scores of `otherwise` are taken as they are: they have the scale of another criterion, and compare with the rest
    inside a group only. A group that neither scores is left out, so that it stays whole.

    Args:
        scores: of the groups that the criterion has something to say about.
        model: whose weights `otherwise` reads.
        coupling: whose groups are meant.
        otherwise: the criterion for the others; None if there is none.
        why: the criterion and what it lacks, such as "Gamma reads scales of norms, and none belongs to".
    Raises:
        CriterionError: groups are missing and `otherwise` is None; the message names the groups.
    """
    missing = [group.name for group in coupling.groups if group.name not in scores]
    if not missing:
        return scores
    if otherwise is None:
        raise CriterionError(
            f"{why} {len(missing)} of {counted(len(coupling.groups), 'group')}: {listed(missing)}; name a criterion "
            "for them, such as otherwise=graphprune.importance.Magnitude()"
        )
    others = otherwise(model, coupling)
    added = {name: others[name] for name in missing if name in others}
    by = scored_by(others)
    return Completed({**scores, **added}, {name: by.get(name, otherwise) for name in added})


def scored_by(scores: Scores) -> Mapping[str, Importance]:
    """Per group that an `otherwise` scored, which criterion that was."""
    return scores.others if isinstance(scores, Completed) else {}


def listed(names: list[str]) -> str:
    """The first few of some names."""
    short = reprlib.Repr()
    short.maxlist, short.maxstring = 6, 120
    return short.repr(names)[1:-1]

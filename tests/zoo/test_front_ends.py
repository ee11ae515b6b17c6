"""Recording and exporting a network give the same groups, with the same members, exactness and pins."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from tests.zoo.test_zoo import ZOO


@pytest.mark.parametrize("norms", ["pin", "prune"])
@pytest.mark.parametrize("name", ZOO)
def test_both_front_ends_give_the_same_groups(name, norms):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    recorded, exported = (gp.couple(gp.trace(model, inputs, front_end=f), norms=norms) for f in ("record", "export"))
    assert len(recorded.groups) > 1
    assert _groups(recorded) == _groups(exported)
    assert _pins(recorded) == _pins(exported)


def _groups(coupling: gp.Coupling) -> dict[str, tuple]:
    """Members in constants are left out: the two write numbers in the code into other ops."""
    named = {v.target for v in coupling.program.state if v.kind != "constant"}
    return {
        g.name: (g.size, g.exactness, {(m.name, m.dim) for m in g.members if m.name in named}) for g in coupling.groups
    }


def _pins(coupling: gp.Coupling) -> set[tuple[str, int, str]]:
    named = {v.target for v in coupling.program.state if v.kind != "constant"}
    return {(p.name, p.size, p.reason) for p in coupling.pinned if any(m.name in named for m in p.members)}

"""Whatever goes wrong, the user's model is as it was: weights, identities, flags, attributes, random state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.nets import CifarResNet
from tests.unit.test_trace import Branching, same, snapshot

HALF = gp.Target(channels=0.5)
X = torch.rand(2, 3, 32, 32)


def scorer_that_fails(model, coupling):
    raise RuntimeError("scores are not to be had")


class Restless(nn.Module):
    """Its output changes from call to call, so that no proof can hold; the count is kept where no module sees it."""

    calls = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(x).relu()) * next(self.calls)


BAD = {
    "wrong inputs": (lambda: CifarResNet(1), (torch.rand(2, 5, 32, 32),), {}, gp.InputError),
    "inputs on another device": (lambda: CifarResNet(1), (X.to("meta"),), {}, gp.InputError),
    "a branch on data": (Branching, (torch.rand(2, 3),), {}, gp.TraceError),
    "an op without a rule": (
        lambda: nn.Sequential(nn.Linear(3, 6), Airy(), nn.Linear(6, 2)),
        (torch.rand(2, 3),),
        {"on_unknown": "error"},
        gp.UnsupportedOp,
    ),
    "a name that is not there": (lambda: CifarResNet(1), (X,), {"keep_names": ["layer9"]}, gp.UnknownName),
    "a target out of reach": (lambda: CifarResNet(1), (X,), {"target": gp.Target(macs=1e-9)}, gp.TargetError),
    "nothing to remove": (lambda: nn.Conv2d(3, 5, 1), (X,), {}, gp.PlanError),
    "an emitter that cannot": (lambda: Stubborn(), (torch.rand(2, 3),), {"emit": "module"}, gp.RewriteError),
    "an importance that fails": (lambda: CifarResNet(1), (X,), {"importance": scorer_that_fails}, RuntimeError),
    "a model that cannot be proved": (Restless, (torch.rand(2, 3),), {}, gp.VerificationError),
    "NaN in the output": (lambda: NotANumber(), (torch.rand(2, 3),), {}, gp.VerificationError),
}


class Airy(nn.Module):
    def forward(self, x):
        return torch.ops.aten.special_airy_ai(x)


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).reshape(-1, 8))


class NotANumber(Stubborn):
    def forward(self, x):
        return self.last(self.first(x)) * float("nan")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_a_failure_leaves_no_trace_on_the_model(name, training):
    build, inputs, options, error = BAD[name]
    model = build().train(training)
    before = snapshot(model)
    with pytest.raises(error):
        gp.prune(model, inputs, **{"target": HALF, **options})
    same(before, snapshot(model))


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_success_leaves_no_trace_either(emit):
    model = CifarResNet(1).train()
    before = snapshot(model)
    result = gp.prune(model, X, target=HALF, emit=emit)
    assert all(m.training for m in result.model.modules())
    same(before, snapshot(model))

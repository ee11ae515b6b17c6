"""Allocation: budgets are kept and used, limits hold, and better methods lose less."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune as gp
from graphprune.allocate import METHODS
from graphprune.allocate.problem import pose
from graphprune.cost import COSTS, memory, widths
from graphprune.importance import ordered
from tests.nets import Attention, CifarResNet, DenseBlock, UNet

NETS = {
    "residual": (lambda: CifarResNet(3), (1, 3, 32, 32)),
    "dense": (lambda: DenseBlock(8), (1, 3, 8, 8)),
    "attention": (lambda: nn.Sequential(Attention(), Attention()), (2, 7, 30)),
    "u-net": (lambda: UNet(), (1, 3, 32, 32)),
}


@pytest.fixture(scope="module")
def posed():
    found = {}
    for name, (build, shape) in NETS.items():
        torch.manual_seed(0)
        model = build().eval()
        coupling = gp.couple(gp.trace(model, torch.rand(shape)))
        scores = gp.importance.Magnitude(normalize="mean")(model, coupling)
        found[name] = model, torch.rand(shape), coupling, {n: s.square() for n, s in scores.items()}
    return found


def shares(coupling, plan):
    kept = widths(plan)
    return {name: cost(coupling).at(kept) / cost(coupling).at({}) for name, cost in COSTS.items()}


def lost(scores, plan):
    kept = widths(plan)
    return sum(float(ordered(s).lost[kept[name]]) for name, s in scores.items())


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_the_derivatives_of_the_cost(posed, net, cost):
    found = COSTS[cost](posed[net][2])
    rng = np.random.default_rng(0)
    at = np.ceil(found.vector({}) * rng.uniform(0.3, 1, len(found.atoms)))
    numeric = [(found.of(at + e) - found.of(at - e)) / 2e-4 for e in np.eye(len(at)) * 1e-4]
    assert np.allclose(found.gradient(at), numeric, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
def test_every_budget_is_kept_and_no_step_of_any_group_would_still_fit(posed, net, method):
    _, _, coupling, scores = posed[net]
    target = gp.Target(macs=0.6, params=0.7, memory=0.95)
    plan = gp.allocate(scores, target, coupling, method=method)
    assert all(shares(coupling, plan)[name] <= value + 1e-9 for name, value in target.budgets.items())
    if method == "uniform":  # it gives back one step of each group at most
        return
    kept = widths(plan)
    for group in coupling.groups:
        if kept[group.name] < group.size:
            more = kept | {group.name: kept[group.name] + 1}
            assert any(COSTS[n](coupling).at(more) > v * COSTS[n](coupling).at({}) for n, v in target.budgets.items())


@pytest.mark.parametrize("method", METHODS)
def test_macs_and_parameters_are_those_of_the_emitted_module(posed, method):
    model, x, coupling, scores = posed["residual"]
    result = gp.prune(model, x, target=gp.Target(macs=0.5), importance=lambda *_: scores, allocation=method)
    small, plan = result.model, result.plan
    with FlopCounterMode(display=False) as counter:
        small(x)
    assert counter.get_total_flops() == 2 * COSTS["macs"](coupling).at(widths(plan))
    assert sum(p.numel() for p in small.parameters()) == COSTS["params"](coupling).at(widths(plan))
    assert shares(coupling, plan)["macs"] <= 0.5


@pytest.mark.parametrize("net", NETS)
def test_better_methods_lose_less(posed, net):
    _, _, coupling, scores = posed[net]
    found = {m: lost(scores, gp.allocate(scores, gp.Target(macs=0.6), coupling, method=m)) for m in METHODS}
    assert found["knapsack"] <= found["greedy"] + 1e-9
    assert found["greedy"] <= found["uniform"]
    assert found["knapsack"] <= found["global"]


@pytest.mark.parametrize("budget", [0.35, 0.6, 0.8])
def test_the_knapsack_is_near_the_best_of_all_choices(budget):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    coupling = gp.couple(gp.trace(net, torch.rand(2, 4)))
    scores = {g.name: torch.rand(g.size, dtype=torch.float64) for g in coupling.groups}
    target = gp.Target(macs=budget)
    problem = pose({n: ordered(s) for n, s in scores.items()}, target, coupling, each=False)
    every = itertools.product(*(range(len(u.widths)) for u in problem.units))
    best = min(problem.lost(np.array(c)) for c in every if problem.fits(np.array(c)))
    assert lost(scores, gp.allocate(scores, target, coupling, method="knapsack")) <= 1.05 * best


@pytest.mark.parametrize("method", METHODS)
def test_limits_hold(posed, method):
    _, _, coupling, scores = posed["residual"]
    tied = [["layer1.0.conv1", "layer1.2.conv1"]]
    target = gp.Target(macs=0.6, multiple_of=8, floor=0.3, protect=["conv1"], tied=tied)
    plan = gp.allocate(scores, target, coupling, method=method)
    kept, sizes = widths(plan), {g.name: g.size for g in coupling.groups}
    assert 0.4 < shares(coupling, plan)["macs"] <= 0.6
    assert all(w % 8 == 0 or w == sizes[n] for n, w in kept.items())
    assert all(w >= 0.3 * sizes[n] for n, w in kept.items())
    assert kept["conv1"] == 16
    assert kept["layer1.0.conv1"] == kept["layer1.2.conv1"]


def test_fractions_by_name_are_those_of_the_groups_named_and_go_with_a_budget(posed):
    _, _, coupling, scores = posed["residual"]
    named = gp.Target(channels={"layer1.*.conv1": 0.5, "layer1.1.*": 0.25})
    kept = widths(gp.allocate(scores, named, coupling))
    assert (kept["layer1.0.conv1"], kept["layer1.1.conv1"], kept["layer2.0.conv1"]) == (8, 4, 32)
    both = gp.Target(channels={"layer*.conv1": 0.75}, macs=0.6)
    plan = gp.allocate(scores, both, coupling, method="greedy")
    assert shares(coupling, plan)["macs"] <= 0.6
    assert all(
        w <= 0.75 * coupling.group(n).size for n, w in widths(plan).items() if n.endswith("conv1") and "layer" in n
    )


def test_a_group_smaller_than_a_multiple_stays_whole():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 4)))
    scores = gp.importance.Magnitude()(net, coupling)
    kept = widths(gp.allocate(scores, gp.Target(macs=0.6, multiple_of=8), coupling, method="knapsack"))
    assert kept == {"0": 6, "2": 16}


def test_a_target_of_one_keeps_everything(posed):
    _, _, coupling, scores = posed["residual"]
    for method in METHODS:
        assert not gp.allocate(scores, gp.Target(macs=1.0), coupling, method=method).removed


def test_memory_is_the_largest_sum_of_what_lives_at_once():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    cost = memory(gp.couple(gp.trace(net, torch.rand(2, 4))))
    weights, rows = 4 * (24 + 18), 2
    first, second, third = rows * 4 * (4 + 6), rows * 4 * (6 + 6), rows * 4 * (6 + 3)
    assert cost.at({}) == weights + max(first, second, third)
    assert cost.at({"0": 2}) == 4 * (8 + 6) + max(rows * 4 * (4 + 2), rows * 4 * (2 + 2), rows * 4 * (2 + 3))


def test_views_and_writes_in_place_take_no_memory_of_their_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

        def forward(self, x):
            return self.b(self.a(x).relu_().view(3, 2, 6).view(6, 6))

    cost = memory(gp.couple(gp.trace(Net(), torch.rand(6, 4))))
    assert cost.at({}) == 4 * (24 + 18) + 4 * 6 * (4 + 6)


def test_equal_scores_are_shared_out_the_same_way_every_time(posed):
    _, _, coupling, scores = posed["residual"]
    flat = {name: torch.ones_like(s) for name, s in scores.items()}
    for method in METHODS:
        plans = [gp.allocate(flat, gp.Target(macs=0.5), coupling, method=method) for _ in range(2)]
        assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (
            gp.Target(macs=0.01, floor=0.5),
            r"macs=0.01 cannot be reached: at least 0\.2\d+ of the macs are left\n  without floor=0.5: macs 0\.00\d+",
        ),
        (gp.Target(params=0.5, macs=0.001), r"macs=0.001 cannot be reached"),
        (gp.Target(macs=0.3, protect=["*"]), r"at least 1\.0000 .*without protect=\['\*'\]: macs 0\.0"),
        (
            gp.Target(macs=0.3, tied=[["conv1", "layer3.0.conv1"]]),
            "tied groups have one size, and conv1 has 16, layer3",
        ),
    ],
)
def test_what_cannot_be_reached_is_refused_with_what_can(posed, target, match):
    _, _, coupling, scores = posed["residual"]
    with pytest.raises(gp.TargetError, match=f"(?s){match}"):
        gp.allocate(scores, target, coupling, method="greedy")


@pytest.mark.parametrize(
    "given",
    [{"protect": ["layer9"]}, {"tied": [["layer1.0.conv1", "nope"]]}, {"channels": {"layer1.*": 0.5, "nope": 0.5}}],
)
def test_names_that_are_not_there_are_refused_with_the_nearest(posed, given):
    _, _, coupling, scores = posed["residual"]
    with pytest.raises(gp.UnknownName, match=r"no group 'layer9'.*did you mean|no group 'nope'"):
        gp.allocate(scores, gp.Target(macs=0.5, **given), coupling)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"macs": 0.5, "multiple_of": 0}, r"multiple_of=0\): a whole number of channels, at least 1"),
        ({"macs": 0.5, "multiple_of": 2.0}, "a whole number of channels"),
        ({"macs": 0.5, "floor": 1.5}, r"floor=1.5\): a number of channels, such as 4, or a fraction"),
        ({"macs": 0.5, "floor": -1}, "a number of channels, such as 4, or a fraction"),
        ({"macs": 0.5, "max_removed": 1.5}, r"max_removed=1.5\): a fraction of each group, in \[0, 1\]"),
        ({"channels": 0.3, "floor": 0.5}, r"channels=0.3, floor=0.5\): no group may keep less than 0.5 of its"),
        ({"channels": {"a": 0.6, "b": 0.3}, "floor": 0.5}, "no group may keep less than 0.5 of its channels"),
        ({"channels": 0.3, "max_removed": 0.5}, r"max_removed=0.5\): .* lower that limit, or keep at least as much"),
        ({"macs": 0.5, "protect": "conv1"}, r"protect='conv1'\): pass a list"),
        ({"channels": {"conv1": 2.0}}, r"the fraction kept lies in \(0, 1\]"),
        ({"macs": {"conv1": 0.5}}, r"the fraction kept lies in \(0, 1\]"),
    ],
)
def test_limits_out_of_range_are_refused(given, match):
    with pytest.raises(gp.TargetError, match=match):
        gp.Target(**given)


def test_an_unknown_method_is_refused(posed):
    _, _, coupling, scores = posed["residual"]
    with pytest.raises(
        gp.InputError, match="method='best': it is one of uniform, global, isomorphic, greedy, knapsack"
    ):
        gp.allocate(scores, gp.Target(macs=0.5), coupling, method="best")


def test_prune_takes_the_method_and_says_what_was_asked():
    model, x = CifarResNet(1).eval(), torch.rand(1, 3, 32, 32)
    target = gp.Target(macs=0.6, params=0.7, multiple_of=4)
    result = gp.prune(model, x, target=target, allocation="knapsack")
    assert "requested macs 0.6, params 0.7, multiples of 4" in str(result.report)
    assert result.report.costs["macs"].kept <= 0.6
    assert all(w.after % 4 == 0 for w in result.report.groups)

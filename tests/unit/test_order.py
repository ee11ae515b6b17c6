"""What a criterion may give: scores, or an order in which the channels go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.importance import Removal, ordered
from tests.nets import CifarResNet


@pytest.fixture(scope="module")
def coupling():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    return gp.couple(gp.trace(net, torch.zeros(1, 3)))


class Pairs:
    """An order that is not nested: what stays at a width is the window that starts where it says."""

    def __init__(self, size, starts):
        self.size, self.starts, self.lost = size, starts, torch.arange(size, -1, -1.0)

    def keep(self, width):
        start = self.starts[width]
        return list(range(start, start + width))


class Given:
    """An order that gives whatever it was told to."""

    size, lost = 8, torch.zeros(9)

    def __init__(self, kept):
        self.kept = kept

    def keep(self, width):
        return self.kept


def test_a_removal_keeps_what_goes_last_and_adds_up_its_costs():
    removal = Removal(torch.tensor([4, 1, 0, 3, 2]), torch.tensor([0.5, 1, 1, 4, 8]))
    assert [removal.keep(w) for w in range(6)] == [[], [2], [2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert removal.lost.tolist() == [14.5, 6.5, 2.5, 1.5, 0.5, 0]
    assert removal.lost.dtype == torch.float64
    assert removal.size == 5


def test_scores_are_an_order_in_which_the_lowest_goes_first_and_of_equal_ones_the_last():
    order = ordered(torch.tensor([2, 0, 3, 2, -1, 2]))
    assert [order.keep(w) for w in (5, 4, 3, 2, 1)] == [[0, 1, 2, 3, 5], [0, 2, 3, 5], [0, 2, 3], [0, 2], [2]]
    assert order.lost.tolist() == [8, 5, 3, 1, -1, -1, 0]
    assert ordered(order) is order


def test_scores_that_learn_or_are_infinite_are_ranked_too():
    order = ordered(torch.tensor([1.0, float("inf"), float("-inf")], requires_grad=True))
    assert [order.keep(w) for w in (2, 1)] == [[0, 1], [1]]
    assert not order.costs.requires_grad


def test_allocate_keeps_what_an_order_keeps_at_that_width(coupling):
    removal = Removal(torch.tensor([5, 0, 1, 7, 2, 3, 6, 4]), torch.ones(8))
    assert gp.allocate({"0": removal}, gp.Target(channels=0.5), coupling).groups["0"] == (2, 3, 4, 6)
    windows = Pairs(8, {4: 1, 6: 0})
    assert gp.allocate({"0": windows}, gp.Target(channels=0.5), coupling).groups["0"] == (1, 2, 3, 4)
    assert gp.allocate({"0": windows}, gp.Target(channels=0.75), coupling).groups["0"] == (0, 1, 2, 3, 4, 5)


def test_scores_and_their_order_give_the_same_plan():
    model, x = CifarResNet(1).eval(), torch.rand(1, 3, 32, 32)
    coupling = gp.couple(gp.trace(model, x))
    scores = {name: torch.randint(4, s.shape) for name, s in gp.importance.Random()(model, coupling).items()}
    target = gp.Target(macs=0.4)
    plan = gp.allocate(scores, target, coupling)
    assert plan.removed > 0
    assert gp.allocate({name: ordered(s) for name, s in scores.items()}, target, coupling) == plan


def test_a_criterion_may_mix_orders_and_scores_and_the_result_verifies():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)).eval()

    def from_the_back(model, coupling):
        first, second = coupling.groups
        back = torch.arange(first.size).flip(0)
        return {first.name: Removal(back, torch.ones(first.size)), second.name: torch.arange(second.size)}

    result = gp.prune(net, torch.rand(2, 3), target=gp.Target(channels=0.5), importance=from_the_back)
    assert result.plan.groups == {"0": (0, 1, 2, 3), "2": (3, 4, 5)}
    assert result.report.verification.error <= 1e-9


NAN = float("nan")


@pytest.mark.parametrize(
    ("order", "costs", "match"),
    [
        ([0, 1, 1], [1, 2, 3], r"no permutation of 0\.\.2"),
        ([1, 2, 3], [1, 2, 3], r"no permutation of 0\.\.2"),
        ([0.0, 1.0, 2.0], [1, 2, 3], "as integers"),
        ([[0, 1, 2]], [[1, 2, 3]], r"no permutation of 0\.\.2"),
        ([0, 1, 2], [1, 2], r"are \(2,\), torch.int64; an order of 3 needs 3 real numbers"),
        ([0, 1, 2], [1, NAN, 2], "needs 3 real numbers without NaN"),
        ([0, 1, 2], [1, 2j, 2], "needs 3 real numbers"),
    ],
)
def test_a_removal_is_a_permutation_with_a_cost_for_each(order, costs, match):
    with pytest.raises(gp.InputError, match=match):
        Removal(torch.tensor(order), torch.tensor(costs))


@pytest.mark.parametrize("width", [-1, 4])
def test_no_more_channels_stay_than_there_are(width):
    with pytest.raises(gp.InputError, match=f"{width} of 3 channels cannot stay"):
        ordered(torch.rand(3)).keep(width)


@pytest.mark.parametrize("scores", [torch.tensor([1, NAN]), torch.rand(2, 3), torch.tensor([1j, 2])])
def test_scores_without_a_rank_have_no_order(scores):
    with pytest.raises(gp.InputError, match="one real number per channel, no NaN"):
        ordered(scores)


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        (torch.rand(8, device="meta"), r"'0' are torch.float32 on meta; an importance gives real numbers"),
        (torch.rand(8) * 1j, "'0' are torch.complex64 on cpu"),
        ([1.0] * 8, r"'0' are list; an importance gives a tensor of shape \(8,\) or an order with a method keep"),
        (ordered(torch.rand(7)), "order of group '0' is of 7 channels; the group has 8"),
        (Given([0, 1, 2]), r"'0' keeps \[0, 1, 2\] at width 4; keep\(4\) returns a list of 4 ascending .* 0 to 7"),
        (Given([0, 1, 2, 8]), r"keeps \[0, 1, 2, 8\] at width 4"),
        (Given([-1, 1, 2, 3]), r"keeps \[-1, 1, 2, 3\] at width 4"),
        (Given([0, 2, 1, 3]), r"keeps \[0, 2, 1, 3\] at width 4"),
        (Given([0, 2, 2, 3]), r"keeps \[0, 2, 2, 3\] at width 4"),
        (Given([0, 1, 2, 3.5]), r"keeps \[0, 1, 2, 3.5\] at width 4"),
        (Given(None), "keeps None at width 4"),
    ],
)
def test_allocate_says_which_order_is_wrong_and_how(coupling, scores, match):
    with pytest.raises(gp.InputError, match=match):
        gp.allocate({"0": scores}, gp.Target(channels=0.5), coupling)


@pytest.mark.parametrize(
    "lost", [None, torch.zeros(6), torch.full((7,), float("nan")), torch.zeros(7, dtype=torch.cfloat)]
)
def test_what_an_order_says_is_lost_is_checked(lost):
    class Strange:
        size = 6

        def keep(self, width):
            return list(range(width))

    order = Strange()
    if lost is not None:
        order.lost = lost
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 3)))
    with pytest.raises(
        gp.InputError, match=r"order of group '0' says that .* is lost; `lost` is a tensor of shape \(7,\)"
    ):
        gp.allocate({"0": order}, gp.Target(channels=0.5), coupling)

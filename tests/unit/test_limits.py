"""What every method of allocation keeps to: floors, multiples, protected and tied groups, and what it says if it cannot."""

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.allocate import METHODS
from graphprune.allocate.classes import structures
from graphprune.cost import COSTS, widths
from tests.nets import Attention, CifarResNet


@pytest.fixture(scope="module")
def chain():
    """Four groups of 12, 20, 16 and 24 channels and their scores; the second matters least by far."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in ((5, 12), (12, 20), (20, 16), (16, 24), (24, 3))]
    net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 5)))
    scores = {g.name: torch.rand(g.size) + 1 for g in coupling.groups}
    scores["2"] *= 1e-3
    return coupling, scores


def kept(chain, method, **target):
    coupling, scores = chain
    plan = gp.allocate(scores, gp.Target(**target), coupling, method=method)
    found = widths(plan)
    for name, share in gp.Target(**target).budgets.items():
        if name != "channels" or method != "uniform":
            assert COSTS[name](coupling).at(found) <= share * COSTS[name](coupling).at({}) + 1e-9
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_group_stops_at_its_floor_and_the_others_give_the_rest(chain, method):
    free, held = kept(chain, method, macs=0.4), kept(chain, method, macs=0.4, floor=7)
    assert all(w >= 7 for w in held.values())
    if method != "uniform" and method != "isomorphic":
        assert free["2"] < 7 == held["2"]
        assert sum(held[n] for n in ("0", "4", "6")) < sum(free[n] for n in ("0", "4", "6"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("limits", "least"),
    [
        ({"floor": 5}, {"0": 5, "2": 5, "4": 5, "6": 5}),
        ({"floor": 0.3}, {"0": 4, "2": 6, "4": 5, "6": 8}),
        ({"max_removed": 0.7}, {"0": 4, "2": 6, "4": 5, "6": 8}),
        ({"floor": 5, "max_removed": 0.7}, {"0": 5, "2": 6, "4": 5, "6": 8}),
        ({"floor": 0.3, "multiple_of": 3}, {"0": 6, "2": 6, "4": 6, "6": 9}),
    ],
)
def test_the_least_of_each_group_is_what_limits_say_and_can_be_reached(chain, method, limits, least):
    coupling, scores = chain
    share = COSTS["macs"](coupling).at(least) / COSTS["macs"](coupling).at({})
    found = kept(chain, method, macs=share * (1 + 1e-9), **limits)
    assert found == least
    with pytest.raises(gp.TargetError, match=rf"at least {share:.4f} of the macs are left"):
        gp.allocate(scores, gp.Target(macs=0.99 * share, **limits), coupling, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_multiples_are_searched_and_not_rounded_to(chain, method):
    """Rounding up afterwards would pass the budget, rounding down would leave what still fits."""
    coupling, _ = chain
    found = kept(chain, method, macs=0.6, multiple_of=4)
    assert all(w % 4 == 0 for w in found.values())
    if method != "uniform":
        cost = COSTS["macs"](coupling)
        more = [found | {g.name: found[g.name] + 4} for g in coupling.groups if found[g.name] + 4 <= g.size]
        assert more
        assert all(cost.at(w) > 0.6 * cost.at({}) for w in more)


@pytest.mark.parametrize("method", METHODS)
def test_all_limits_and_three_budgets_hold_at_once(method):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for k in range(6) for m in (nn.Linear(40 if k else 7, 40), nn.ReLU())), nn.Linear(40, 3))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 7)))
    scores = gp.importance.Magnitude(normalize="mean")(net, coupling)
    limits = {"multiple_of": 4, "floor": 9, "max_removed": 0.75, "protect": ["0"], "tied": [["2", "8"]]}
    found = kept((coupling, scores), method, macs=0.7, params=0.65, memory=0.8, **limits)
    assert found["0"] == 40
    assert found["2"] == found["8"] < 40
    assert all(w % 4 == 0 and w >= 12 for w in found.values())


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_groups_with_equal_scores_the_same_ones_give_way_each_time(method):
    net = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU())))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 8)))
    scores = {g.name: torch.ones(g.size) for g in coupling.groups}
    backwards = dict(reversed(scores.items()))
    plans = [gp.allocate(s, gp.Target(macs=0.61), coupling, method=method) for s in (scores, backwards)]
    assert plans[0].removed
    assert plans[0] == plans[1]


def test_a_multiple_that_no_group_has_blocks_the_target_and_is_named(chain):
    coupling, scores = chain
    with pytest.raises(
        gp.TargetError, match=r"at least 1\.0000 .*\n  without multiple_of=32: macs 0\.0\d+\n0 of 4 groups"
    ):
        gp.allocate(scores, gp.Target(macs=0.5, multiple_of=32), coupling)


def test_each_limit_that_is_in_the_way_is_named_with_what_can_be_reached_without_it(chain):
    coupling, scores = chain
    target = gp.Target(macs=0.1, params=0.1, floor=0.25, protect=["2"])
    with pytest.raises(gp.TargetError) as caught:
        gp.allocate(scores, target, coupling)
    message = str(caught.value)
    for name, without in (("floor=0.25", {"protect": ["2"]}), ("protect=['2']", {"floor": 0.25})):
        value = float(message.split(f"without {name}: macs ")[1].split(",")[0])
        gp.allocate(scores, gp.Target(macs=value + 1e-4, **without), coupling)
        with pytest.raises(gp.TargetError):
            gp.allocate(scores, gp.Target(macs=value - 1e-4, **without), coupling)
    assert "1 of 4 groups and " in message
    assert "without multiple_of" not in message


def test_fractions_by_name_that_leave_too_much_are_named(chain):
    coupling, scores = chain
    with pytest.raises(gp.TargetError, match=r"without channels=\{'2': 0.5\}: macs 0\.0"):
        gp.allocate(scores, gp.Target(macs=0.2, channels={"2": 0.5}), coupling, method="greedy")


def test_scores_of_a_group_that_is_not_there_are_refused_with_the_nearest(chain):
    coupling, scores = chain
    with pytest.raises(gp.UnknownName, match=r"no group '22'.*did you mean"):
        gp.allocate(scores | {"22": torch.ones(3)}, gp.Target(macs=0.5), coupling)


@pytest.mark.parametrize("method", METHODS)
def test_scores_with_nan_are_refused(chain, method):
    coupling, scores = chain
    wrong = scores["4"].clone()
    wrong[3] = float("nan")
    with pytest.raises(gp.InputError, match=r"scores of group '4' hold NaN.*check the weights and importance"):
        gp.allocate(scores | {"4": wrong}, gp.Target(macs=0.5), coupling, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_of_one_gives_back_an_equal_model(method):
    torch.manual_seed(0)
    model, x = CifarResNet(1).eval(), torch.rand(2, 3, 32, 32)
    result = gp.prune(model, x, target=gp.Target(macs=1.0, memory=1.0), allocation=method)
    assert not result.plan.removed
    assert result.model is not model
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))
    assert torch.equal(result.model(x), model(x))


# -- classes of groups of one structure ----------------------------------------------------------------------------


def test_groups_of_one_structure_are_one_class_whatever_their_sizes():
    coupling = gp.couple(gp.trace(CifarResNet(2).eval(), torch.rand(1, 3, 32, 32)))
    by_name = dict(zip([g.name for g in coupling.groups], structures(coupling), strict=True))
    inner = {by_name[f"layer{stage}.{block}.conv1"] for stage in (1, 2, 3) for block in (0, 1)}
    assert len(inner) == 1
    assert inner.isdisjoint(n for name, n in by_name.items() if not name.endswith("conv1") or name == "conv1")


def test_heads_their_dims_and_hidden_channels_are_classes_of_their_own():
    hidden = nn.Sequential(nn.Linear(30, 9), nn.GELU(), nn.Linear(9, 30))
    net = nn.Sequential(Attention(), hidden, Attention())
    coupling = gp.couple(gp.trace(net, torch.rand(2, 7, 30)))
    names = {"0.qkv:3x[5]x6": 0, "0.qkv:3x5x[6]": 1, "1.0": 2, "2.qkv:3x[5]x6": 0, "2.qkv:3x5x[6]": 1}
    found = dict(zip([g.name for g in coupling.groups], structures(coupling), strict=True))
    classes = {}
    for name, kind in names.items():
        classes.setdefault(kind, set()).add(found[name])
    assert all(len(numbers) == 1 for numbers in classes.values())
    assert len(set.union(*classes.values())) == 3


def test_each_class_keeps_the_same_fraction_and_is_cut_at_one_threshold():
    """By one threshold over all, the hidden channels, whose scores are a hundred times as high, would stay whole."""
    torch.manual_seed(0)
    blocks = [
        m for _ in range(3) for m in (Attention(), nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 30)))
    ]
    net = nn.Sequential(*blocks)
    coupling = gp.couple(gp.trace(net, torch.rand(2, 7, 30)))
    kinds = dict(zip([g.name for g in coupling.groups], structures(coupling), strict=True))
    hidden = [f"{k}.0" for k in (1, 3, 5)]
    scores = {g.name: torch.rand(g.size) * (100 if g.name in hidden else 1) for g in coupling.groups}
    target = gp.Target(macs=0.6)
    found = {m: gp.allocate(scores, target, coupling, method=m) for m in ("isomorphic", "global")}
    assert all(len(found["global"].groups.get(name, range(40))) == 40 for name in hidden)
    sizes, kept = {g.name: g.size for g in coupling.groups}, widths(found["isomorphic"])
    classes = [[n for n in kinds if kinds[n] == kind] for kind in set(kinds.values())]
    shares = [sum(kept[n] for n in names) / sum(sizes[n] for n in names) for names in classes]
    assert len(shares) == 4  # heads, their dims, hidden channels, streams between blocks
    assert max(shares) - min(shares) < 1 / 15  # one channel of the smallest class, of 15 heads
    stays = [float(scores[n][i]) for n in hidden for i in found["isomorphic"].groups[n]]
    goes = [x for n in hidden for i, x in enumerate(scores[n].tolist()) if i not in found["isomorphic"].groups[n]]
    assert min(stays) > max(goes)
    assert len({kept[n] for n in hidden}) > 1


def test_of_one_class_isomorphic_is_global():
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(30, 30), nn.ReLU())))
    coupling = gp.couple(gp.trace(net, torch.rand(2, 30)))
    assert len(set(structures(coupling))) == 1
    scores = {g.name: torch.rand(g.size) for g in coupling.groups}
    plans = [gp.allocate(scores, gp.Target(macs=0.5), coupling, method=m) for m in ("isomorphic", "global")]
    assert plans[0] == plans[1]

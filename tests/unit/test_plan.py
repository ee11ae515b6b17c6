"""Plans: what is kept, written by hand, by the allocator, or read from JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune as gp
from graphprune.cost import macs, params, widths
from graphprune.importance.magnitude import PART, _powers, _vectors
from tests.nets import Attention, CifarResNet, DenseBlock, UNet


@pytest.fixture
def coupling():
    return gp.couple(gp.trace(CifarResNet(1).eval(), torch.rand(1, 3, 32, 32)))


def test_kept_lists_every_tensor_that_shrinks_and_no_other(coupling):
    plan = gp.Plan.of(coupling, {"layer2.0.conv1": [1, 3, 30]})
    assert set(plan.kept) == {
        *("layer2.0.conv1.weight", "layer2.0.conv2.weight"),
        *(f"layer2.0.bn1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
    }
    assert list(plan.kept["layer2.0.conv2.weight"]) == [1]
    assert plan.kept["layer2.0.conv2.weight"][1].tolist() == [1, 3, 30]
    assert plan.kept["layer2.0.conv2.weight"][1].dtype == torch.long
    assert plan.removed == 29


def test_a_group_in_the_middle_of_a_concatenation_is_kept_at_its_place(coupling):
    plan = gp.Plan.of(coupling, {"layer2.0.conv2[24:32]": [0, 7]})
    assert plan.kept["layer2.0.bn2.weight"][0].tolist() == [*range(24), 24, 31]
    assert plan.kept["linear.weight"][1].tolist() == [*range(16 + 24), 16 + 24, 16 + 31, *range(48, 64)]


def test_json_gives_the_same_plan_back(coupling):
    plan = gp.Plan.of(coupling, {"conv1": [3, 1, 2], "layer3.0.conv1": range(0, 64, 3)})
    again = gp.Plan.from_json(plan.to_json())
    assert again == plan
    assert plan.groups["conv1"] == (1, 2, 3)
    assert {n: {d: k.tolist() for d, k in dims.items()} for n, dims in again.kept.items()} == {
        n: {d: k.tolist() for d, k in dims.items()} for n, dims in plan.kept.items()
    }


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        ({"conv1": []}, gp.PlanError, r"'conv1': keeping none of 16 channels .* keep at least one"),
        ({"conv1": [0, 16]}, gp.PlanError, r"'conv1' has positions 0..15, not \[16\]"),
        ({"conv1": [-1]}, gp.PlanError, r"'conv1' has positions 0..15, not \[-1\]"),
        ({"conv1": [2, 2]}, gp.PlanError, r"positions \[2\] are listed twice"),
        ({"conv": [1]}, gp.UnknownName, r"no group 'conv'; did you mean 'conv1'"),
    ],
)
def test_a_plan_written_by_hand_is_checked(coupling, keep, error, match):
    with pytest.raises(error, match=match):
        gp.Plan.of(coupling, keep)


def test_a_plan_for_another_model_is_refused_with_the_differences(coupling):
    plan = gp.Plan.of(coupling, {"conv1": [0]})
    other = CifarResNet(2).eval()
    other_coupling = gp.couple(gp.trace(other, torch.rand(1, 3, 32, 32)))
    with pytest.raises(gp.PlanError, match=r"(?s)made for another model.*'layer1.1.conv1' is not in the plan.*Plan.of"):
        gp.rewrite(other, torch.rand(1, 3, 32, 32), other_coupling, plan)


@pytest.mark.parametrize(
    "text",
    ["nonsense", "{}", "[]", '{"format": 99}', '{"format": 1, "groups": {"a": [5]}, "sizes": {"a": 2}, "shapes": {}, "kept": {}}'],
)  # fmt: skip
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(gp.PlanError):
        gp.Plan.from_json(text)


def test_a_plan_of_another_format_says_which(coupling):
    data = json.loads(gp.Plan.of(coupling, {}).to_json())
    with pytest.raises(gp.PlanError, match="plan format 2 is not 1"):
        gp.Plan.from_json(json.dumps(data | {"format": 2}))


def test_a_plan_is_frozen(coupling):
    with pytest.raises(AttributeError):
        gp.Plan.of(coupling, {}).groups = {}  # type: ignore[misc]


# -- scores and allocation -----------------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_everything_removed_with_a_channel():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    scores = gp.importance.Magnitude(p=2)(model, gp.couple(gp.trace(model, torch.rand(1, 3))))["0"]
    first, bias, last = model[0].weight.double(), model[0].bias.double(), model[2].weight.double()
    want = (first.square().sum(1) + bias.square() + last.square().sum(0)).sqrt()
    torch.testing.assert_close(scores, want.detach())
    one = gp.importance.Magnitude(p=1)(model, gp.couple(gp.trace(model, torch.rand(1, 3))))["0"]
    torch.testing.assert_close(one, (first.abs().sum(1) + bias.abs() + last.abs().sum(0)).detach())


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_magnitude_of_a_weight_that_is_read_in_parts(p):
    model = nn.Sequential(nn.Linear(3, 500), nn.ReLU(), nn.Linear(500, 301)).double()
    assert model[2].weight.numel() > 2 * PART
    x = torch.rand(1, 3, dtype=torch.float64)
    scores = gp.importance.Magnitude(p=p)(model, gp.couple(gp.trace(model, x)))["0"]
    every = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], dim=1)
    torch.testing.assert_close(scores, torch.linalg.vector_norm(every, p, dim=1).detach(), rtol=1e-12, atol=0)


def test_magnitude_of_heads_and_head_dims_sums_over_the_other_factor():
    model = Attention(width=30, heads=5, head_dim=6)
    scores = gp.importance.Magnitude(p=1)(model, gp.couple(gp.trace(model, torch.rand(2, 7, 30))))
    qkv = (model.qkv.weight.double().abs().sum(1) + model.qkv.bias.double().abs()).reshape(3, 5, 6)
    proj = model.proj.weight.double().abs().sum(0).reshape(5, 6)
    torch.testing.assert_close(scores["qkv:3x[5]x6"], (qkv.sum((0, 2)) + proj.sum(1)).detach())
    torch.testing.assert_close(scores["qkv:3x5x[6]"], (qkv.sum((0, 1)) + proj.sum(0)).detach())


def test_random_depends_on_its_seed_alone():
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
    coupling = gp.couple(gp.trace(model, torch.rand(1, 3)))
    state = torch.get_rng_state()
    first, second, other = (gp.importance.Random(seed)(model, coupling)["0"] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_the_best_channels_stay_and_ties_go_to_the_first(coupling):
    scores = {"conv1": torch.tensor([0.0, 3, 1, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5])}
    plan = gp.allocate(scores, gp.Target(channels=0.25), coupling)
    assert plan.groups["conv1"] == (1, 3, 4, 15)
    assert plan.groups["layer1.0.conv1"] == tuple(range(16))
    assert gp.allocate({"conv1": torch.zeros(16)}, gp.Target(channels=0.25), coupling).groups["conv1"] == (0, 1, 2, 3)


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_a_cost_target_is_met_and_the_next_wider_fraction_would_miss_it(cost, fraction):
    model, example = CifarResNet(3).eval(), torch.rand(1, 3, 32, 32)
    coupling = gp.couple(gp.trace(model, example))
    scores = gp.importance.Random()(model, coupling)
    plan = gp.allocate(scores, gp.Target(**{cost: fraction}), coupling)
    model_of = {"macs": macs, "params": params}[cost](coupling)
    kept = widths(plan)
    assert model_of.at(kept) <= fraction * model_of.at({})
    shares = [k / g.size for k, g in zip(kept.values(), coupling.groups, strict=True)]
    assert max(shares) - min(shares) <= 1 / 8
    assert model_of.at(kept) > (fraction - 0.005) * model_of.at({})


def test_a_target_out_of_reach_names_the_smallest_value():
    model, example = CifarResNet(1).eval(), torch.rand(1, 3, 32, 32)
    coupling = gp.couple(gp.trace(model, example))
    with pytest.raises(gp.TargetError, match=r"macs=1e-06 cannot be reached: at least 0\.\d+ of the macs are left"):
        gp.allocate(gp.importance.Random()(model, coupling), gp.Target(macs=1e-6), coupling)


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "half", True])
def test_a_fraction_outside_zero_to_one_is_refused(value):
    with pytest.raises(gp.TargetError, match=r"the fraction kept lies in \(0, 1\]; to remove 30 % write macs=0.7"):
        gp.Target(macs=value)


def test_a_target_names_a_quantity():
    with pytest.raises(
        gp.TargetError, match=r"at least one of channels, macs, params, memory, latency, such as Target\(macs"
    ):
        gp.Target(multiple_of=8)


@pytest.mark.parametrize("p", [0, -1, float("inf"), float("nan")])
def test_a_norm_needs_a_positive_finite_order(p):
    with pytest.raises(gp.InputError, match="the order of a norm is positive and finite"):
        gp.importance.Magnitude(p=p)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: CifarResNet(2), (1, 3, 32, 32)),
        (lambda: DenseBlock(4), (1, 3, 8, 8)),
        (lambda: Attention(), (2, 7, 30)),
        (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=6)), (1, 6, 9, 9)),
    ],
)
def test_costs_are_those_of_the_emitted_module(build, shape):
    torch.manual_seed(0)
    model, example = build().eval(), torch.rand(*shape)
    result = gp.prune(model, example, target=gp.Target(channels=0.6))
    for net, kept in ((model, {}), (result.model, widths(result.plan))):
        with FlopCounterMode(display=False) as counter:
            net(example)
        assert macs(result.coupling).at(kept) * 2 == counter.get_total_flops()
        assert params(result.coupling).at(kept) == sum(p.numel() for p in net.parameters())


def test_macs_of_a_transposed_convolution_are_counted_too():
    model, example = UNet().eval(), torch.rand(1, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(example)
    assert macs(gp.couple(gp.trace(model, example))).at({}) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("p", [1, 2, 3.0])
@pytest.mark.parametrize(
    ("shape", "dims", "dtype"),
    [
        ((PART + 9, 1), [0], torch.float32),
        ((3, PART + 9), [0, 1], torch.float16),
        ((7, PART + 9), [1], torch.float32),
        ((PART + 5, 3), [0, 1], torch.complex64),
        ((300, 300, 3), [1, 2], torch.float64),
    ],
)
def test_powers_of_weights_that_are_widened_in_parts(shape, dims, dtype, p):
    weight = torch.randn(shape, dtype=dtype)
    before = weight.clone()
    whole = (weight.abs() if dtype.is_complex else weight).double().abs().pow(p)
    for dim, found in zip(dims, _powers(weight, "weight", dims, p), strict=True):
        want = whole.sum([k for k in range(weight.dim()) if k != dim])
        assert torch.allclose(found, want, rtol=1e-13, atol=0)
    assert torch.equal(weight, before)


def test_powers_of_one_vector_leave_it_as_it_is():
    bias = torch.randn(5, dtype=torch.float64)
    before = bias.clone()
    assert torch.equal(_vectors({"bias": bias}, 2)["bias"][0], before.square())
    assert torch.equal(bias, before)

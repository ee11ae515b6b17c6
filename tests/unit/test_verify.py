"""The proof can fail: every way of being wrong is caught and located."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.reference import like, run_zeroed, zeroed
from graphprune.verify import Bench, difference
from tests.nets import CifarResNet, randomised


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model, x = randomised(CifarResNet(1)), torch.rand(2, 3, 32, 32)
    return model, x, gp.prune(model, x, target=gp.Target(channels=0.5))


def broken(model, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


BREAKS = {
    "a weight": (lambda m: m.layer2[0].conv2.weight.mul_(1.01), r"they part at conv2d in layer2.0.conv2 \(nets.py:\d+\)"),
    "a bias of a norm": (lambda m: m.layer3[0].bn1.bias.add_(0.01), r"they part at batch_norm in layer3.0.bn1"),
    "a statistic": (lambda m: m.bn1.running_var.mul_(1.1), r"they part at batch_norm in bn1"),
    "the classifier": (lambda m: m.linear.weight.add_(1e-3), r"they part at linear in linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_model_is_caught_and_the_first_op_that_differs_is_named(pruned, name):
    model, x, result = pruned
    change, where = BREAKS[name]
    with pytest.raises(gp.VerificationError, match=where):
        gp.verify(model, broken(result.model, change), x, result.coupling, result.plan)


def test_the_dense_original_does_not_pass_for_the_zeroed_one(pruned):
    model, x, result = pruned
    with pytest.raises(gp.VerificationError, match="they part at conv2d in conv1"):
        gp.verify(model, model, x, result.coupling, result.plan)


def test_a_model_pruned_by_another_plan_is_caught(pruned):
    model, x, result = pruned
    other = gp.prune(model, x, target=gp.Target(channels=0.5), importance=gp.importance.Random(9))
    with pytest.raises(gp.VerificationError, match="differs from the zeroed original"):
        gp.verify(model, other.model, x, result.coupling, result.plan)


def test_a_plan_that_removes_nothing_has_no_effect_and_the_report_says_so(pruned):
    model, x, _ = pruned
    result = gp.prune(model, x, target=gp.Target(channels=1.0))
    assert result.plan.removed == 0
    assert (result.report.verification.effect, result.report.verification.error) == (0, 0)
    assert "this proves nothing" in str(result.report)


def test_a_wrong_rule_cannot_get_past_the_proof():
    model = nn.Sequential(nn.Linear(3, 6), nn.Softmax(-1), nn.Linear(6, 2)).eval()
    x = torch.rand(4, 3)
    wrong = {**gp.RULES, **gp.op("softmax", "*s -> *s", zero="a")}
    coupling = gp.couple(gp.trace(model, x), rules=wrong)
    plan = gp.Plan.of(coupling, {"0": [0, 1, 2]})
    small = gp.rewrite(model, x, coupling, plan).model
    with pytest.raises(gp.VerificationError, match="they part at softmax in 1"):
        gp.verify(model, small, x, coupling, plan)


def test_zeroing_touches_removed_slices_and_nothing_else(pruned):
    model, _, result = pruned
    state = zeroed(model, result.plan)
    assert set(state) == set(result.plan.kept)
    for name, tensor in state.items():
        original = dict((*model.named_parameters(), *model.named_buffers()))[name]
        stays = torch.ones(tensor.shape, dtype=torch.bool)
        for dim, kept in result.plan.kept[name].items():
            gone = torch.tensor(sorted(set(range(tensor.shape[dim])) - set(kept.tolist())))
            stays.index_fill_(dim, gone, False)
        assert torch.equal(tensor, torch.where(stays, original.detach(), 0))
        assert not stays.all()


def test_nan_outputs_are_an_error_unless_verification_is_off():
    class Nan(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.first(x).relu()) / (x.sum() * 0)

    model, x = Nan().eval(), torch.rand(4, 3)
    with torch.no_grad():
        assert not model(x).isfinite().any()
    model.last.bias.data.fill_(float("nan"))
    with pytest.raises(gp.VerificationError, match=r"output 0 of the original model holds NaN.*verify=False"):
        gp.prune(model, x, target=gp.Target(channels=0.5))
    assert gp.prune(model, x, target=gp.Target(channels=0.5), verify=False).model.first.out_features == 3


def test_renormalised_groups_are_checked_against_masked_statistics():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.rand(5, 3)
    result = gp.prune(model, x, target=gp.Target(channels=0.5), norms="prune")
    assert result.model[1].normalized_shape == (4,)
    assert result.report.verification.error < 1e-9
    kept = list(result.plan.groups["0"])
    h = model[0](x)[:, kept]
    h = nn.functional.layer_norm(h, [4], model[1].weight[kept], model[1].bias[kept])
    torch.testing.assert_close(result.model(x), nn.functional.linear(h.relu(), model[3].weight[:, kept], model[3].bias))
    plain = run_zeroed(model, result.plan, gp.Inputs((x,)))[0]
    assert not torch.allclose(plain, result.model(x), atol=1e-3)


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0])], 0.0),
        ([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])], 0.25),
        ([torch.zeros(2)], [torch.zeros(2)], 0.0),
        ([torch.full((2,), 0.5)], [torch.zeros(2)], 0.5),
        ([torch.zeros(2)], [torch.zeros(3)], float("inf")),
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], float("inf")),
        ([torch.tensor([float("nan")])], [torch.tensor([1.0])], float("inf")),
        ([torch.tensor([float("inf")])], [torch.tensor([float("inf")])], 0.0),
        ([torch.tensor([1])], [torch.tensor([2])], 0.5),
        ([torch.tensor([True])], [torch.tensor([False])], 1.0),
    ],
)
def test_differences_are_relative_and_anything_odd_is_infinite(got, want, error):
    assert difference(got, want) == error


def test_fresh_inputs_are_like_the_example_and_not_the_same():
    example = gp.Inputs((torch.rand(500) * 4 + 10, torch.arange(500)), {"flag": True})
    fresh = like(example, seed=1)
    assert abs(fresh.args[0].mean() - example.args[0].mean()) < 0.5
    assert not torch.equal(fresh.args[0], example.args[0])
    assert sorted(fresh.args[1].tolist()) == list(range(500))
    assert not torch.equal(fresh.args[1], example.args[1])
    assert fresh.kwargs["flag"] is True


def test_a_model_with_nothing_to_remove_is_refused_with_the_causes():
    with pytest.raises(gp.PlanError, match=r"(?s)Linear has no channels that may be removed.*the model's output 0"):
        gp.prune(nn.Linear(3, 2), torch.rand(1, 3), target=gp.Target(channels=0.5))


class Rounds(nn.Module):
    """Fixes float32 in the middle of its code, as many norms do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.first(x)
        h = h.float().tanh().sin().to(h.dtype)
        return self.last(h.float().to(h.dtype))


def test_a_small_error_in_float64_is_an_error():
    torch.manual_seed(0)
    model, x = randomised(CifarResNet(1)), torch.rand(2, 3, 32, 32)
    result = gp.prune(model, x, target=gp.Target(channels=0.5))
    with pytest.raises(gp.VerificationError, match=r"\(tolerance 1e-09\)"):
        gp.verify(
            model, broken(result.model, lambda m: m.linear.weight.mul_(1 + 1e-7)), x, result.coupling, result.plan
        )


def test_a_model_that_rounds_to_float32_inside_is_allowed_its_rounding_and_no_more():
    torch.manual_seed(0)
    model, x = Rounds().eval(), torch.rand(4, 3)
    result = gp.prune(model, x, target=gp.Target(channels=0.5))
    noisy = broken(result.model, lambda m: m.last.weight.mul_(1 + 1e-6))
    check = gp.verify(model, noisy, x, result.coupling, result.plan)
    assert (check.precision, check.tolerance) == ("float64 with parts in float32", 1e-5)
    with pytest.raises(gp.VerificationError, match=r"\(tolerance 1e-05\)"):
        gp.verify(model, broken(result.model, lambda m: m.last.weight.mul_(1 + 1e-4)), x, result.coupling, result.plan)


def test_a_wrong_attention_scale_is_caught_although_it_hardly_shows():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.dim = nn.Linear(6, 24), nn.Linear(8, 6), 8
            nn.init.normal_(self.qkv.weight, std=1e-3)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 5, 3, 1, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    result = gp.prune(Faint().eval(), torch.rand(2, 5, 6), target=gp.Target(channels=0.5))
    assert result.report.emitter == "graph"
    assert result.report.verification.error < 1e-9


class Faded(nn.Module):
    """A branch behind a scale that starts at zero, as in ReZero and LayerScale."""

    def __init__(self, start):
        super().__init__()
        self.first, self.up, self.down, self.last = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.full((6,), start))

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.scale * self.down(self.up(h).relu()))


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_an_error_behind_a_scale_that_is_almost_zero_is_caught(start):
    torch.manual_seed(0)
    model, x = Faded(start).eval(), torch.rand(4, 3)
    result = gp.prune(model, x, target=gp.Target(channels=0.5))
    assert result.report.verification.error < 1e-9
    with pytest.raises(gp.VerificationError, match="they part at linear in up"):
        gp.verify(model, broken(result.model, lambda m: m.up.weight.mul_(2)), x, result.coupling, result.plan)


def test_a_mask_in_the_output_does_not_hide_an_error_beside_it():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(self.first(x).relu()).masked_fill(torch.arange(5) > 2, -1e12)

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.rand(4, 3)
    result = gp.prune(model, x, target=gp.Target(channels=0.5))
    assert result.report.verification.error < 1e-9
    with pytest.raises(gp.VerificationError, match="they part at linear in last"):
        gp.verify(model, broken(result.model, lambda m: m.last.weight.mul_(1.01)), x, result.coupling, result.plan)


def test_a_copy_that_still_runs_the_original_is_caught():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.head = nn.Linear(2, 2)
            self.call = lambda h: self.head(h)

        def forward(self, x):
            return self.call(self.last(self.first(x).relu()))

    result = gp.prune(Closed().eval(), torch.rand(4, 3), target=gp.Target(channels=0.5))
    assert result.report.emitter == "graph"
    assert "the copy still runs head of the original" in result.report.reason


def test_a_model_that_changes_its_input_in_place_gets_a_copy():
    class Halving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.first(x.mul_(0.5)).relu())

    model, x = Halving().eval(), torch.rand(4, 3)
    before = x.clone()
    assert gp.prune(model, x, target=gp.Target(channels=0.5)).report.verification.error < 1e-9
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, on copying any graph module
def test_a_graph_of_code_that_fixes_float32_is_held_to_its_twin_and_to_the_original_as_it_is():
    torch.manual_seed(0)
    model, x = Rounds().eval(), torch.rand(4, 3)
    result = gp.prune(model, x, target=gp.Target(channels=0.5), emit="graph")
    bench = Bench(model, gp.Inputs((x,)), result.coupling, result.plan)
    check = bench._by_twin(result.model, fresh=1)
    assert (check.precision, check.tolerance) == ("float64", 1e-9)
    assert check.error < 1e-12
    with pytest.raises(gp.VerificationError, match="they part at linear"):
        bench._by_twin(broken(result.model, lambda m: m.last.weight.mul_(1.1)), fresh=1)

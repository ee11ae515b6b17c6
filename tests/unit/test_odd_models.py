"""Models and calls that once went wrong, or easily could."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from tests.nets import Attention, randomised


class Net(nn.Module):
    """Two layers and what is done between and after them."""

    def __init__(self, f, width=8):
        super().__init__()
        self.f, self.first, self.last = f, nn.Linear(3, width), nn.Linear(width, 4)

    def forward(self, x, *rest):
        return self.f(self, x, *rest)


def half(model, inputs, **options):
    torch.manual_seed(0)
    return gp.prune(model.eval(), inputs, target=gp.Target(channels=0.5), **options)


# -- the proof sees what outputs hide ------------------------------------------------------------------------------


class DefaultScale(nn.Module):
    """Attention whose scale follows the head dim, which pruning changes: the same class is wrong, if ever so little."""

    def __init__(self, after):
        super().__init__()
        self.qkv, self.proj, self.dim, self.after = nn.Linear(6, 24), nn.Linear(8, 6), 8, after

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(2, 5, 3, 1, self.dim).permute(2, 0, 3, 1, 4)
        return self.after(
            self, self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, self.dim))
        )


@pytest.mark.parametrize(
    "after",
    [
        lambda s, y: y.argmax(-1),
        lambda s, y: y.masked_fill(torch.arange(6) > 3, -1e9),
        lambda s, y: y * 1e-7 + 1,
    ],
    ids=["argmax", "mask", "faint"],
)
def test_a_wrong_scale_is_seen_behind_any_output(after):
    result = half(DefaultScale(after), torch.randn(2, 5, 6))
    assert result.report.emitter == "graph"
    with pytest.raises(gp.RewriteError, match=r"its output is off by|differs from"):
        half(DefaultScale(lambda s, y: y), torch.randn(2, 5, 6), emit="module")


def test_an_output_that_is_zero_but_for_rounding_is_no_error():
    model = Net(lambda s, x: (lambda y: (y, (y - y.mean(-1, keepdim=True)).sum(-1)))(s.last(s.first(x).relu())))
    assert half(model, torch.randn(5, 3)).report.verification.error < 1e-9


def test_fresh_inputs_stay_where_the_model_works():
    logarithm = Net(lambda s, x: s.last(s.first(x.log()).relu()))
    assert half(logarithm, torch.rand(5, 3) + 0.1).report.verification.inputs == 2
    table = nn.Embedding(7, 3)
    looked_up = Net(lambda s, i: s.last(s.first(table.weight.detach()[i.long()]).relu()))
    assert half(looked_up, torch.tensor([0.0, 3.0, 6.0, 6.0])).report.verification.error < 1e-9


def test_a_model_that_works_on_its_example_alone_is_said_to_be_compared_once():
    table = torch.tensor([[float("nan")] * 3, [0.1, 0.2, 0.3]])
    only = Net(lambda s, x: s.last(s.first(table[(x == 0.25).all().long()] + x).relu()))
    report = half(only, torch.full((1, 3), 0.25)).report
    assert report.verification.inputs == 1
    assert "on 1 input " in str(report)


# -- graph modules say no where they do not hold -------------------------------------------------------------------


def test_a_graph_module_refuses_another_length():
    small = half(
        Net(lambda s, x: s.last(s.first(x).relu().sum(1) / x.shape[1])), torch.rand(2, 5, 3), emit="graph"
    ).model
    assert small(torch.rand(7, 5, 3)).shape == (7, 4)
    with pytest.raises(AssertionError, match=r"dim 1 of x was 5; prune again with others"):
        small(torch.rand(2, 9, 3))


def test_a_graph_module_refuses_another_number():
    model = Net(lambda s, x, n, flag: s.last(s.first(x).relu() * n) * (1 if flag else -1))
    small = half(model, (torch.rand(2, 3), 2, True), emit="graph").model
    assert small(torch.rand(5, 3), 2, True).shape == (5, 4)
    for other in ((5, True), (2, False)):
        with pytest.raises(AssertionError, match="prune again with others"):
            small(torch.rand(5, 3), *other)


def test_a_graph_module_of_a_fixed_batch_refuses_another():
    result = half(Net(lambda s, x: s.last(s.first(x).relu().reshape(3, -1)).sum(0)), torch.rand(3, 3), emit="graph")
    assert result.report.reason.startswith("the batch size stays 3")
    with pytest.raises(AssertionError, match=r"dim 0 of x was 3"):
        result.model(torch.rand(6, 3))


def test_a_frozen_batch_norm_stays_frozen_in_a_graph():
    body = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )
    body.train()[1].eval()
    torch.manual_seed(0)
    small = gp.prune(body, torch.rand(2, 3, 4, 4), target=gp.Target(channels=0.5), emit="graph").model
    assert small.training
    before = {n: b.clone() for n, b in small.named_buffers()}
    small(torch.rand(4, 3, 4, 4))
    moved = {n for n, b in small.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {"4.running_mean", "4.running_var"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, on copying any graph module
def test_a_graph_module_can_be_pickled_and_keeps_hidden_buffers_hidden():
    model = Net(lambda s, x: s.last(s.first(x).relu() * s.hidden))
    model.register_buffer("hidden", torch.rand(8), persistent=False)
    small = half(model, torch.rand(2, 3), emit="graph").model
    assert set(small.state_dict()) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    x = torch.rand(5, 3)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))


def test_without_verification_a_class_that_would_be_wrong_is_still_passed_over():
    result = half(DefaultScale(lambda s, y: y), torch.randn(2, 5, 6), verify=False)
    assert (result.report.emitter, result.report.verification) == ("graph", None)


# -- what zeros are --------------------------------------------------------------------------------------------------


PINNED = {
    "a sibling view written in place": lambda s, x: (
        lambda t: (lambda y: (t[:, :2].add_(1), s.last(t * 0) + y.sum(-1, keepdim=True))[1])(t[:, :4])
    )(s.first(x)),
    "random numbers per channel": lambda s, x: s.last(torch.rand_like(s.first(x))) + s.first(x).argmax(-1, keepdim=True),
    "the angle of zero": lambda s, x: s.last(s.first(x).softmax(-1)) + torch.atan2(s.first(x), -s.first(x).abs() - 1).sum(-1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_these_stay_whole(name):
    coupling = gp.couple(gp.trace(Net(PINNED[name]).eval(), torch.rand(4, 3)))
    assert not [g for g in coupling.groups if g.name == "first" or g.name.startswith("first[0:")]
    assert [p for p in coupling.pinned if p.name.startswith("first")]


def test_a_weight_kept_as_a_plain_tensor_is_not_taken_for_zero():
    plain = torch.rand(8, 3)
    check = half(Net(lambda s, x: s.last(s.first(x).relu() + F.linear(x, plain))), torch.rand(4, 3)).report.verification
    assert check.precision == "float32"  # the tensor in the closure cannot be raised with the model
    assert check.error < 1e-6
    assert check.effect > 1e-2


def test_parameters_that_share_storage_stay_whole():
    model = Net(lambda s, x: s.last(s.first(x).relu()) @ s.back)
    model.back = nn.Parameter(model.last.weight.data)
    model.own = nn.Parameter(torch.rand(3))
    coupling = gp.couple(gp.trace(model.eval(), torch.rand(2, 3)))
    assert coupling.groups == ()
    assert "last.weight and back share storage" in coupling.why_not("first.weight", 0).replace(
        "back and last.weight", "last.weight and back"
    )


# -- the user's objects ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Moves its buffers, its lists and the generators of Python and NumPy on every call."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.log = nn.Linear(3, 8), nn.Linear(8, 2), []
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.first(x)
        self.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
        self.calls += 1
        self.log.append(random.random() + float(np.random.rand()))
        return self.last(h.relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_lists_and_generators_are_as_before(dtype):
    model, x = Counting().to(dtype).eval(), torch.rand(4, 3, dtype=dtype)
    model.average.fill_(0.5)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    half(model, x)
    assert (int(model.calls), model.log) == (0, [])
    assert torch.equal(model.average, torch.full((8,), 0.5, dtype=dtype))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


# -- arguments --------------------------------------------------------------------------------------------------------


BAD = {
    "a number for a target": ({"target": 0.5}, r"target=0.5: pass a Target .* gp.Target\(macs=0.5\)"),
    "a class for an importance": ({"importance": gp.importance.Magnitude}, "importance=Magnitude: pass an instance"),
    "a number among the names": ({"keep_names": [3]}, "keep_names holds 3; it lists names"),
    "too few scores": ({"importance": lambda m, c: {"first": torch.rand(3)}}, r"'first' are \(3,\); .* shape \(8,\)"),
    "a list of scores": ({"importance": lambda m, c: {"first": [1.0] * 8}}, r"'first' are list; an importance gives"),
    "NaN among the scores": ({"importance": lambda m, c: {"first": torch.rand(8) * float("nan")}}, "'first' hold NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_of_the_wrong_kind_are_named(name):
    options, match = BAD[name]
    with pytest.raises(gp.InputError, match=match):
        gp.prune(
            Net(lambda s, x: s.last(s.first(x))), torch.rand(2, 3), **{"target": gp.Target(channels=0.5), **options}
        )


def test_wrapped_models_are_to_be_unwrapped():
    with pytest.raises(gp.InputError, match=r"wrapped in DataParallel; prune model.module"):
        gp.trace(nn.DataParallel(nn.Linear(3, 2)), torch.rand(1, 3))


def test_positions_of_a_plan_are_ints():
    coupling = gp.couple(gp.trace(Net(lambda s, x: s.last(s.first(x))), torch.rand(2, 3)))
    for wrong in ([0.7, 1.2], torch.rand(8) > 0.5):
        with pytest.raises(gp.PlanError, match=r"positions are ints, .* for a mask use mask.nonzero\(\).flatten\(\)"):
            gp.Plan.of(coupling, {"first": wrong})


def test_a_coupling_of_another_model_is_refused():
    model, other = Net(lambda s, x: s.last(s.first(x))), Net(lambda s, x: s.last(s.first(x)), width=6)
    coupling = gp.couple(gp.trace(model, torch.rand(2, 3)))
    with pytest.raises(gp.PlanError, match=r"first.weight is \[8, 3\] in the plan, \[6, 3\] in the model"):
        gp.rewrite(other, torch.rand(2, 3), coupling, gp.Plan.of(coupling, {"first": [0]}))


# -- texts -----------------------------------------------------------------------------------------------------------


def test_explain_lists_every_part_that_two_parameters_share():
    coupling = gp.couple(gp.trace(randomised(Attention(30, 4, 6)), torch.rand(2, 7, 30)))
    text = coupling.explain("qkv.weight", "qkv.bias")
    assert [line.split(" share ")[1] for line in text.splitlines() if " share " in line] == [
        "3 channels (pinned: unbind takes single positions of it, at " + text.split("unbind takes single positions of it, at ")[1].split("):")[0] + "):",
        "4 channels (group qkv:3x[4]x6):",
        "6 channels (group qkv:3x4x[6]):",
    ]  # fmt: skip
    assert coupling.explain("qkv.weight", "qkv.weight") == "qkv.weight and qkv.weight are one and the same tensor"


def test_what_the_traced_forward_does_not_read_is_reported():
    model = Net(lambda s, x: s.last(s.first(x)) + (s.auxiliary(s.first(x)) if s.training else 0))
    model.auxiliary = nn.Linear(8, 4)
    report = half(model, torch.rand(2, 3)).report
    assert report.unused == ("auxiliary.weight", "auxiliary.bias")
    assert "not read  2 tensors, such as auxiliary.weight" in str(report)

"""Groups, pins and their explanations."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

import graphprune as gp
from tests.nets import Attention, CifarResNet, DenseBlock, UNet, Yolo

GOLDEN = Path(__file__).parent.parent / "golden"


def coupled(model, *inputs, **options):
    return gp.couple(gp.trace(model.eval(), inputs), **options)


class Odd(nn.Module):
    """A linear layer, an op in the middle, a linear layer."""

    def __init__(self, middle, width=6):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(3, width), nn.Linear(width, 2), middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def lines(coupling):
    return [f"{g.name} {g.size} {g.exactness}: {' '.join(map(str, g.members))}" for g in coupling.groups]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("cifar_resnet20", lambda: (CifarResNet(3), torch.rand(1, 3, 32, 32))),
        ("unet", lambda: (UNet(), torch.rand(1, 3, 16, 16))),
        ("dense_block", lambda: (DenseBlock(3), torch.rand(1, 3, 8, 8))),
        ("yolo", lambda: (Yolo(), torch.rand(1, 3, 64, 64))),
        ("attention", lambda: (Attention(), torch.rand(2, 7, 30))),
    ],
)
def test_groups_are_those_a_person_has_read(name, build):
    model, example = build()
    assert lines(coupled(model, example)) == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_both_the_residual_stream_and_the_inner_channels_are_groups():
    groups = {g.name: g for g in coupled(CifarResNet(9), torch.rand(1, 3, 32, 32)).groups}
    inner = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)]
    stream = ["conv1", "layer2.0.conv2[0:8]", "layer2.0.conv2[24:32]", "layer3.0.conv2[0:16]", "layer3.0.conv2[48:64]"]
    assert sorted(groups) == sorted(inner + stream)
    assert {gp.Plan.of(coupled(CifarResNet(1), torch.rand(1, 3, 32, 32)), {}).removed} == {0}
    assert str(groups["layer1.4.conv1"].members[0]) == "layer1.4.conv1.weight[0]"


def test_explain_names_the_add_that_ties_two_blocks():
    text = coupled(CifarResNet(9), torch.rand(1, 3, 32, 32)).explain("layer2.3.conv2.weight", "layer2.4.conv2.weight")
    assert text.startswith("layer2.3.conv2.weight dim 0 and layer2.4.conv2.weight dim 0 share ")
    assert "through add in layer2.4 (nets.py:" in text
    assert "`return F.relu(y + x)`" in text


def test_explain_says_so_when_two_parameters_are_not_tied():
    coupling = coupled(CifarResNet(1), torch.rand(1, 3, 32, 32))
    assert coupling.explain("layer1.0.conv1.weight", "linear.bias") == (
        "layer1.0.conv1.weight and linear.bias are not tied: they share no channels"
    )


def test_why_not_gives_the_cause_and_the_groups():
    coupling = coupled(Odd(nn.Softmax(-1)), torch.rand(2, 3))
    assert coupling.why_not("last.weight", 0) == (
        "last.weight dim 0: 2 channels stay because it reaches dim 1 of the model's output 0"
    )
    assert "softmax compares or orders its positions, at softmax in middle (" in coupling.why_not("last.weight", 1)
    assert coupled(Odd(nn.ReLU()), torch.rand(2, 3)).why_not("last.weight", 1) == (
        "last.weight dim 1: 6 channels can be pruned, as group first"
    )


@pytest.mark.parametrize("question", [lambda c: c.why_not("first.wieght", 0), lambda c: c.explain("first.wieght", "x")])
def test_a_mistyped_parameter_gets_the_nearest_names(question):
    with pytest.raises(gp.UnknownName, match=r"'first.wieght'; did you mean 'first.weight'"):
        question(coupled(Odd(nn.ReLU()), torch.rand(2, 3)))


def test_a_dim_that_is_not_there_is_refused():
    with pytest.raises(gp.UnknownName, match=r"first.weight has dims 0..1, not 2"):
        coupled(Odd(nn.ReLU()), torch.rand(2, 3)).why_not("first.weight", 2)


class Both(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.first, self.last = f, nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.f(self, x)


NOT_EXACT = {
    "a sum over sigmoids": lambda s, x: s.last(s.first(x)) + s.first(x).sigmoid().sum(-1, keepdim=True),
    "a sum after adding one": lambda s, x: s.last(s.first(x)) + (s.first(x) + 1).sum(-1, keepdim=True),
    "linear attention with elu + 1": lambda s, x: s.last(s.first(x)) + (
        (nn.functional.elu(s.first(x)) + 1) @ (nn.functional.elu(s.first(x)) + 1).T
    ).sum(),
    "a maximum over channels": lambda s, x: s.last(s.first(x)) + s.first(x).amax(-1, keepdim=True),
    "a mean over channels": lambda s, x: s.last(s.first(x)) + s.first(x).mean(-1, keepdim=True),
    "a softmax over channels": lambda s, x: s.last(s.first(x).softmax(-1)),
    "an in-place shift before a sum": lambda s, x: (lambda h: s.last(h * 0) + h.add_(1).sum(-1, keepdim=True))(s.first(x)),
    "an in-place shift of a view before a sum": lambda s, x: (
        lambda h: (h[:, :3].add_(1), s.last(h * 0) + h.sum(-1, keepdim=True))[1]
    )(s.first(x)),
    "every fourth channel": lambda s, x: s.last(s.first(x) * 0) + s.first(x)[:, ::4],
    "reversed channels": lambda s, x: s.last(s.first(x).flip(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_EXACT)
def test_what_zeroing_cannot_say_is_pinned(name):
    coupling = coupled(Both(NOT_EXACT[name]), torch.rand(4, 3))
    assert coupling.groups == ()
    assert [p for p in coupling.pinned if p.name.startswith("first")]


EXACT = {
    "a sum": lambda s, x: s.last(s.first(x)) + s.first(x).sum(-1, keepdim=True),
    "an l2 norm": lambda s, x: s.last(nn.functional.normalize(s.first(x), dim=-1)),
    "a product of sigmoids and values": lambda s, x: s.last(s.first(x).sigmoid() * s.first(x)),
    "a gram matrix": lambda s, x: s.last(s.first(x)).sum() + s.first(x) @ s.first(x).T,
    "a shift before a linear layer": lambda s, x: s.last(s.first(x) + 1),
    "an in-place product": lambda s, x: s.last(s.first(x).mul_(2)),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_zeroing_can_say_is_free_and_verifies(name):
    torch.manual_seed(0)
    model = Both(EXACT[name]).eval()
    result = gp.prune(model, torch.rand(4, 3), target=gp.Target(channels=0.5))
    assert result.coupling.group("first").exactness == "exact"
    assert result.report.verification.error < 1e-9
    assert result.report.verification.effect > 0


def test_norms_are_pinned_unless_asked_for_and_then_marked():
    model = Odd(nn.LayerNorm(6))
    assert coupled(model, torch.rand(2, 3)).groups == ()
    (group,) = coupled(model, torch.rand(2, 3), norms="prune").groups
    assert (group.name, group.exactness) == ("first", "renormalised")
    assert group.cause.startswith("layer_norm in middle (")


class Custom(nn.Module):
    def forward(self, x):
        return torch.ops.aten.special_airy_ai(x) * torch.ops.aten.special_bessel_j0(x)


def test_ops_without_a_rule_pin_what_they_touch_and_are_listed():
    coupling = coupled(Odd(Custom()), torch.rand(2, 3))
    assert coupling.groups == ()
    assert [(u.op, len(u.nodes), u.why) for u in coupling.unknown] == [
        ("special_airy_ai", 1, "no rule"),
        ("special_bessel_j0", 1, "no rule"),
    ]
    assert "no rule for special_airy_ai (1 node)" in str(coupling)


def test_ops_without_a_rule_can_be_an_error_that_lists_them_all():
    with pytest.raises(
        gp.UnsupportedOp, match=r"(?s)special_airy_ai.*add op\('special_airy_ai', 'b! c! -> b! c!'\).*bessel"
    ):
        coupled(Odd(Custom()), torch.rand(2, 3), on_unknown="error")


def test_a_user_can_add_rules():
    rules = gp.RULES | gp.op("special_airy_ai special_bessel_j0", "*s -> *s")
    coupling = coupled(Odd(Custom()), torch.rand(2, 3), rules=rules)
    assert [g.name for g in coupling.groups] == ["first"]
    assert coupling.unknown == ()


def test_keep_names_pins_parameters_and_modules():
    model, example = CifarResNet(2), torch.rand(1, 3, 32, 32)
    every = {g.name for g in coupled(model, example).groups}
    kept = {g.name for g in coupled(model, example, keep_names=["layer1.0.conv1", "bn1.weight"]).groups}
    assert every - kept == {"layer1.0.conv1", "conv1"}
    with pytest.raises(gp.UnknownName, match=r"'layer1.0.conv3'; did you mean 'layer1.0.conv"):
        coupled(model, example, keep_names=["layer1.0.conv3"])


@pytest.mark.parametrize("option", [{"norms": "remove"}, {"on_unknown": "ignore"}])
def test_a_mistyped_option_is_refused(option):
    with pytest.raises(gp.InputError, match="it is 'pin' or"):
        coupled(Odd(nn.ReLU()), torch.rand(2, 3), **option)


def test_the_graph_joins_slots_through_their_ops():
    graph = coupled(Odd(nn.ReLU()), torch.rand(2, 3)).graph
    assert isinstance(graph, nx.Graph)
    assert nx.has_path(graph, ("first.weight", 0), ("last.weight", 1))
    assert not nx.has_path(graph, ("first.weight", 1), ("last.weight", 1))
    assert {data["node"].op for *_, data in graph.edges(data=True)} == {"linear", "relu"}


def test_the_table_shows_groups_pins_and_causes():
    text = str(coupled(Odd(nn.ReLU()), torch.rand(2, 3)))
    assert text.splitlines()[0].split() == ["group", "channels", "members", "class"]
    assert text.splitlines()[1].split() == ["first", "6", "3", "exact"]
    assert "it reaches dim 1 of the model's output 0" in text


def test_a_group_name_that_is_not_there_gets_the_nearest():
    with pytest.raises(gp.UnknownName, match=r"no group 'frist'; did you mean 'first'"):
        coupled(Odd(nn.ReLU()), torch.rand(2, 3)).group("frist")


def test_a_billion_parameters_on_the_meta_device_couple():
    with torch.device("meta"):
        blocks = [nn.Sequential(nn.Linear(8192, 16384), nn.ReLU(), nn.Linear(16384, 8192)) for _ in range(4)]
        model = nn.Sequential(*blocks)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    coupling = coupled(model, torch.empty(1, 8192, device="meta"))
    assert [g.size for g in coupling.groups] == [16384, 8192] * 3 + [16384]


class Picks(nn.Module):
    """Takes the rows that are positive, two by two."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(h[h[:, 0] > 0].reshape(2, -1, 6)).sum() + self.last(h.relu())


def test_shapes_that_depend_on_data_are_listed_and_pinned():
    coupling = coupled(Picks(), torch.rand(4, 3))
    assert coupling.groups == ()
    why = {u.op: u.why for u in coupling.unknown}
    assert "a reshape whose sizes depend on the data has no rule" in why["reshape"]

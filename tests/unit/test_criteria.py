"""Criteria that read weights alone, against values worked out from the weights by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import graphprune as gp
from graphprune.importance import FPGM, LAMP, Gamma, Magnitude, Random, fpgm
from graphprune.importance.lamp import relative
from graphprune.importance.protocol import Importance
from tests.nets import Attention, CifarResNet, DenseBlock, UNet, Yolo, randomised


class Residual(nn.Module):
    """A stem, a block on its output, and a head: the block's second convolution shares the channels of the stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.conv1, self.bn1 = nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        return self.head((x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu())


class Concatenation(nn.Module):
    """Two branches side by side, normalised together."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.head(self.bn(torch.cat([self.left(x), self.right(x)], 1)).relu())


class Written(nn.Module):
    """What a module's forward says, over the parameters it is given."""

    def __init__(self, forward, **parameters):
        super().__init__()
        self.f, self.last = forward, nn.Linear(8, 4)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.last(self.f(self, x).relu())


def grouped():
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 2, 1))


IMAGE = torch.rand(1, 3, 8, 8)
SEQUENCE = torch.rand(2, 7, 30)


def coupled(model, x=IMAGE, **options):
    model = randomised(model).double()
    return model, gp.couple(gp.trace(model, x.double()), **options)


def elements(*tensors):
    """Rows of channels beside each other: each tensor has its channels in dim 0."""
    return torch.cat([t.detach().reshape(len(t), -1) for t in tensors], 1)


def stem_members(net):
    """Everything removed with a channel of the stem of `Residual`, per member, channels first."""
    weights = [net.stem.weight, net.conv2.weight, net.conv1.weight.transpose(0, 1), net.head.weight.transpose(0, 1)]
    return [*weights, net.stem.bias, net.bn0.weight, net.bn0.bias, net.bn2.weight, net.bn2.bias]


def pairwise(points):
    return torch.stack([torch.stack([(a - b).norm() for b in points]).sum() for a in points])


def close(got, want):
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


# -- magnitude -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_magnitude_takes_one_norm_or_the_mean_or_the_largest_of_its_members_norms(p):
    net, coupling = coupled(Residual())
    members = [elements(m) for m in stem_members(net)]
    norms = torch.stack([m.abs().pow(p).sum(1).pow(1 / p) for m in members])
    close(Magnitude(p)(net, coupling)["stem"], torch.cat(members, 1).abs().pow(p).sum(1).pow(1 / p))
    close(Magnitude(p, reduce="mean")(net, coupling)["stem"], norms.mean(0))
    close(Magnitude(p, reduce="max")(net, coupling)["stem"], norms.amax(0))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_by_size_takes_means_of_powers(p):
    net, coupling = coupled(Residual())
    members = [elements(m) for m in stem_members(net)]
    means = torch.stack([m.abs().pow(p).mean(1).pow(1 / p) for m in members])
    close(Magnitude(p, normalize="size")(net, coupling)["stem"], torch.cat(members, 1).abs().pow(p).mean(1).pow(1 / p))
    close(Magnitude(p, reduce="mean", normalize="size")(net, coupling)["stem"], means.mean(0))
    close(Magnitude(p, reduce="max", normalize="size")(net, coupling)["stem"], means.amax(0))


@pytest.mark.parametrize("normalize", ["mean", "max"])
def test_magnitude_is_divided_by_the_mean_or_maximum_of_the_group(normalize):
    net, coupling = coupled(Residual())
    plain = Magnitude()(net, coupling)
    for name, scores in Magnitude(normalize=normalize)(net, coupling).items():
        by = {"mean": plain[name].mean(), "max": plain[name].max()}[normalize]
        close(scores, plain[name] / by)
        assert not torch.equal(scores, plain[name])


def test_zeros_stay_zeros_where_scores_are_divided_by_their_mean():
    net, coupling = coupled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias), nn.init.zeros_(net[2].weight)
    assert not Magnitude(normalize="mean")(net, coupling)["0"].any()


def test_the_filters_of_a_group_are_the_weights_that_compute_it():
    net, coupling = coupled(Residual())
    scores = Magnitude(p=1, over="filters")(net, coupling)
    close(scores["stem"], elements(net.stem.weight, net.conv2.weight).abs().sum(1))
    close(scores["conv1"], elements(net.conv1.weight).abs().sum(1))


def test_a_transposed_grouped_convolution_computes_its_groups_and_not_what_enters_them():
    net, coupling = coupled(grouped())
    scores = Magnitude(p=1, over="filters")(net, coupling)
    first, second = net[0].weight.abs().reshape(3, 2, 3), net[1].weight.abs().reshape(3, 2, 4, 9)
    close(scores["0:[3]x2"], first.sum((1, 2)) + second.sum((1, 2, 3)))
    close(scores["0:3x[2]"], first.sum((0, 2)))
    close(scores["1:3x[4]"], second.sum((0, 1, 3)))
    whole = Magnitude(p=1, reduce="mean")(net, coupling)["0:3x[2]"]
    close(whole, (first.sum((0, 2)) + net[0].bias.abs().reshape(3, 2).sum(0) + second.sum((0, 2, 3))) / 3)


@pytest.mark.parametrize(
    ("forward", "parameters", "want"),
    [
        (lambda s, x: F.linear(x, s.w.t() * s.g), {"w": (3, 8), "g": (8, 1)}, lambda s: s.w.abs().sum(0) + s.g.abs()[:, 0]),
        (lambda s, x: F.linear(x, s.w.reshape(8, 3)), {"w": (8, 3, 1)}, lambda s: s.w.abs().sum((1, 2))),
    ],
)  # fmt: skip
def test_a_filter_that_is_computed_is_followed_to_where_it_meets_the_data(forward, parameters, want):
    net, coupling = coupled(Written(forward, **parameters), torch.rand(2, 3))
    (name,) = (n for n, atom in coupling.atoms.items() if atom.size == 8)
    close(Magnitude(p=1, over="filters")(net, coupling)[name], want(net))


def test_the_inputs_of_a_transposed_convolution_are_not_its_filters_where_they_are_the_same_channels():
    def forward(s, x):
        x = F.conv2d(x, s.stem)
        return (x + F.conv_transpose2d(x, s.back)).flatten(1)

    net, coupling = coupled(Written(forward, stem=(8, 3, 1, 1), back=(8, 8, 1, 1)), torch.rand(2, 3, 1, 1))
    scores = Magnitude(p=1, over="filters")(net, coupling)
    close(scores["stem"], net.stem.abs().sum((1, 2, 3)) + net.back.abs().sum((0, 2, 3)))


def test_channels_that_never_meet_the_data_are_computed_where_weights_meet_constants():
    def forward(s, x):
        hidden = F.linear(s.table, s.a).relu()  # (3, 7)
        return x @ F.linear(hidden, s.b)

    net = Written(forward, a=(7, 2), b=(8, 7))
    net.register_buffer("table", torch.rand(3, 2))
    net, coupling = coupled(net, torch.rand(2, 3))
    assert {name: atom.size for name, atom in coupling.atoms.items()} == {"a": 7, "a.dim1": 2, "b": 8}
    scores = Magnitude(p=1, over="filters", otherwise=Magnitude())(net, coupling)
    close(scores["a"], net.a.abs().sum(1))
    close(scores["b"], net.b.abs().sum(1))
    close(scores["a.dim1"], net.a.norm(dim=0))


def test_a_filter_under_spectral_norm_computes_its_rows_and_reads_its_columns():
    layers = [spectral_norm(nn.Linear(3, 8)), nn.ReLU(), spectral_norm(nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 2)]
    net, coupling = coupled(nn.Sequential(*layers), torch.rand(2, 3))
    scores = Magnitude(p=1, over="filters")(net, coupling)
    want = [net[k].parametrizations.weight.original.abs().sum(1) for k in (0, 2)]
    assert [len(s) for s in scores.values()] == [8, 5]
    for got, values in zip(scores.values(), want, strict=True):
        close(got, values)


# -- geometric median ----------------------------------------------------------------------------------------------


def test_fpgm_adds_the_distances_of_the_filters_of_a_group():
    net, coupling = coupled(Residual())
    scores = FPGM()(net, coupling)
    close(scores["stem"], pairwise(elements(net.stem.weight)) + pairwise(elements(net.conv2.weight)))
    close(scores["conv1"], pairwise(elements(net.conv1.weight)))
    close(FPGM(over="all")(net, coupling)["stem"], sum(pairwise(elements(m)) for m in stem_members(net)))


def test_fpgm_of_heads_and_head_dims_compares_what_stands_at_the_same_place():
    net, coupling = coupled(Attention(), SEQUENCE)
    scores = FPGM()(net, coupling)
    qkv = net.qkv.weight.reshape(3, 5, 6, 30)
    close(scores["qkv:3x[5]x6"], pairwise(elements(qkv.transpose(0, 1))))
    close(scores["qkv:3x5x[6]"], pairwise(elements(qkv.movedim(2, 0))))


def test_fpgm_of_grouped_convolutions_and_of_parts_of_a_concatenation():
    net, coupling = coupled(grouped())
    second = net[1].weight.reshape(3, 2, 4, 9)
    close(FPGM()(net, coupling)["1:3x[4]"], pairwise(elements(second.movedim(2, 0))))
    net, coupling = coupled(Concatenation())
    scores = FPGM(over="all")(net, coupling)
    at = slice(5, 12)
    vectors = [net.right.bias, net.bn.weight[at], net.bn.bias[at]]
    members = [net.right.weight, net.head.weight[:, at].transpose(0, 1), *vectors]
    close(scores["right"], sum(pairwise(elements(m)) for m in members))


def test_fpgm_needs_no_more_distances_at_a_time_than_it_is_given(monkeypatch):
    points = torch.randn(11, 5, dtype=torch.float64)
    whole = fpgm.distances(points)
    monkeypatch.setattr(fpgm, "CHUNK", 30)
    close(fpgm.distances(points), whole)
    close(whole, pairwise(points))


def test_fpgm_holds_far_points_apart_that_are_near_to_each_other():
    points = torch.randn(9, 4, dtype=torch.float64) * 1e-3 + 1e6
    # the points hold their differences to 1e-7 of them; without centring the distances are off by more than their size
    torch.testing.assert_close(fpgm.distances(points), pairwise(points), rtol=1e-6, atol=0)


def test_fpgm_compares_complex_weights_too():
    net = nn.Sequential(nn.Linear(3, 8, dtype=torch.complex128), nn.Linear(8, 4, dtype=torch.complex128)).eval()
    coupling = gp.couple(gp.trace(net, torch.rand(2, 3, dtype=torch.complex128)))
    close(FPGM()(net, coupling)["0"], pairwise(net[0].weight))


def test_fpgm_lets_go_what_lies_between_the_others():
    net, coupling = coupled(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)))
    with torch.no_grad():
        net[0].weight[3] = net[0].weight[[0, 1, 2, 4]].mean(0)
    assert FPGM()(net, coupling)["0"].argmin() == 3


# -- LAMP ----------------------------------------------------------------------------------------------------------


def test_lamp_divides_by_what_is_at_least_as_large():
    assert relative(torch.tensor([4, 1, 0, 9, 2], dtype=torch.float64)).tolist() == [4 / 13, 1 / 16, 0, 1, 2 / 15]
    assert relative(torch.full((3,), 2, dtype=torch.float64)).tolist() == [1, 1 / 2, 1 / 3]
    assert relative(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize(("build", "x"), [(Residual, IMAGE), (grouped, IMAGE), (Attention, SEQUENCE), (Concatenation, IMAGE)])  # fmt: skip
def test_lamp_ranks_as_the_norm_does_and_one_channel_of_each_group_scores_one(build, x):
    net, coupling = coupled(build(), x)
    norms, scores = Magnitude()(net, coupling), LAMP()(net, coupling)
    assert norms.keys() == scores.keys() == coupling.atoms.keys()
    for name, norm in norms.items():
        assert norm.argsort().tolist() == scores[name].argsort().tolist()
        want = [float(n**2 / norm[norm >= n].square().sum()) for n in norm]
        torch.testing.assert_close(scores[name].tolist(), want)
        assert scores[name].max() == 1


# -- scales of norms -----------------------------------------------------------------------------------------------


def test_gamma_is_the_scale_of_the_norm_of_a_convolution():
    net, coupling = coupled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -2, 0, 1]))
    for reduction in ("sum", "mean", "max"):
        assert Gamma(reduction)(net, coupling)["0"].tolist() == [0.5, 2, 0, 1]


def test_scales_of_several_norms_of_a_group_are_reduced_as_stated():
    net, coupling = coupled(Residual())
    with torch.no_grad():
        net.bn2.weight.neg_()
    both = torch.stack([net.bn0.weight.abs(), net.bn2.weight.abs()])
    close(Gamma()(net, coupling)["stem"], both.sum(0))
    close(Gamma("mean")(net, coupling)["stem"], both.mean(0))
    close(Gamma("max")(net, coupling)["stem"], both.amax(0))
    close(Gamma("mean")(net, coupling)["conv1"], net.bn1.weight.abs())


def test_each_part_of_a_concatenation_has_its_part_of_the_scale():
    net, coupling = coupled(Concatenation())
    scores = Gamma()(net, coupling)
    close(torch.cat([scores["left"], scores["right"]]), net.bn.weight)
    net, coupling = coupled(DenseBlock(3))
    scores = Gamma(otherwise=lambda model, coupling: {})(net, coupling)
    close(scores["stem"], sum(layer[0].weight[:8] for layer in net.layers))
    close(scores["layers.0.2"], net.layers[1][0].weight[8:] + net.layers[2][0].weight[8:12])
    assert set(coupling.atoms) - set(scores) == {"layers.2.2"}


def test_the_groups_of_a_group_norm_hold_several_entries_of_its_scale():
    net = nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    net, coupling = coupled(net, torch.rand(1, 4, 8, 8), norms="prune")
    gamma = net[1].weight.reshape(2, 3)
    scores = Gamma("mean")(net, coupling)
    assert set(scores) == {"0:[2]x3", "0:2x[3]"}
    close(scores["0:[2]x3"], gamma.mean(1))
    close(scores["0:2x[3]"], gamma.mean(0))
    close(Gamma("sum")(net, coupling)["0:2x[3]"], gamma.sum(0))


NORMS = {
    "instance_norm": (nn.InstanceNorm2d(8, affine=True), nn.Conv2d, torch.rand(1, 3, 5, 5)),
    "layer_norm": (nn.LayerNorm(8), nn.Linear, torch.rand(2, 3)),
    "rms_norm": (nn.RMSNorm(8), nn.Linear, torch.rand(2, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_with_a_scale_counts(name):
    norm, layer, x = NORMS[name]
    extra = (1,) if layer is nn.Conv2d else ()
    net, coupling = coupled(nn.Sequential(layer(3, 8, *extra), norm, layer(8, 2, *extra)), x, norms="prune")
    assert [node.op for node in coupling.program.nodes][1] == name
    close(Gamma()(net, coupling)["0"], norm.weight)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_norm_that_is_called_as_a_function_counts_as_often_as_it_has_scales(kind):
    def forward(s, x):
        h = F.layer_norm(F.linear(x, s.w), (8,), s.scale)
        return F.layer_norm(h, (8,), s.scale) if kind == "parameter" else h

    net = Written(forward, w=(8, 3))
    scale = torch.rand(8)
    if kind == "parameter":
        net.scale = nn.Parameter(scale)
    else:
        net.register_buffer("scale", scale)
    net, coupling = coupled(net, torch.rand(2, 3), norms="prune")
    close(Gamma("sum")(net, coupling)["w"], net.scale)


def test_groups_without_a_scale_are_named_or_scored_by_another_criterion():
    other, coupling = coupled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 5, 1)))
    with pytest.raises(
        gp.CriterionError,
        match=r"no batch, .* norm has a scale over 1 of 1 group: '0'; name a criterion for them, such as otherwise=",
    ):
        Gamma()(other, coupling)
    both = nn.Sequential(other, nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1))
    both, coupling = coupled(both)
    scores = Gamma(otherwise=Magnitude(p=1))(both, coupling)
    close(scores["1"], both[2].weight)
    for name in ("0.0", "0.2"):
        close(scores[name], Magnitude(p=1)(both, coupling)[name])
    few = Gamma(otherwise=lambda model, coupling: {"0.0": torch.ones(8), "1": torch.zeros(7)})(both, coupling)
    assert set(few) == {"0.0", "1"}
    close(few["1"], both[2].weight)


def test_many_groups_without_a_scale_are_cut_off():
    net, coupling = coupled(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(12))))
    with pytest.raises(gp.CriterionError, match=r"11 of 11 groups: '0', '1', '2', '3', '4', '5', \.\.\.;"):
        Gamma()(net, coupling)


# -- all of them ---------------------------------------------------------------------------------------------------

CRITERIA: dict[str, Importance] = {
    "magnitude of filters": Magnitude(p=1, over="filters"),
    "largest norm by size": Magnitude(reduce="max", normalize="size"),
    "mean norm": Magnitude(reduce="mean", normalize="mean"),
    "geometric median": FPGM(),
    "geometric median of all": FPGM(over="all"),
    "LAMP": LAMP(),
    "gamma": Gamma("mean", otherwise=Magnitude(normalize="max")),
    "random": Random(2),
}
NETS = {
    "residual": (lambda: CifarResNet(1), torch.rand(2, 3, 32, 32)),
    "attention": (Attention, SEQUENCE),
    "concatenations": (lambda: DenseBlock(3), torch.rand(2, 3, 8, 8)),
    "transposed": (UNet, torch.rand(2, 3, 16, 16)),
    "yolo": (lambda: Yolo(4, 1), torch.rand(1, 3, 64, 64)),
    "groups": (grouped, torch.rand(2, 3, 8, 8)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_group_and_its_plan_verifies(criterion, net):
    build, x = NETS[net]
    model, importance = randomised(build()), CRITERIA[criterion]
    result = gp.prune(model, x, target=gp.Target(channels=0.5), importance=importance)
    assert result.report.verification.error <= 1e-9
    assert result.plan.removed > 0
    scores = importance(model, result.coupling)
    assert {name: len(s) for name, s in scores.items()} == result.plan.sizes
    for name, kept in result.plan.groups.items():
        gone = [i for i in range(len(scores[name])) if i not in kept]
        assert gone
        assert scores[name].dtype == torch.float64
        assert scores[name][list(kept)].min() >= scores[name][gone].max()


# -- what they refuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Magnitude(over="inputs"), r"Magnitude\(over='inputs'\): it is one of 'all', 'filters'"),
        (lambda: Magnitude(reduce="sum"), r"Magnitude\(reduce='sum'\): it is one of 'norm', 'mean', 'max'"),
        (lambda: Magnitude(normalize=2), r"Magnitude\(normalize=2\): it is one of None, 'mean', 'max', 'size'"),
        (lambda: FPGM(over=["all"]), r"FPGM\(over=\['all'\]\): it is one of 'all', 'filters'"),
        (lambda: Gamma("norm"), r"Gamma\(reduction='norm'\): it is one of 'sum', 'mean', 'max'"),
    ],
)
def test_an_option_that_is_none_of_its_words_is_refused(make, match):
    with pytest.raises(gp.InputError, match=match):
        make()


@pytest.mark.parametrize("criterion", [Magnitude, FPGM])
def test_a_group_without_filters_is_named_or_scored_by_another_criterion(criterion):
    net, coupling = coupled(Written(lambda s, x: x * s.scale, scale=(8,)), torch.rand(2, 1))
    with pytest.raises(
        gp.CriterionError,
        match=rf"{criterion.__name__}: no weight of two dims or more computes the channels of 1 of 1 group: 'scale'",
    ):
        criterion(over="filters")(net, coupling)
    other = criterion(over="filters", otherwise=Random(1))(net, coupling)
    close(other["scale"], Random(1)(net, coupling)["scale"])


READERS = [Magnitude(), Magnitude(p=1, reduce="max"), FPGM(over="all"), LAMP(), Gamma()]


@pytest.mark.parametrize("criterion", READERS, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(criterion, value):
    net, coupling = coupled(Residual())
    with torch.no_grad():
        net.bn2.weight[1] = value
    with pytest.raises(gp.InputError, match=r"bn2\.weight holds NaN or infinity"):
        criterion(net, coupling)


@pytest.mark.parametrize("criterion", READERS, ids=repr)
def test_a_weight_without_values_is_named(criterion):
    net, coupling = coupled(Residual())
    with pytest.raises(gp.InputError, match=r"\w\.weight is on the meta device .*; load weights first"):
        criterion(net.to("meta"), coupling)


def test_a_power_that_overflows_is_refused():
    net, coupling = coupled(Residual())
    with torch.no_grad():
        net.bn2.weight[1] = 1e10
    with pytest.raises(gp.InputError, match=r"bn2\.weight holds .* values too large for the 60-th power"):
        Magnitude(p=60)(net, coupling)

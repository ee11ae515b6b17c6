"""Weights that are computed from others: weight norm, spectral norm, masks, standardised and fused convolutions."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import graphprune as gp
from tests.nets import randomised

EMITTED = ["module", "graph"]


def half(model, x, emit="module", **options):
    torch.manual_seed(0)
    return gp.prune(model, x, target=gp.Target(channels=0.5), importance=gp.importance.Random(3), emit=emit, **options)


def proved(result, sizes):
    assert [(w.before, w.after) for w in result.report.groups] == sizes
    assert result.coupling.unknown == ()
    check = result.report.verification
    assert check.precision == "float64"
    assert check.error < 1e-9
    assert check.effect > 1e-3


def _net(wrap):
    return nn.Sequential(
        *(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 8, 3, groups=8)), wrap(nn.Conv2d(8, 6, 1)), nn.ReLU()),
        *(wrap(nn.ConvTranspose2d(6, 5, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(5, 4))),
    )


def _masked(layer):
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "bias", 1)


WRAPPED = {
    "weight norm": parametrizations.weight_norm,
    "weight norm over everything": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "masks": _masked,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated.*:FutureWarning")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_layers_lose_channels(kind, emit, training):
    torch.manual_seed(0)
    model, x = _net(WRAPPED[kind]), torch.rand(2, 3, 8, 8)
    model(x)  # some keep what they computed, with its graph
    before = {name: tensor.clone() for name, tensor in model.train(training).state_dict().items()}
    result = half(model, x, emit)
    proved(result, [(8, 4), (6, 3), (5, 3)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small = result.model
    assert list(small.state_dict()) == list(before)
    for name, tensor in small.state_dict().items():
        for dim, kept in result.plan.kept.get(name, {}).items():
            before[name] = before[name].index_select(dim, kept)
        assert torch.equal(tensor, before[name]), name
    if emit == "module":
        assert [(m.in_channels, m.out_channels, m.groups) for m in small if hasattr(m, "groups")] == [
            (3, 4, 1),
            (4, 4, 4),
            (4, 3, 1),
            (3, 3, 1),
        ]
        assert small[0].weight.shape == (4, 3, 3, 3)
        _trains(small, x)


def _trains(small, x):
    small.train()
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    before = small(x).detach()
    (small(x) ** 2).sum().backward()
    optimiser.step()
    assert not torch.equal(small(x), before)


def test_removing_a_parametrization_leaves_a_smaller_plain_layer():
    small = half(_net(parametrizations.weight_norm), torch.rand(2, 3, 8, 8)).model
    x = torch.rand(2, 3, 8, 8)
    want = small(x)
    for layer in (small[0], small[2], small[3], small[5], small[8]):
        parametrize.remove_parametrizations(layer, "weight")
    assert type(small[0]) is nn.Conv2d
    torch.testing.assert_close(small(x), want)


class WaveNet(nn.Module):
    """Gated dilated convolutions with weight norm, residual and skip paths."""

    def __init__(self, width=8, gated=6, skip=10, depth=3):
        super().__init__()
        wrap = parametrizations.weight_norm
        self.start = wrap(nn.Conv1d(1, width, 1))
        self.dilated = nn.ModuleList(wrap(nn.Conv1d(width, 2 * gated, 2, dilation=2**k)) for k in range(depth))
        self.back = nn.ModuleList(wrap(nn.Conv1d(gated, width, 1)) for _ in range(depth))
        self.skip = nn.ModuleList(wrap(nn.Conv1d(gated, skip, 1)) for _ in range(depth))
        self.end = wrap(nn.Conv1d(skip, 5, 1))

    def forward(self, x):
        x, total = self.start(x), 0
        for dilated, back, skip in zip(self.dilated, self.back, self.skip, strict=True):
            y = dilated(F.pad(x, (dilated.dilation[0], 0)))
            gate, value = y.chunk(2, dim=1)
            y = torch.sigmoid(gate) * torch.tanh(value)
            x, total = x + back(y), total + skip(y)
        return self.end(F.relu(total))


@pytest.mark.parametrize("emit", EMITTED)
def test_a_wavenet_with_weight_norm_keeps_its_class(emit):
    torch.manual_seed(0)
    result = half(WaveNet(), torch.rand(2, 1, 16), emit)
    proved(result, [(8, 4), (6, 3), (6, 3), (6, 3), (10, 5)])
    if emit == "module":
        assert type(result.model) is WaveNet
        _trains(result.model, torch.rand(2, 1, 16))


def test_the_direction_of_a_weight_norm_is_left_where_its_scale_is_zeroed():
    model, x = _net(parametrizations.weight_norm), torch.rand(2, 3, 8, 8)
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"0.parametrizations.weight.original0": [1, 6]})
    name = "0.parametrizations.weight.original1"
    assert plan.left[name] == 0
    again = gp.Plan.from_json(plan.to_json())
    assert again.left == plan.left
    small = gp.rewrite(model, x, coupling, again).model
    assert gp.verify(model, small, x, coupling, again).error < 1e-9
    older = json.loads(plan.to_json())
    del older["left"]
    with pytest.raises(gp.VerificationError, match="zeroed original by inf"):
        gp.verify(model, small, x, coupling, gp.Plan.from_json(json.dumps(older)))


def test_a_direction_that_something_else_reads_stays_whole():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = parametrizations.weight_norm(nn.Linear(3, 8)), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.first(x).relu()) + self.first.parametrizations.weight.original1.abs().sum()

    coupling = gp.couple(gp.trace(Read(), torch.rand(2, 3)))
    assert coupling.groups == ()
    assert "not finite where its direction is zero" in coupling.why_not("last.weight", 1)
    assert coupling.left == {}


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("map_", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_weight_loses_rows_of_its_base_alone(map_, emit):
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map=map_), nn.Linear(8, 6)
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 2))
    result = half(model, torch.rand(2, 3), emit)
    proved(result, [(8, 4), (6, 3)])
    assert [g.members[0].name for g in result.coupling.groups] == ["1.bias", "2.weight"]
    assert f"8 channels stay because {_CAUSES[map_]} in 1.param" in result.coupling.why_not("0.weight", 0)


def test_an_orthogonal_weight_without_a_base_stays_whole():
    wrapped = parametrizations.orthogonal(nn.Linear(8, 8), use_trivialization=False)
    coupling = gp.couple(gp.trace(nn.Sequential(nn.Linear(3, 8), wrapped, nn.Linear(8, 2)), torch.rand(2, 3)))
    assert (coupling.groups, coupling.unknown) == ((), ())


_CAUSES = {
    "matrix_exp": "matrix_exp makes it, at matrix_exp",
    "cayley": "linalg_solve makes it, at linalg_solve",
    "householder": "tril compares positions of it, at tril",
}


class Standardised(nn.Conv2d):
    """Standardises its weight by the training-mode batch norm of a reshaped tensor."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Spelled(nn.Conv2d):
    """The same, written out."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = (self.weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-6).sqrt()
        return F.conv2d(x, (self.weight - mean) / spread, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("kind", [Standardised, Spelled])
def test_standardised_weights_lose_rows_and_renormalise_over_columns(kind, emit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), kind(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    proved(half(model, torch.rand(2, 3, 8, 8), emit), [(6, 3)])
    result = half(model, torch.rand(2, 3, 8, 8), emit, norms="prune")
    proved(result, [(8, 4), (6, 3)])
    assert [g.exactness for g in result.coupling.groups] == ["renormalised", "exact"]


@pytest.mark.parametrize("emit", EMITTED)
def test_a_fused_convolution_is_a_plain_one(emit):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3), randomised(nn.BatchNorm2d(8))
    fused = fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    proved(half(nn.Sequential(fused, nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.rand(2, 3, 8, 8), emit), [(8, 4)])


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0"])
@pytest.mark.parametrize("emit", EMITTED)
def test_a_recurrent_layer_with_a_wrapped_weight_loses_units(wrap, name, emit):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.rnn, self.head = nn.Linear(3, 6), wrap(nn.LSTM(6, 8), name), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.rnn(self.enter(x))[0])

    torch.manual_seed(0)
    result = half(Tagger(), torch.rand(5, 2, 3), emit)
    proved(result, [(6, 3), (8, 4)])

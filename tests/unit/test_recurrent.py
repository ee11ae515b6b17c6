"""Recurrent layers and cells lose hidden units, exactly, and stay whole objects of their class."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.rules import RULES, find, recurrent
from tests.rules.cases import RECURRENT
from tests.rules.commute import CaughtWrong, check

EMITTED = ["module", "graph"]


class Tagger(nn.Module):
    """A linear layer, something recurrent, a linear layer."""

    def __init__(self, rnn, width, wrap=lambda rnn, x: rnn(x)[0]):
        super().__init__()
        self.enter, self.rnn, self.head, self.wrap = nn.Linear(3, 6), rnn, nn.Linear(width, 5), wrap

    def forward(self, x):
        return self.head(self.wrap(self.rnn, self.enter(x)))


def carried_out(model, inputs, keep, emit="module", **options):
    """The model with `keep` carried out, after the proof."""
    model = model.eval()
    coupling = gp.couple(gp.trace(model, inputs), **options)
    assert coupling.unknown == ()
    plan = gp.Plan.of(coupling, keep)
    small = gp.rewrite(model, inputs, coupling, plan, emit=emit).model
    found = gp.verify(model, small, inputs, coupling, plan)
    assert found.precision == "float64"
    assert found.error < 1e-9
    assert found.effect > 1e-4
    return small, plan


def groups(model, inputs):
    return {g.name: g.size for g in gp.couple(gp.trace(model.eval(), inputs)).groups}


LAYERS = {
    "lstm": (lambda: nn.LSTM(6, 8), 8, "rnn.weight_ih_l0:4x[8]"),
    "lstm of two layers both ways": (lambda: nn.LSTM(6, 8, 2, bidirectional=True), 16, "rnn.weight_ih_l0:4x[8]"),
    "lstm without biases": (lambda: nn.LSTM(6, 8, 2, bias=False, batch_first=True), 8, "rnn.weight_ih_l0:4x[8]"),
    "projected lstm": (lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=2), 4, "rnn.weight_ih_l0:4x[8]"),
    "gru": (lambda: nn.GRU(6, 8), 8, "rnn.weight_ih_l0:3x[8]"),
    "gru of three layers both ways": (
        lambda: nn.GRU(6, 8, 3, bidirectional=True, batch_first=True),
        16,
        "rnn.weight_ih_l0:3x[8]",
    ),
    "tanh": (lambda: nn.RNN(6, 8, 2, bidirectional=True, bias=False), 16, "rnn.weight_ih_l0"),
    "relu": (lambda: nn.RNN(6, 8, nonlinearity="relu"), 8, "rnn.weight_ih_l0"),
}


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_loses_the_units_named_and_its_input(kind, emit):
    torch.manual_seed(0)
    make, width, group = LAYERS[kind]
    small, plan = carried_out(Tagger(make(), width), torch.rand(4, 2, 3), {"enter": [1, 4, 5], group: [0, 3, 7]}, emit)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    gates = 3 * {"lstm": 4, "gru": 3}.get(kind.replace("projected ", "").partition(" ")[0], 1)
    assert shapes["rnn.weight_ih_l0"] == (gates, 3)
    assert plan.kept["rnn.weight_ih_l0"][0].tolist() == [8 * k + i for k in range(gates // 3) for i in (0, 3, 7)]


class Named(Tagger):
    """Its argument is called what Python calls a function."""

    def forward(self, input):
        return super().forward(input)


def test_an_argument_may_be_called_input():
    torch.manual_seed(0)
    keep = {"enter": [1, 4, 5], "rnn.weight_ih_l0:4x[8]": [0, 3, 7]}
    small, _ = carried_out(Named(nn.LSTM(6, 8, batch_first=True), 8), torch.rand(2, 4, 3), keep, "graph")
    assert small(torch.rand(7, 4, 3)).shape == (7, 4, 5)


def test_a_projection_is_a_group_of_its_own():
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(6, 8, 2, proj_size=4, bidirectional=True), 8)
    keep = {"rnn.weight_hr_l0": [0, 3], "rnn.weight_ih_l0:4x[8]": [1, 2, 4, 6, 7]}
    for emit in EMITTED:
        small, _ = carried_out(model, torch.rand(4, 2, 3), keep, emit)
        assert dict(small.named_parameters())["rnn.weight_hr_l1_reverse"].shape == (2, 5)
    assert repr(carried_out(model, torch.rand(4, 2, 3), keep)[0].rnn) == (
        "LSTM(6, 5, proj_size=2, num_layers=2, bidirectional=True)"
    )


def test_a_projection_and_its_units_must_not_get_one_width():
    model, x = Tagger(nn.LSTM(6, 8, proj_size=4), 4).eval(), torch.rand(4, 2, 3)
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"rnn.weight_ih_l0:4x[8]": [0, 1, 2, 3]})
    for emit in ("auto", *EMITTED):
        with pytest.raises(
            gp.RewriteError, match=r"(?s)by their sizes, at lstm in rnn.*both the width 4; keep more or"
        ):
            gp.rewrite(model, x, coupling, plan, emit=emit)


def test_a_pruned_layer_is_one_of_its_class_in_every_way():
    torch.manual_seed(0)
    model, x = Tagger(nn.LSTM(6, 8, 2, dropout=0.5, bidirectional=True), 16), torch.rand(4, 2, 3)
    model.train()
    coupling = gp.couple(gp.trace(model, x))
    plan = gp.Plan.of(coupling, {"rnn.weight_ih_l0:4x[8]": [0, 3, 7], "enter": [0, 1]})
    small = gp.rewrite(model, x, coupling, plan, emit="module").model
    assert small.rnn.training
    assert repr(small.rnn) == "LSTM(2, 3, num_layers=2, dropout=0.5, bidirectional=True)"
    for rnn in (model.rnn, small.rnn):
        assert all(a is getattr(rnn, n) for a, n in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True))
    again = Tagger(nn.LSTM(2, 3, 2, dropout=0.5, bidirectional=True), 6)
    again.enter = nn.Linear(3, 2)
    again.load_state_dict(small.state_dict(), strict=True)
    small.eval(), again.eval()
    small.wrap = again.wrap = _first
    twins = [copy.deepcopy(small), pickle.loads(pickle.dumps(small)), again]
    assert all(torch.equal(twin(x), small(x)) for twin in twins)
    _trains(small, x)
    assert not any(torch.equal(twin(x), small(x)) for twin in twins)


def _first(rnn, x):
    return rnn(x)[0]


def _trains(small, x):
    """One step of training moves every weight, and what the layer computes follows."""
    small.train()
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    (small(x) ** 2).sum().backward()
    optimiser.step()
    assert [n for n, p in small.named_parameters() if torch.equal(p, before[n])] == []
    small.eval()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_graph_module_drops_out_between_layers_in_training_only(kind):
    torch.manual_seed(0)
    model = Tagger(getattr(nn, kind)(6, 8, 2, dropout=0.5), 8)
    group = next(name for name in groups(model, torch.rand(4, 2, 3)) if name.startswith("rnn"))
    small, _ = carried_out(model, torch.rand(4, 2, 3), {group: [0, 1, 2]}, "graph")
    x = torch.rand(4, 2, 3)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))


CELLS = {
    "lstm": (lambda: nn.LSTMCell(6, 8), "rnn.weight_ih:4x[8]"),
    "gru": (lambda: nn.GRUCell(6, 8, bias=False), "rnn.weight_ih:3x[8]"),
    "tanh": (lambda: nn.RNNCell(6, 8), "rnn.weight_ih"),
    "relu": (lambda: nn.RNNCell(6, 8, nonlinearity="relu"), "rnn.weight_ih"),
}


def _unrolled(cell, x):
    state, states = None, []
    for step in x.unbind(0):
        state = cell(step, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(states)


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_in_a_loop_loses_units(kind, emit):
    torch.manual_seed(0)
    make, group = CELLS[kind]
    model, x = Tagger(make(), 8, _unrolled), torch.rand(4, 2, 3)
    small, _ = carried_out(model, x, {"enter": [1, 4], group: [2, 5, 7]}, emit)
    if emit == "module":
        assert (small.rnn.input_size, small.rnn.hidden_size) == (2, 3)
        _trains(small, x)


@pytest.mark.parametrize("emit", EMITTED)
def test_input_and_hidden_size_of_one_value_are_told_apart(emit):
    torch.manual_seed(0)
    model = Tagger(nn.GRU(6, 6, 6), 6)
    small, _ = carried_out(model, torch.rand(6, 6, 3), {"rnn.weight_ih_l0:3x[6]": [0, 5]}, emit)
    if emit == "module":
        assert (small.rnn.input_size, small.rnn.hidden_size, small.rnn.num_layers) == (6, 2, 6)


def test_the_final_state_and_the_output_are_one_width():
    def last(rnn, x):
        y, (h, c) = rnn(x)
        return y[-1] + h[-1] + c[0]

    model = Tagger(nn.LSTM(6, 8, 2), 8, last)
    assert groups(model, torch.rand(4, 2, 3)) == {"enter": 6, "rnn.weight_ih_l0:4x[8]": 8}
    carried_out(model, torch.rand(4, 2, 3), {"rnn.weight_ih_l0:4x[8]": [1, 6]})


class Translator(nn.Module):
    """An encoder hands its state to a decoder."""

    def __init__(self, kind):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 6), nn.Embedding(13, 7)
        self.encoder, self.decoder = kind(6, 8, 2), kind(7, 8, 2)
        self.head = nn.Linear(8, 13)

    def forward(self, source, target):
        _, state = self.encoder(self.source(source))
        return self.head(self.decoder(self.target(target), state)[0])


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_an_encoder_ties_the_decoder_it_hands_its_state_to(kind, gates, emit):
    torch.manual_seed(0)
    inputs = torch.randint(0, 11, (5, 2)), torch.randint(0, 13, (4, 2))
    name = "encoder.weight_ih_l0" + (f":{gates}x[8]" if gates > 1 else "")
    assert groups(Translator(kind), inputs) == {"source.dim1": 6, "target.dim1": 7, name: 8}
    small, _ = carried_out(Translator(kind), inputs, {name: [0, 2, 5], "source.dim1": [3, 4], "target.dim1": [0]}, emit)
    if emit == "module":
        assert (small.encoder.hidden_size, small.decoder.hidden_size) == (3, 3)


class Reader(nn.Module):
    """Convolutions whose columns are the steps of a recurrent layer, as in a CRNN."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.rnn, self.head = nn.GRU(6 * 4, 8, bidirectional=True, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.max_pool2d(self.bn(self.conv(x)).relu(), 2)
        return self.head(self.rnn(y.flatten(1, 2).transpose(1, 2))[0]).log_softmax(-1)


@pytest.mark.parametrize("emit", EMITTED)
def test_a_flattened_image_enters_a_recurrent_layer(emit):
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 10)
    small, _ = carried_out(Reader(), x, {"conv": [0, 2, 5], "rnn.weight_ih_l0:3x[8]": [1, 2, 6]}, emit)
    if emit == "module":
        assert repr(small.rnn) == "GRU(12, 3, batch_first=True, bidirectional=True)"


@pytest.mark.parametrize("emit", EMITTED)
def test_a_residual_around_a_layer_ties_its_input(emit):
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(6, 6), 6, lambda rnn, x: x + rnn(x)[0])
    assert groups(model, torch.rand(4, 2, 3)) == {"enter": 6}
    small, _ = carried_out(model, torch.rand(4, 2, 3), {"enter": [1, 4]}, emit)
    if emit == "module":
        assert (small.rnn.input_size, small.rnn.hidden_size) == (2, 2)


class Started(nn.Module):
    """Starts from a state of its own."""

    def __init__(self, start, after=lambda s, y: s.head(y), rnn=nn.LSTM):
        super().__init__()
        self.hidden, self.start, self.after = 8, start, after
        self.enter, self.rnn, self.head = nn.Linear(3, 6), rnn(6, 8), nn.Linear(8, 5)
        self.first, self.state = nn.Linear(3, 8), nn.Parameter(torch.rand(1, 1, 8))

    def forward(self, x):
        h = self.start(self, x)
        return self.after(self, self.rnn(self.enter(x), (h, h) if isinstance(self.rnn, nn.LSTM) else h)[0])


STARTS = {
    "zeros of an attribute's size": lambda s, x: torch.zeros(1, x.shape[1], s.hidden, dtype=x.dtype),
    "a parameter": lambda s, x: s.state.expand(-1, x.shape[1], -1).contiguous(),
    "a layer": lambda s, x: s.first(x[:1]),
    "not zero": lambda s, x: s.first(x[:1]).sigmoid(),
}


@pytest.mark.parametrize("emit", EMITTED)
@pytest.mark.parametrize("start", STARTS)
def test_the_initial_state_may_come_from_anywhere(start, emit):
    torch.manual_seed(0)
    model = Started(STARTS[start])
    if start == "zeros of an attribute's size" and emit == "module":
        _solved(model)
        return
    group = next(name for name, size in groups(model, torch.rand(4, 2, 3)).items() if size == 8)
    carried_out(model, torch.rand(4, 2, 3), {group: [1, 2, 6]}, emit)


def _solved(model):
    result = gp.prune(model, torch.rand(4, 2, 3), target=gp.Target(channels=0.5), emit="module")
    assert (result.model.hidden, result.model.rnn.hidden_size) == (4, 4)
    assert result.report.verification.error < 1e-9


def _sum(s, y):
    return y.sum(-1)


@pytest.mark.parametrize(
    ("rnn", "start", "free"),
    [
        (nn.LSTM, "a layer", True),
        (nn.LSTM, "not zero", False),
        (nn.GRU, "a parameter", True),
        (nn.GRU, "not zero", False),
        (nn.RNN, "not zero", True),
    ],
)
def test_a_sum_over_units_needs_them_to_start_and_stay_at_zero(rnn, start, free):
    """A unit without weights halves its state at each step in an LSTM and a GRU; the plain layer forgets it."""
    torch.manual_seed(0)
    model, x = Started(STARTS[start], _sum, rnn), torch.rand(4, 2, 3)
    found = [name for name, size in groups(model, x).items() if size == 8]
    assert bool(found) == free
    if free:
        carried_out(model, x, {found[0]: [0, 4, 5]})


@pytest.mark.parametrize("wrong", ["_CARRIED", "_GATES"])
def test_a_rule_that_is_wrong_about_states_or_gates_is_caught(wrong, monkeypatch):
    planted = {"_CARRIED": {}, "_GATES": {"lstm": 2, "gru": 3}}[wrong]
    monkeypatch.setattr(recurrent, wrong, planted)
    case = next(case for case in RECURRENT if case.label.startswith("lstm.input"))
    with pytest.raises((CaughtWrong, ValueError)):
        check(find(RULES, case.name), case.op, case.args, case.kwargs)


def test_multiply_adds_count_steps_gates_and_projections():
    model, x = nn.LSTM(3, 7, 2, bidirectional=True, proj_size=5), torch.rand(4, 2, 3)
    coupling = gp.couple(gp.trace(model, x))
    each = [4 * 7 * 3 + 4 * 7 * 5 + 7 * 5, 4 * 7 * 10 + 4 * 7 * 5 + 7 * 5]
    assert gp.cost.macs(coupling).at({}) == 4 * 2 * 2 * sum(each)


def test_packed_sequences_are_refused_in_words():
    def packed(rnn, x):
        y = rnn(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3])))[0]
        return nn.utils.rnn.pad_packed_sequence(y)[0]

    with pytest.raises(gp.TraceError, match=r"(?s)Tagger runs, but cannot be traced.*stopped at .*test_recurrent.py"):
        gp.trace(Tagger(nn.LSTM(6, 8), 8, packed), torch.rand(4, 2, 3))

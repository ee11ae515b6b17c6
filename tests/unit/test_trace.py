"""The front end: what a program records, and that the model is left alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from tests.nets import CifarResNet


def snapshot(model):
    """Everything a user could notice: tensors and their values, flags, attributes, random state."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ids = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    flags = {n: (m.training, sorted(vars(m))) for n, m in model.named_modules()}
    return state, ids, flags, torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()


def same(before, after):
    assert before[1:3] == after[1:3]
    assert before[4] == after[4]
    assert torch.equal(before[3], after[3])
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())


class Stateful(nn.Module):
    """Keeps what it saw, draws random numbers, and has parts in train mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Conv2d(6, 2, 1)
        self.last = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.body(x)
        self.last = y
        return self.head(y + torch.rand(()))


def test_tracing_and_pruning_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = Stateful().train()
    model.body[1].eval()
    example = torch.rand(2, 3, 8, 8)
    before = snapshot(model)
    gp.couple(gp.trace(model, example))
    same(before, snapshot(model))
    assert gp.prune(model, example, target=gp.Target(channels=0.5)).model.body[1].training is False
    same(before, snapshot(model))
    assert (model.last, model.calls) == (None, 0)


class Caching(nn.Module):
    """Fills dicts, lists and sets while it runs, as attention layers do with their position biases."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.bias = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))
        self.cache, self.seen, self.kinds = {"kept": torch.ones(1)}, [], set()

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        self.seen.append(x)
        self.kinds.add(x.dim())
        return self.last(self.first(x).relu() + self.cache["bias"])


def test_what_a_forward_caches_does_not_leak_out_of_a_trace():
    torch.manual_seed(0)
    model = Caching().eval()
    result = gp.prune(model, torch.rand(2, 3), target=gp.Target(channels=0.5))
    assert (list(model.cache), model.seen, model.kinds) == (["kept"], [], set())
    assert result.report.verification.error < 1e-9
    assert type(model(torch.rand(2, 3))) is torch.Tensor


def test_nodes_carry_their_module_and_the_line_of_the_user():
    program = gp.trace(CifarResNet(1).eval(), torch.rand(1, 3, 32, 32))
    (add,) = [n for n in program.nodes if n.op == "add" and n.module == "layer2.0"]
    assert add.source.startswith("nets.py:")
    assert add.code == "return F.relu(y + x)"
    assert str(add) == f"add in layer2.0 ({add.source})"
    assert str(program) == f"Program of CifarResNet: {len(program.nodes)} nodes, 23 parameters"


def test_nothing_is_copied():
    model = nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 2000))
    program = gp.trace(model, torch.rand(1, 2000), front_end="export")
    held = {t.data_ptr() for t in program.source.state_dict.values()}
    assert held == {p.data_ptr() for p in model.parameters()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(F.relu(self.inner(self.embed(tokens))) + self.embed(tokens))


def test_tied_parameters_are_one_value_under_all_their_names():
    program = gp.trace(Tied(), torch.arange(6).reshape(2, 3))
    assert [v.target for v in program.parameters] == ["embed.weight", "inner.weight", "inner.bias"]
    assert dict(program.aliases) == {"head.weight": "embed.weight"}
    coupling = gp.couple(program)
    assert coupling.slot("head.weight") is coupling.slot("embed.weight")


class Scaled(nn.Module):
    """A persistent and a hidden buffer, a plain tensor attribute and a constant made in forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("shown", torch.rand(6))
        self.register_buffer("hidden", torch.rand(6), persistent=False)
        self.plain = torch.rand(6)

    def forward(self, x):
        h = self.first(x) * self.shown * self.hidden + self.plain
        return self.last(h * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))


@pytest.mark.parametrize("emit", ["auto", "graph"])
def test_buffers_and_constants_are_sliced_with_their_channels(emit):
    torch.manual_seed(0)
    model = Scaled().eval()
    result = gp.prune(model, torch.rand(4, 3), target=gp.Target(channels=0.5), emit=emit)
    kept = result.plan.kept
    assert {"shown", "hidden", "plain"} <= set(kept)
    assert result.report.verification.effect > 0
    assert result.report.verification.error < 1e-9
    assert dict(result.model.named_buffers())["shown"].shape == (3,)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x).relu()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            x = self.mid(x)
        x = torch.utils.checkpoint.checkpoint(lambda h: h.relu(), x, use_reentrant=False)
        return self.last(x)


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_nested_graphs_are_followed(emit):
    torch.manual_seed(0)
    result = gp.prune(Wrapped().eval(), torch.rand(4, 3), target=gp.Target(channels=0.5), emit=emit, on_unknown="error")
    assert [(w.name, w.after) for w in result.report.groups] == [("first", 3), ("mid", 4)]
    assert result.report.verification.error < 1e-6


# -- inputs and outputs --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Various(nn.Module):
    """One network for every way of passing tensors in and out."""

    def __init__(self, give):
        super().__init__()
        self.a, self.b, self.last, self.give = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2), give

    def forward(self, *args, **kwargs):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        left = next(t for t in tensors if t.shape[-1] == 3)
        right = next(t for t in tensors if t.shape[-1] == 4)
        h = F.relu(self.a(left) + self.b(right))
        return self.give(self.last(h), h.sum(-1))


X, Y = torch.rand(2, 3), torch.rand(2, 4)
TAKEN = {
    "two arguments": (X, Y),
    "keyword arguments": {"left": X, "right": Y},
    "both": gp.Inputs((X,), {"right": Y}),
    "a dict inside": ({"left": X, "right": Y},),
    "a tuple inside": ((X, Y), None),
    "a dataclass": (Pair(X, Y),),
    "ints beside them": (X, 7, Y, True),
}
GIVEN = {
    "a tensor": lambda y, s: y,
    "a tuple": lambda y, s: (y, s),
    "a dict": lambda y, s: {"y": y, "deep": [s, {"again": y}]},
    "a dataclass": lambda y, s: Pair(y, s),
    "none beside it": lambda y, s: (y, None, 3),
}


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("taken", TAKEN)
def test_inputs_of_every_shape(taken, emit):
    torch.manual_seed(0)
    result = gp.prune(Various(GIVEN["a tuple"]).eval(), TAKEN[taken], target=gp.Target(channels=0.5), emit=emit)
    assert [(w.name, w.after) for w in result.report.groups] == [("a", 3)]
    assert result.report.verification.error < 1e-9


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("given", GIVEN)
def test_outputs_of_every_shape(given, emit):
    torch.manual_seed(0)
    model = Various(GIVEN[given]).eval()
    result = gp.prune(model, (X, Y), target=gp.Target(channels=0.5), emit=emit)
    want, got = model(X, Y), result.model(X, Y)
    assert type(got) is type(want)
    assert result.report.verification.error < 1e-9


def test_int_inputs_are_followed_through_embeddings():
    result = gp.prune(Tied().eval(), torch.arange(6).reshape(2, 3), target=gp.Target(channels=0.5))
    assert [(w.name, w.after) for w in result.report.groups] == [("inner", 3)]
    assert result.model.head.weight is result.model.embed.weight
    assert result.model.embed.embedding_dim == 3


# -- what cannot be traced -----------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        if h.sum() > 0:
            h = h * 2
        return self.last(h)


def test_a_branch_on_data_is_one_error_naming_the_line():
    model, example = Branching(), torch.rand(2, 3)
    before = snapshot(model)
    with pytest.raises(gp.TraceError, match=r"(?s)Branching runs, but cannot be traced.*if h.sum\(\) > 0.*torch.where"):
        gp.trace(model, example)
    same(before, snapshot(model))


@pytest.mark.parametrize(
    "inputs", [torch.rand(2, 5), (torch.rand(2, 3), torch.rand(2, 3)), {"y": torch.rand(2, 3)}, ()]
)
def test_wrong_example_inputs_are_named_with_their_shapes(inputs):
    with pytest.raises(gp.InputError, match=r"(?s)Branching itself fails on these example inputs.*pass inputs that"):
        gp.trace(Branching(), inputs)


def test_inputs_on_another_device_are_refused_with_the_cure():
    with pytest.raises(gp.InputError, match=r"inputs are on meta but the model is on cpu; move them with .to\('cpu'\)"):
        gp.trace(Branching(), torch.rand(2, 3, device="meta"))


def test_a_model_on_the_meta_device_couples_but_cannot_be_ranked():
    model = copy.deepcopy(CifarResNet(1)).to("meta")
    example = torch.rand(1, 3, 32, 32, device="meta")
    assert len(gp.couple(gp.trace(model, example)).groups) == 8
    with pytest.raises(gp.InputError, match="on the meta device and has no values to rank; load weights first"):
        gp.prune(model, example, target=gp.Target(channels=0.5))


def test_a_lazy_module_must_be_run_first():
    with pytest.raises(gp.InputError, match="run the model once on real inputs"):
        gp.trace(nn.Sequential(nn.LazyLinear(5)), torch.rand(2, 3))


def test_what_is_not_a_module_is_refused():
    with pytest.raises(gp.InputError, match=r"model is a function, not a torch\.nn\.Module"):
        gp.trace(lambda x: x, torch.rand(2, 3))


def test_a_script_module_is_refused_with_the_cure():
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        script = torch.jit.trace(nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(gp.InputError, match="pass the module it was scripted from"):
        gp.trace(script, torch.rand(2, 3))


def test_the_program_and_the_report_say_why_a_model_was_exported():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.a(x))

    net, x = Branching().eval(), torch.rand(2, 3)
    assert "autocast" in gp.trace(net, x).unrecorded
    assert gp.trace(net, x, front_end="export").unrecorded == ""
    report = gp.prune(net, x, target=gp.Target(channels=0.5)).report
    assert "exported because of TraceError: autocast" in str(report)
    plain = gp.prune(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5)), x, target=gp.Target(channels=0.5)).report
    assert "traced    recorded" in str(plain)

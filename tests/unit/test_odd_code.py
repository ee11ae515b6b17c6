"""Code that goes its own way: copies that are none, custom ops, randomness, modules that are hard to graft."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.reference import run_zeroed
from graphprune.rewrite.graft import source_of
from graphprune.trace import run
from graphprune.verify import difference
from tests.nets import randomised
from tests.unit.test_bad_input import EMITS, Net, X, half, pair
from tests.unit.test_trace import same, snapshot

# -- copies --------------------------------------------------------------------------------------------------------


class Itself(Net):
    def __deepcopy__(self, memo):
        return self


class Anew(Net):
    def __deepcopy__(self, memo):
        made = Anew().to(self.first.weight.dtype)
        made.load_state_dict(self.state_dict())
        return made


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Referring(Net):
    def __init__(self):
        super().__init__(lambda s, x: s.last(s.reference()(x).relu()))
        self.reference = weakref.ref(self.first)


class Frozen(Net):
    def __setattr__(self, name, value):
        if "last" in self.__dict__.get("_modules", {}):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


def closed_over():
    model = pair()
    model[2].register_forward_hook(lambda module, args, out: out + model[0].bias.sum())
    return model


def replaced():
    model = Net()
    model.forward = lambda x: model.last(model.first(x).tanh())
    return model


COPIES = {
    "gives itself": (Itself, "Itself cannot be copied: __deepcopy__ gives the model itself, not a copy"),
    "a part gives itself": (
        lambda: nn.Sequential(Itself(), nn.Linear(4, 2)),
        "__deepcopy__ gives 0 itself, not a copy",
    ),
    "made anew": (Anew, "its output is off by"),
    "a lock": (Locked, "Locked cannot be copied: TypeError: cannot pickle"),
    "a weak reference": (Referring, "the copy still runs first of the original"),
    "a hook that reads the original": (closed_over, "the copy still reads 0.bias of the original"),
    "a forward that runs the original": (replaced, "the copy still runs first of the original"),
}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_none_becomes_a_graph_module(name, double):
    build, why = COPIES[name]
    torch.manual_seed(0)
    model = build().eval()
    x, model = (X.double(), model.double()) if double else (X, model)
    before = snapshot(model)
    result = half(model, x)
    assert result.report.emitter == "graph"
    assert why in result.report.reason
    assert result.report.verification.error < (1e-9 if double else 1e-6)
    assert result.report.verification.effect > 1e-3
    with pytest.raises(gp.RewriteError, match=why):
        half(model, x, emit="module")
    same(before, snapshot(model))
    assert {p.dtype for p in model.parameters()} == {x.dtype}


def test_a_class_that_lets_no_attribute_be_set_keeps_its_class():
    result = gp.prune(Frozen(), X, target=gp.Target(channels=0.5))
    assert (result.report.emitter, type(result.model), result.model.first.out_features) == ("module", Frozen, 4)


# -- randomness ----------------------------------------------------------------------------------------------------


def attending(s, x):
    q = s.first(x).reshape(2, 2, 2, 4).transpose(1, 2)
    return s.last(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, scale=0.5).transpose(1, 2).reshape(4, 8))


def test_dropout_that_is_left_on_pins_what_it_draws_for():
    coupling = gp.couple(gp.trace(Net(lambda s, x: s.last(F.dropout(s.first(x)))), X))
    assert coupling.groups == ()
    assert "dropout draws for every position of it" in coupling.why_not("first.weight", 0)
    sizes = {g.size for g in gp.couple(gp.trace(Net(attending), X)).groups}
    assert sizes == {4}  # the head dim; heads have weights of their own to draw for
    assert half(Net(attending), emit="graph").report.verification.error < 1e-9


@pytest.mark.parametrize("emit", ["auto", "module", "graph"])
def test_an_original_that_does_not_repeat_itself_is_no_reference(emit):
    generator = torch.Generator().manual_seed(0)
    model = Net(lambda s, x: s.last(s.first(x).relu()) + torch.rand(4, generator=generator))
    with pytest.raises(gp.VerificationError, match="itself gives another output on the same inputs from run to run"):
        half(model, emit=emit)


# -- custom ops ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("odd_code::mixed", mutates_args=())
def mixed(x: torch.Tensor, w: torch.Tensor, by: int) -> torch.Tensor:
    return (x @ w.t()) * by


@mixed.register_fake
def _(x, w, by):
    return x.new_empty(*x.shape[:-1], w.shape[0])


@torch.library.custom_op("odd_code::centre", mutates_args={"x"})
def centre(x: torch.Tensor) -> None:
    x.sub_(x.mean(-1, keepdim=True))


@torch.library.custom_op("odd_code::centre_and_tell", mutates_args={"x"})
def centre_and_tell(x: torch.Tensor) -> torch.Tensor:
    x.sub_(x.mean(-1, keepdim=True))
    return x.sum(0)


@centre_and_tell.register_fake
def _(x):
    return x.new_empty(x.shape[1:])


@torch.library.custom_op("odd_code::shapeless", mutates_args=())
def shapeless(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def centred(s, x):
    h = s.first(x)
    centre(h)
    return s.last(h)


def centred_and_told(s, x):
    h = s.first(x)
    told = centre_and_tell(h)
    return s.last(h) + told.sum()


def centred_each(s, x):
    h = s.first(x)
    torch._foreach_sub_([h], [h.mean(-1, keepdim=True).expand_as(h)])
    return s.last(h)


WRITING = {"odd_code.centre": centred, "odd_code.centre_and_tell": centred_and_told, "_foreach_sub_": centred_each}


@pytest.mark.parametrize("front_end", ["record", "export"])
@pytest.mark.parametrize("op", WRITING)
def test_an_op_that_only_writes_pins_what_it_writes_to(op, front_end):
    program = gp.trace(Net(WRITING[op]), X, front_end=front_end)
    coupling = gp.couple(program)
    assert coupling.groups == ()
    assert [u.op for u in coupling.unknown] == [op]
    with pytest.raises(gp.UnsupportedOp, match=rf"no rule for {op} \(1 node\)"):
        gp.couple(program, on_unknown="error")


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("front_end", ["record", "export"])
def test_a_rule_of_the_user_prunes_a_custom_op(front_end, emit):
    model = Net(lambda s, x: s.last(mixed(x, s.first.weight, 3))).eval()
    rules = gp.RULES | gp.op("odd_code.mixed", "*b i, o i -> *b o", zero="a*b")
    coupling = gp.couple(gp.trace(model, X, front_end=front_end), rules=rules, on_unknown="error")
    plan = gp.Plan.of(coupling, {"first": [0, 2, 5]})
    small = gp.rewrite(model, X, coupling, plan, emit=emit).model
    found = gp.verify(model, small, X, coupling, plan)
    assert found.error < 1e-9 < found.effect


def test_rules_of_the_user_go_through_pruning_in_one_call_in_steps_and_while_training(tmp_path):
    model = Net(lambda s, x: s.last(mixed(x, s.first.weight, 3))).eval()
    rules = gp.RULES | gp.op("odd_code.mixed", "*b i, o i -> *b o", zero="a*b")
    given = {"target": gp.Target(channels=0.5), "rules": rules, "on_unknown": "error"}
    once = gp.prune(model, X, **given)
    stepwise = gp.prune_iteratively(model, X, steps=2, directory=tmp_path, **given)
    for result in (once, stepwise):
        assert result.model.last.in_features == result.model.first.out_features == model.first.out_features // 2
        assert result.report.verification.error < 1e-9
    assert [group.name for group in gp.training.GroupFisher(model, X, **given).coupling.groups] == ["first"]
    with pytest.raises(gp.InputError, match=r"another run.*rules"):
        gp.prune_iteratively(model, X, steps=2, directory=tmp_path, **given | {"rules": gp.RULES})


def test_an_op_without_a_shape_is_to_be_given_one():
    with pytest.raises(gp.TraceError, match=r"give the op a fake implementation .* @torch.library.register_fake"):
        half(Net(lambda s, x: s.last(shapeless(s.first(x)))))


# -- grafts --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """States in its code that what leaves is as wide as what came in."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)

    @staticmethod
    def split(x):
        return x.reshape(x.shape[0], x.shape[1], 3, -1).transpose(1, 2)

    def forward(self, query, memory=None, gain=1.5):
        b, n, c = query.shape
        k, v = self.kv(query if memory is None else memory).chunk(2, dim=-1)
        weights = (self.split(self.q(query)) @ self.split(k).transpose(-1, -2) * 0.3).softmax(-1)
        return self.out((weights @ self.split(v)).transpose(1, 2).reshape(b, n, c)) * gain


class Heir(Attention):
    def forward(self, query, memory=None):
        return super().forward(query, memory, gain=2.0) + 1


class Childless(Attention):
    def __init_subclass__(cls, **options):
        raise TypeError("no heirs")


class OwnState(Attention):
    def __getstate__(self):
        return {**vars(self), "stamp": 7}

    def __setstate__(self, state):
        self.stamp = state.pop("stamp")
        super().__setstate__(state)


class Around(nn.Module):
    def __init__(self, kind, how):
        super().__init__()
        self.how, self.stem, self.attention, self.last = how, nn.Linear(24, 24), kind(), nn.Linear(24, 5)

    def forward(self, x, y=None):
        x = self.stem(x)
        y = x if y is None else self.stem(y)
        return self.last(HOW[self.how](self.attention, x, y))


def in_a_loop(a, x, y):
    for _ in range(3):
        x = x + a(x)
    return x


def without_gradients(a, x, y):
    with torch.no_grad():
        return a(x)


HOW = {
    "once": lambda a, x, y: a(x),
    "twice": lambda a, x, y: a(x) + a(x[:, :4]).mean(1, keepdim=True),
    "by keyword": lambda a, x, y: a(query=x, memory=x * 2),
    "memory": lambda a, x, y: a(x, y),
    "in a loop": in_a_loop,
    "without gradients": without_gradients,
}
SEQUENCE = torch.randn(2, 9, 24)


def grafted(kind, how):
    model = randomised(Around(kind, how))
    return model, gp.prune(model, SEQUENCE, target=gp.Target(channels=0.5), importance=gp.importance.Random(1))


@pytest.mark.parametrize(("kind", "how"), [*((Attention, how) for how in HOW), (Heir, "once"), (OwnState, "once")])
def test_a_module_is_grafted_however_it_is_called(kind, how):
    model, result = grafted(kind, how)
    assert result.report.grafts == ("attention",)
    for shape in ((1, 9, 24), (3, 4, 24)):
        inputs = gp.Inputs((torch.randn(shape),))
        want = run_zeroed(model, result.plan, inputs)
        assert difference(run(result.model, inputs), want) < 1e-5 < difference(want, run(model, inputs))


def test_a_tensor_passed_twice_is_not_taken_for_any_two():
    _, result = grafted(Attention, "memory")
    assert "memory is query" in source_of(result.model.attention)
    torch.testing.assert_close(
        torch.export.export(result.model, (SEQUENCE,)).module()(SEQUENCE), result.model(SEQUENCE)
    )
    with pytest.raises(AssertionError, match=r"attention was traced for .*memory is query"):
        result.model(SEQUENCE, torch.randn(2, 9, 24))


def test_a_class_without_heirs_gets_no_graft():
    _, result = grafted(Childless, "once")
    assert result.report.emitter == "graph"
    assert "Childless cannot be subclassed: TypeError: no heirs" in result.report.reason


def test_a_grafted_module_is_loaded_in_another_process(tmp_path):
    _, result = grafted(OwnState, "once")
    torch.save((result.model, SEQUENCE, result.model(SEQUENCE)), tmp_path / "saved")
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        f"model, x, want = torch.load({str(tmp_path / 'saved')!r}, weights_only=False); "
        "print(torch.equal(model(x), want), model.attention.stamp)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["True", "7"], found.stderr


class Biased(nn.Module):
    """Keeps, in eval mode, a table it computes from a weight; entering training mode drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.bias, self.held = nn.Parameter(torch.rand(6, 4)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.held = {}
        return self

    def forward(self, x):
        if self.training:
            return self.last(self.first(x) + self.bias[:, 1])
        key = str(x.device)
        if key not in self.held:
            self.held[key] = self.bias[:, 1]
        return self.last(self.first(x) + self.held[key])


@pytest.mark.parametrize("emit", ["auto", "graph"])
def test_what_a_model_keeps_for_eval_mode_is_computed_anew(emit):
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.rand(4, 3)
    with torch.no_grad():
        model(x)
    before = model.held
    result = gp.prune(model, x, target=gp.Target(channels=0.5), emit=emit)
    assert model.held is before
    assert list(before) == ["cpu"]
    assert not model.training
    assert result.report.emitter == ("module" if emit == "auto" else "graph")
    assert list(result.plan.sizes.values()) == [6]
    assert result.report.verification.error < 1e-9

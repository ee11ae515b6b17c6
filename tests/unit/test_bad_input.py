"""Models and inputs that cannot be pruned, or only just: each works, or is one clear error that says what to do."""

from __future__ import annotations

import collections
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphprune as gp
from tests.unit.test_trace import same, snapshot

X = torch.randn(4, 3)
EMITS = ("module", "graft", "graph")


class Net(nn.Module):
    """Two layers and what is done between and after them."""

    def __init__(self, f=lambda s, x: s.last(s.first(x).relu()), width=8):
        super().__init__()
        self.f, self.first, self.last = f, nn.Linear(3, width), nn.Linear(width, 4)

    def forward(self, x, *rest):
        return self.f(self, x, *rest)


def pair():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


def half(model, inputs=X, **options):
    return gp.prune(model.eval(), inputs, target=gp.Target(channels=0.5), **options)


def having(name, tensor):
    model = Net()
    model.register_buffer(name, tensor)
    return model


def around(inner):
    return nn.Sequential(nn.Linear(3, 8), inner, nn.Linear(8, 4))


# -- refused before anything is tried ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def quantised(layer):
    module = nn.Module.__new__(torch.ao.nn.quantized.dynamic.Linear)
    nn.Module.__init__(module)
    return module


def scripted(module):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.trace(module, torch.rand(1, 8))


def partly_unloaded():
    model = pair()
    model[2].to("meta")
    return model


REFUSED = {
    "a script module inside": (lambda: around(scripted(nn.Linear(8, 8))), X, "1 is a ScriptModule with weights; put the module"),
    "quantised layers": (lambda: around(quantised(8)), X, "1 is a quantised Linear; prune the float model and quantise"),
    "a quantised buffer": (lambda: having("q", torch.quantize_per_tensor(torch.rand(8), 0.1, 0, torch.quint8)), X, r"q is a quantised tensor; .* \.dequantize\(\)"),
    "a sparse buffer": (lambda: having("w", torch.eye(3).to_sparse()), X, r"w is a sparse tensor; .* \.to_dense\(\)"),
    "a sparse input": (pair, torch.eye(3).to_sparse(), r"tensor 0 of the example inputs is a sparse tensor; pass the dense one"),
    "a lazy buffer": (lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False), *pair()), X, "0.running_mean is not initialised yet; run the model once"),
    "weights not loaded": (partly_unloaded, X, "2 parameters, such as 2.weight, are on the meta device and the others are not; load"),
    "an empty batch": (pair, torch.rand(0, 3), "all example inputs are empty; pass a batch of at least one"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.*[Ll]azy.*:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_cure(name):
    build, inputs, match = REFUSED[name]
    with pytest.raises(gp.InputError, match=match):
        gp.trace(build(), inputs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_inputs_are_to_be_padded():
    with pytest.raises(gp.InputError, match=r"is a nested tensor; pass a padded one, torch.nested.to_padded_tensor"):
        gp.trace(pair(), torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(5, 3)]))


def test_wrappers_of_many_devices_are_to_be_taken_off(group):
    replicated = nn.parallel.DistributedDataParallel
    with pytest.raises(
        gp.InputError, match=r"model is wrapped in DistributedDataParallel; prune model.module and wrap"
    ):
        gp.trace(replicated(pair()), X)
    with pytest.raises(gp.InputError, match=r"1 is wrapped in DistributedDataParallel; put 1.module in its place"):
        gp.trace(around(replicated(nn.Linear(8, 8))), X)


def test_sharded_weights_are_pruned_before_they_are_sharded(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    sharded = distribute_module(pair(), init_device_mesh("cpu", (1,)))
    with pytest.raises(gp.InputError, match=r"0.weight is sharded over devices; prune the model before it is sharded"):
        gp.trace(sharded, X)
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})
    wrapper.__module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"
    with pytest.raises(gp.InputError, match=r"1 is sharded by FullyShardedDataParallel; prune the model before"):
        gp.trace(around(wrapper()), X)


# -- wrappers and code that are looked through ---------------------------------------------------------------------


class ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.by * grad, None


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_gradient_mode(s, x):
    with torch.inference_mode():
        h = s.first(x).relu()
    return s.last(h.clone())


WORKS = {
    "compiled": lambda: torch.compile(pair()),
    "compiled inside": lambda: nn.Sequential(nn.Linear(3, 8), torch.compile(nn.Sequential(nn.Linear(8, 6), nn.ReLU())), nn.Linear(6, 4)),
    "data parallel inside": lambda: nn.Sequential(nn.Linear(3, 8), nn.DataParallel(nn.Linear(8, 6)), nn.Linear(6, 4)),
    "straight through": lambda: Net(lambda s, x: s.last(Sign.apply(s.first(x)))),
    "gradient reversal": lambda: Net(lambda s, x: s.last(ReversedGradient.apply(s.first(x), 0.5).relu())),
    "inference mode inside": lambda: Net(in_gradient_mode),
    "a number read from the data": lambda: Net(lambda s, x: s.last(s.first(x).relu() * x.sum().item())),
    "a limit read from the data": lambda: Net(lambda s, x: s.last(s.first(x).clamp(min=x.abs().sum().item()))),
    "rows picked by the data": lambda: Net(lambda s, x: s.last(s.first(x).relu())[x[:, 0].abs().nonzero().squeeze(1)]),
    "what is added up in place": lambda: Net(lambda s, x: (x.mul_(2), s.last(s.first(x).relu()))[1]),
    "results written into a tensor": lambda: Net(lambda s, x: (lambda h, out: (torch.mul(h, 2, out=out), s.last(out))[1])(s.first(x), torch.zeros_like(s.first(x)))),
    "complex numbers": lambda: nn.Sequential(nn.Linear(3, 8, dtype=torch.complex64), nn.Linear(8, 4, dtype=torch.complex64)),
}  # fmt: skip


COMPILING = "ignore:.*torch.jit.*:DeprecationWarning"  # torch's own, on loading its compiler


@pytest.mark.filterwarnings(COMPILING)
@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("name", WORKS)
def test_these_are_pruned_exactly(name, emit):
    model = WORKS[name]().eval()
    x = X.to(next(model.parameters()).dtype)
    given, before = x.clone(), snapshot(model)
    result = half(model, x, emit=emit)
    assert [w.after for w in result.report.groups] == [w.before // 2 for w in result.report.groups]
    assert result.report.groups
    assert result.report.verification.error < 1e-9
    assert torch.equal(x, given)
    same(before, snapshot(model))


@pytest.mark.filterwarnings(COMPILING)
def test_both_front_ends_find_the_same_groups():
    seen = 0
    for build in WORKS.values():
        model = build().eval()
        x = X.to(next(model.parameters()).dtype)
        try:
            recorded = gp.couple(gp.trace(model, x, front_end="record"))
        except gp.TraceError:
            continue
        exported = gp.couple(gp.trace(model, x, front_end="export"))
        assert {(g.name, g.size) for g in recorded.groups} == {(g.name, g.size) for g in exported.groups}
        seen += 1
    assert seen >= 8


def test_a_power_read_from_the_data_may_be_negative():
    coupling = gp.couple(gp.trace(Net(lambda s, x: s.last(s.first(x).abs() ** x.sum().item())), X))
    assert "pow is not finite at the zeros" in coupling.why_not("first.weight", 0)


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("twice", [lambda x: (x, x), lambda x: (Both(x, x),)], ids=["arguments", "namedtuple"])
def test_one_tensor_passed_twice_stands_for_two(twice, emit):
    model = Net(lambda s, a, b=None: s.last(s.first((a if b is not None else a.one) * 3 - (a.two if b is None else b))))
    small = half(model, twice(X), emit=emit).model
    other = half(model, twice(X), emit="module").model
    a, b = torch.rand(5, 3), torch.rand(5, 3)
    given = (a, b) if len(twice(X)) == 2 else (Both(a, b),)
    torch.testing.assert_close(small(*given), other(*given))


Both = collections.namedtuple("Both", "one two")


def test_inputs_made_under_inference_mode_are_left_alone():
    with torch.inference_mode():
        x, weights = torch.rand(4, 3), pair()
    given = x.clone()
    model = Net(lambda s, x: (x.mul_(2), s.last(s.first(x).relu()))[1])
    for emit in EMITS:
        assert half(model, x, emit=emit).report.verification.error < 1e-9
        assert torch.equal(x, given)
    assert half(weights, x).report.verification.error < 1e-9
    with pytest.raises(gp.TraceError, match=r"made under torch.inference_mode\(\); build the model outside it"):
        gp.trace(weights, x, front_end="export")


# -- what goes wrong while tracing says what to do -----------------------------------------------------------------


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


EXPLAINED = {
    "an argument of a class of its own": (lambda s, x: s.last(s.first(x.x)), (Slotted(X),), "registered with torch.export.register_dataclass"),
    "a result of a class of its own": (lambda s, x: Slotted(s.last(s.first(x))), X, "return tensors in tuples, lists, dicts or dataclasses"),
    "NumPy inside": (lambda s, x: s.last(torch.from_numpy(s.first(x).detach().numpy())), X, r"values must not leave torch \(.numpy\(\)"),
    "numbers returned": (lambda s, x: [float(v) for v in s.last(s.first(x))[0]], X, "must not depend on the values of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_failed_trace_says_what_to_do(name):
    f, inputs, match = EXPLAINED[name]
    with pytest.raises(gp.TraceError, match=match):
        half(Net(f), inputs)


def test_parts_made_for_quantisation_are_named():
    class FakeQuantize(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    FakeQuantize.__module__ = "torch.ao.quantization.fake_quantize"
    with pytest.raises(gp.TraceError, match=r"1 is a FakeQuantize, .*; prune the float model first"):
        half(around(FakeQuantize()))


def test_the_line_named_is_never_one_of_torch_or_of_python():
    for f in (lambda s, x: s.last(s.first(x)) if x.sum() > 0 else x, lambda s, x: {s.last(s.first(x))}):
        with pytest.raises(gp.TraceError) as caught:
            half(Net(f))
        stopped = [line for line in str(caught.value).splitlines() if "stopped at" in line]
        assert all("test_bad_input.py" in line for line in stopped)


def test_a_failed_trace_prints_no_graph_and_keeps_what_the_model_prints(capsys):
    def f(self, x):
        sys.stderr.write("seen\n")
        return self.last(self.first(x)) if x.sum() > 0 else x

    with pytest.raises(gp.TraceError, match="stopped at"):
        half(Net(f))
    printed = capsys.readouterr().err
    assert "seen" in printed
    assert "def forward" not in printed
    assert "torch.ops" not in printed


def test_a_condition_that_fills_pages_is_cut_short():
    def f(self, x):
        chosen = [x[x > k].sum().item() for k in range(40)]
        return self.last(self.first(x)) if sum(chosen) > 0 else x

    with pytest.raises(gp.TraceError) as caught:
        half(Net(f))
    first, stopped, *_ = str(caught.value).splitlines()
    assert first.endswith(" ...")
    assert 400 < len(first) < 500
    assert "stopped at" in stopped


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(pair(), X.int()), (nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4)), torch.arange(6).reshape(2, 3))],
    ids=["dtype", "index"],
)
def test_inputs_that_only_values_show_to_be_wrong_are_named(model, inputs):
    for options in ({}, {"verify": False}):
        with pytest.raises(
            gp.InputError, match=r"(?s)Sequential itself fails on these example inputs .*pass inputs that"
        ):
            half(model, inputs, **options)


def test_a_model_without_values_can_only_be_pruned_unchecked():
    model, x = pair().to("meta"), X.to("meta")
    with pytest.raises(gp.InputError, match=r"on the meta device and has no values to compare; .* verify=False"):
        half(model, x, importance=gp.importance.Random(0))
    small = half(model, x, importance=gp.importance.Random(0), verify=False).model
    assert (small[0].out_features, small[0].weight.shape, small[0].weight.is_meta) == (4, (4, 3), True)


# -- what a forward leaves behind, it does not -----------------------------------------------------------------------


class Plain:
    def __init__(self):
        self.calls, self.seen = 0, []


class Leaving(nn.Module):
    """Writes to all it can reach that is no parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)
        self.log, self.state, self.recent = {"deep": [{"list": []}]}, Plain(), collections.deque(maxlen=2)
        self.renamed = {0: True}
        self.scale, self.generator = torch.ones(8), torch.Generator().manual_seed(5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.log["deep"][0]["list"].append(x)
        self.state.calls += 1
        self.state.seen.append(x)
        self.recent.append(x)
        self.renamed[self.renamed.popitem()[0] + 1] = True
        self.scale.add_(1)
        self.mean.data.add_(1)
        return self.last(self.first(x).relu() * self.scale) + torch.rand(1, generator=self.generator)


@pytest.mark.parametrize("emit", ["auto", "module", "graft"])
def test_nothing_that_a_model_reaches_is_changed(emit):
    model = Leaving().eval()
    generator, before = model.generator.get_state(), snapshot(model)
    assert half(model, emit=emit).report.verification.error < 1e-5
    same(before, snapshot(model))
    assert (model.log, model.renamed) == ({"deep": [{"list": []}]}, {0: True})
    assert (model.state.calls, model.state.seen, len(model.recent)) == (0, [], 0)
    assert torch.equal(model.scale, torch.ones(8))
    assert torch.equal(model.generator.get_state(), generator)


def clamped(s, x):
    s.first.weight.data.clamp_(-0.1, 0.1)
    return s.last(s.first(x).relu())


def renewed(s, x):
    s.first.weight.data = s.first.weight.data.clamp(-0.1, 0.1)
    return s.last(s.first(x).relu())


def shrunk(s, x):
    s.first.weight.detach()[0].mul_(0.5)
    return s.last(s.first(x).relu())


@pytest.mark.parametrize("emit", ["auto", "graph"])
@pytest.mark.parametrize("f", [clamped, renewed, shrunk])
def test_a_forward_that_writes_to_its_weights_is_refused(f, emit):
    model = Net(f).eval()
    before = snapshot(model)
    with pytest.raises(gp.TraceError, match=r"writes to its parameter first.weight in its forward.* under `if self.tr"):
        half(model, emit=emit)
    with pytest.raises(gp.TraceError, match=r"writes to its parameter first.weight|cannot be traced"):
        gp.trace(model, X, front_end="export")
    same(before, snapshot(model))


def test_other_tensors_given_new_memory_are_left_to_the_exporter():
    def f(s, x):
        s.kept.data = torch.ones(8)
        return s.last(s.first(x).relu())

    model = Net(f)
    model.kept = torch.zeros(8)
    with pytest.raises(gp.TraceError, match=r"a tensor is given other memory, through its .data"):
        gp.trace(model, X, front_end="record")
    assert torch.equal(model.kept, torch.zeros(8))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_interrupt_leaves_no_trace(at):
    calls = []

    def f(s, x):
        calls.append(1)
        s.mode = len(calls)
        if len(calls) == at:
            raise KeyboardInterrupt
        return s.last(s.first(x).relu())

    model = Net(f).train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        gp.prune(model, X, target=gp.Target(channels=0.5))
    same(before, snapshot(model))
    assert not hasattr(model, "mode")

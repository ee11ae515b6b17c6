"""Grafts: modules of the user's model that keep everything but their forward."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.reference import run_zeroed
from graphprune.rewrite.graft import source_of
from graphprune.rewrite.parts import calls
from graphprune.trace import run
from graphprune.verify import difference
from tests.nets import randomised


class Attention(nn.Module):
    """Says in its Python that what leaves the heads is as wide as what came in."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, mask=None, extra=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)) * self.scale
        if mask is not None:
            weights = weights + mask
        y = (weights.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        y = self.drop(self.proj(y))
        return y if extra is None else (y, {"scaled": extra["by"][0] * y})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), Attention()
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x, mask=None, extra=None):
        y = self.attention(self.norm(x), mask=mask, extra=extra)
        if extra is not None:
            y = y[0] + y[1]["scaled"]
        return x + self.mlp(x + y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(5, 24), nn.ModuleList([Block(), Block()]), nn.Linear(24, 7)

    def forward(self, x, mask=None, extra=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask, extra)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def grafted() -> tuple[nn.Module, gp.Result]:
    torch.manual_seed(0)
    model = randomised(Net()).eval()
    return model, half(model, torch.rand(2, 9, 5))


def half(model: nn.Module, inputs, **options) -> gp.Result:
    return gp.prune(model, inputs, target=gp.Target(channels=0.5), importance=gp.importance.Random(1), **options)


def test_only_the_module_that_states_the_size_is_grafted(grafted):
    model, result = grafted
    assert result.report.emitter == "graft"
    assert result.report.grafts == ("blocks.0.attention", "blocks.1.attention")
    assert "  grafted   blocks.0.attention, blocks.1.attention: their forward comes from the trace" in str(
        result.report
    )
    small = result.model
    assert [type(m).__name__ for m in small.modules()] == [type(m).__name__ for m in model.modules()]
    assert type(small.blocks[0]) is Block
    assert isinstance(small.blocks[0].attention, Attention)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(small.state_dict()) == list(model.state_dict())
    assert result.report.verification.error < 1e-9
    assert not source_of(model.blocks[0].attention)


def test_any_batch_and_sequence_goes_through(grafted):
    model, result = grafted
    for shape in [(1, 9, 5), (3, 9, 5), (2, 4, 5), (5, 17, 5)]:
        inputs = gp.Inputs((torch.rand(*shape),))
        want = run_zeroed(model, result.plan, inputs)
        assert difference(run(result.model, inputs), want) < 1e-5
        assert difference(want, run(model, inputs)) > 1e-3


def test_the_source_is_there_to_read(grafted):
    _, result = grafted
    source = inspect.getsource(type(result.model.blocks[0].attention).forward)
    assert source.startswith("def forward(self, x, *, mask=None, extra=None):")
    assert source == source_of(result.model.blocks[0].attention)
    assert "self.qkv.weight" in source


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_compute_the_same_and_are_apart(grafted, how):
    small = grafted[1].model
    if how == "deepcopy":
        other = copy.deepcopy(small)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(small))
    else:
        held = io.BytesIO()
        torch.save(small, held)
        held.seek(0)
        other = torch.load(held, weights_only=False)
    x = torch.rand(2, 9, 5)
    assert torch.equal(other(x), small(x))
    assert source_of(other.blocks[1].attention) == source_of(small.blocks[1].attention)
    with torch.no_grad():
        other.blocks[0].attention.qkv.weight.mul_(2)
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


def test_a_grafted_module_trains(grafted):
    small = copy.deepcopy(grafted[1].model).train()
    x = torch.rand(4, 9, 5)
    assert not torch.equal(small(x), small(x))  # its dropout is on
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
    assert torch.equal(small.eval()(x), small(x))


def test_a_grafted_module_follows_dtype_and_hooks(grafted):
    small = copy.deepcopy(grafted[1].model).double()
    seen = []
    small.blocks[0].attention.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    assert small(torch.rand(2, 9, 5).double()).dtype == torch.float64
    assert seen == [torch.float64]


def test_arguments_other_than_those_traced_are_refused(grafted):
    with pytest.raises(AssertionError, match=r"blocks\.0\.attention was traced for .*mask is None"):
        grafted[1].model(torch.rand(2, 9, 5), torch.zeros(9, 9))


def test_a_pruned_model_can_be_pruned_again(grafted):
    again = half(grafted[1].model, torch.rand(2, 9, 5))
    assert again.report.verification.error < 1e-9
    assert sum(p.numel() for p in again.model.parameters()) < sum(p.numel() for p in grafted[1].model.parameters())


def test_a_grafted_model_can_be_compiled_and_exported(grafted):
    small, x = grafted[1].model, torch.rand(2, 9, 5)
    torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_masks_and_nested_arguments_and_results_pass_through():
    torch.manual_seed(0)
    model = randomised(Net()).eval()
    inputs = gp.Inputs((torch.rand(2, 9, 5), torch.rand(9, 9)), {"extra": {"by": [torch.rand(24)]}})
    result = half(model, inputs)
    assert result.report.grafts == ("blocks.0.attention", "blocks.1.attention")
    assert "extra['by'][0]" in source_of(result.model.blocks[0].attention)


class Passing(nn.Module):
    """Hands its block a mask where it is traced, and as it was told otherwise; the rest by keyword."""

    def __init__(self, attention: nn.Module, *, masked: bool = True) -> None:
        super().__init__()
        self.masked, self.stem, self.attention = masked, nn.Linear(5, 24), attention

    def forward(self, x):
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=x.dtype) if self.masked or torch.compiler.is_exporting() else None
        return self.attention(self.stem(x), mask, places=torch.arange(n).expand(len(x), n), scaled=x[..., :1], to=None)


class Keyed(Attention):
    def forward(self, x, mask=None, **kwargs):
        return super().forward(x, mask=mask) * kwargs["scaled"]


class Fused(Attention):
    def forward(self, x, mask=None, **kwargs):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def test_what_a_module_takes_by_keyword_passes_through_at_any_length():
    torch.manual_seed(0)
    model = randomised(Passing(Keyed())).eval()
    before = set(vars(model.attention))
    result = half(model, torch.rand(2, 9, 5))
    assert result.report.grafts == ("attention",)
    assert result.report.verification.error < 1e-9
    assert set(vars(model.attention)) == before
    for shape in [(3, 7, 5), (1, 2, 5), (2, 11, 5)]:
        inputs = gp.Inputs((torch.rand(*shape),))
        want = run_zeroed(model, result.plan, inputs)
        assert difference(run(result.model, inputs), want) < 1e-5
        assert difference(want, run(model, inputs)) > 1e-3


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (Keyed, "attention is traced to other ops on its own than inside the model: softmax, add"),
        (Fused, "attention hands other arguments to scaled_dot_product_attention on its own than inside the model"),
    ],
)
def test_a_run_that_hands_a_module_other_arguments_than_the_trace_has_no_graft(inner, why):
    torch.manual_seed(0)
    model, x = randomised(Passing(inner(), masked=False)).eval(), torch.rand(2, 9, 5)
    coupling = gp.couple(gp.trace(model, x, front_end="export"))
    plan = gp.Plan.of(coupling, {g.name: range(g.size // 2) for g in coupling.groups})
    with pytest.raises(gp.RewriteError, match=why):
        gp.rewrite(model, x, coupling, plan, emit="graft")


def test_a_mask_that_a_graft_was_traced_with_and_is_not_given_is_named():
    torch.manual_seed(0)
    model = randomised(Passing(Keyed())).eval()
    small = half(model, torch.rand(2, 9, 5)).model
    small.masked = False
    with pytest.raises(AssertionError, match="attention was traced for mask is not None, "):
        small(torch.rand(2, 9, 5))


class Odd(Attention):
    """What one function of tensors cannot say."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = (x * 2).float()
        y = super().forward(x)
        return Pair(y, y) if self.how == "result" else y


class OddDefault(Attention):
    def forward(self, x, kind=Ellipsis):
        return super().forward(x)


class Pair:
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b


torch.utils._pytree.register_pytree_node(Pair, lambda p: ((p.a, p.b), None), lambda ab, _: Pair(*ab))


class OddNet(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.last = how, nn.Linear(24, 3)
        self.attention = OddDefault() if how == "default" else Odd(how)

    def forward(self, x):
        y = self.attention(x)
        return self.last(y.a if self.how == "result" else y)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("default", "the default of kind in the forward of attention cannot be written as source"),
        ("result", "attention returns a Pair, which cannot be written as source"),
        ("autocast", "attention has regions, such as autocast, that cannot be written as one function"),
    ],
)
def test_what_cannot_be_written_as_source_becomes_a_graph_module_that_says_so(how, why):
    torch.manual_seed(0)
    model = OddNet(how).eval()
    result = half(model, torch.rand(2, 9, 24))
    assert result.report.emitter == "graph"
    assert why in result.report.reason
    with pytest.raises(gp.RewriteError, match=r"grafts do not work: (.|\n)*use emit='auto' or emit='graph'"):
        half(model, torch.rand(2, 9, 24), emit="graft")


class Shared(nn.Module):
    """One attention for both streams, and a weight of its own that another module reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = Attention(), nn.Linear(24, 3)

    def forward(self, x, y):
        return self.last(self.attention(x)), F.linear(self.attention(y), self.last.weight)


def test_a_shared_module_is_grafted_once():
    torch.manual_seed(0)
    model, inputs = Shared().eval(), (torch.rand(2, 9, 24), torch.rand(2, 4, 24))
    result = half(model, inputs)
    assert result.report.grafts == ("attention",)
    assert result.report.verification.error < 1e-9


class Table(nn.Module):
    """Makes a tensor as wide as its channels in its code, in a module of its own."""

    def forward(self, x):
        return x * torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])


def test_tensors_that_the_code_makes_are_sliced_and_are_not_saved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Table(), nn.Linear(6, 3)).eval()
    result = half(model, torch.rand(2, 5))
    assert result.report.grafts == ("1",)
    assert list(result.model.state_dict()) == list(model.state_dict())
    kept = result.plan.kept["0.weight"][0]
    (held,) = result.model[1].buffers()
    assert torch.equal(held, torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])[kept])


class Doubled(nn.Module):
    """Pads by a number in its Python, on both sides."""

    def forward(self, x):
        return F.pad(x, (2, 2))


def test_where_a_module_stops_that_is_right_the_ones_before_it_are_grafted():
    torch.manual_seed(0)
    result = half(nn.Sequential(nn.Linear(5, 6), Doubled(), nn.Linear(10, 3)).eval(), torch.rand(2, 5))
    assert result.report.grafts == ("1",)


class Starts(nn.Module):
    """Makes what it adds to, with the width in its Python."""

    def forward(self, x):
        return torch.zeros(x.shape[0], 6).add(x)


def test_zeros_that_the_code_makes_follow_the_device_of_the_input():
    torch.manual_seed(0)
    result = half(nn.Sequential(nn.Linear(5, 6), Starts(), nn.Linear(6, 3)).eval(), torch.rand(2, 5))
    assert result.report.grafts == ("1",)
    assert "x.device" in source_of(result.model[1])
    assert result.model.to("meta")(torch.rand(7, 5, device="meta")).shape == (7, 3)


def test_the_fast_path_of_a_transformer_layer_computes_the_same():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 24), nn.TransformerEncoder(layer, 2), nn.Linear(24, 3)).eval()
    result = half(randomised(model), torch.rand(2, 9, 5))
    assert result.report.emitter == "graft"
    x = gp.Inputs((torch.rand(2, 9, 5),))
    want = run_zeroed(model, result.plan, x)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():  # outside of `run`, so the fast path is on
        assert difference([result.model(*x.args)], want) < 1e-5
        assert difference([model(*x.args)], want) > 1e-3


class Pooled(nn.Module):
    """Reads what it is given through slices only: with an open batch size they are noted, with a fixed one they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 3)

    def forward(self, x):
        q = self.q(x[:, 0]).reshape(-1, 1, 3, 8).transpose(1, 2)
        k, v = self.kv(x[:, 1:]).reshape(x.shape[0], -1, 2, 3, 8).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 24))


def test_slices_that_take_everything_do_not_hide_the_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), Pooled()).eval()
    result = half(model, torch.rand(2, 9, 5))
    assert result.report.grafts == ("1",)
    x = gp.Inputs((torch.rand(3, 6, 5),))
    assert difference(run(result.model, x), run_zeroed(model, result.plan, x)) < 1e-5


class Periodic(Block):
    """Reads an int of its attention that happens to be as large as a head is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attention.period = 8

    def forward(self, x, mask=None, extra=None):
        return super().forward(x) + x[:, : self.attention.period].mean(1, keepdim=True)


def test_an_int_that_another_module_reads_is_not_taken_for_a_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), Periodic(), nn.Linear(24, 3)).eval()
    result = half(model, torch.rand(2, 9, 5))
    assert result.report.grafts == ("1.attention",)
    assert result.model[1].attention.period == 8


def test_a_dry_run_tells_how_modules_are_called_as_a_real_one_does():
    class Inner(nn.Module):
        def forward(self, x, bias, twice, again, *, flag, scale):
            return x + bias + twice + again

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(5, 6), Inner()

        def forward(self, x):
            y = self.first(x)
            return self.inner(y.t().contiguous().t(), y.mean(1, keepdim=True).expand(-1, 6), y, y, flag=None, scale=2)

    net, inputs = Outer().eval(), gp.Inputs.of(torch.randn(1, 5))
    (wet,), (dry,) = (calls(net, inputs, ["inner"], dry=dry).values() for dry in (False, True))
    assert (dry.names, dry.open_dims) == (wet.names, wet.open_dims) == (wet.names, [(0,)] * 4)
    told = [[(t.shape, t.stride(), t.dtype, t.device) for t in c.arguments.tensors()] for c in (dry, wet)]
    assert told[0] == told[1]
    assert told[0][1][1] == (1, 0)  # an expanded tensor
    assert dry.arguments.args[2] is dry.arguments.args[3]
    assert dry.arguments.kwargs == {"flag": None, "scale": 2}

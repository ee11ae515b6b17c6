"""Objects that a forward takes or returns, such as caches: looked into, and allowed to shrink where they come back."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp


class Layer:
    """What one layer remembers."""

    def __init__(self, keys):
        self.keys, self.dtype, self.filled = keys, keys.dtype, True


class Cache:
    """Neither a container nor a dataclass; it holds tensors two levels down, and things that are none."""

    def __init__(self):
        self.layers: list[Layer] = []
        self.name, self.limit, self.spare = "cache", 7, None


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    cache: Cache | None = None
    report: Cache | None = None


class Remembers(nn.Module):
    """Returns the inner activations of two layers in an object."""

    def __init__(self, field="cache"):
        super().__init__()
        self.first, self.second, self.last, self.field = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 2), field

    def forward(self, x, cache=None):
        made = Cache()
        h = self.first(x).relu()
        made.layers.append(Layer(h))
        if cache is not None:
            h = h + cache.layers[0].keys
        h = self.second(h).relu()
        made.layers.append(Layer(h))
        y = self.last(h)
        return Output(y, **{self.field: made}) if self.field else (y, made)


X = torch.rand(5, 3)


def half(model, *inputs, **options):
    torch.manual_seed(0)
    return gp.prune(model.eval(), inputs, target=gp.Target(channels=0.5), **options)


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_a_cache_that_the_model_takes_back_shrinks_along(emit):
    result = half(Remembers(), X, emit=emit)
    assert [(w.name, w.after) for w in result.report.groups] == [("first", 3), ("second", 4)]
    assert result.report.verification.error < 1e-9
    made = result.model(X).cache
    assert type(made) is Cache
    assert [type(layer) for layer in made.layers] == [Layer, Layer]
    assert [layer.keys.shape for layer in made.layers] == [(5, 3), (5, 4)]
    assert (made.name, made.limit, made.spare, made.layers[0].filled) == ("cache", 7, None, True)
    assert result.report.verification.effect > 0


def test_a_cache_that_a_part_of_the_model_takes_back_shrinks_too():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Remembers()

        def forward(self, x):
            return self.part(x)

    assert [g.name for g in half(Whole(), X).coupling.groups] == ["part.first", "part.second"]


@pytest.mark.parametrize("field", ["report", ""])
def test_an_object_that_is_not_taken_back_keeps_its_widths(field):
    model = Remembers(field).eval()
    coupling = gp.couple(gp.trace(model, X))
    assert coupling.groups == ()
    assert "it reaches dim 1 of the model's output 1" in coupling.why_not("first.weight", 0)
    with pytest.raises(gp.PlanError, match="no channels that may be removed"):
        half(model, X)


def test_a_cache_that_is_passed_in_is_looked_into_and_keeps_its_widths():
    given = Cache()
    given.layers = [Layer(torch.rand(5, 6)), Layer(torch.rand(5, 8))]
    result = half(Remembers(), X, given)
    assert [v.shape for v in result.coupling.program.inputs] == [(5, 3), (5, 6), (5, 8)]
    assert [(w.name, w.after) for w in result.report.groups] == [("second", 4)]
    assert result.report.verification.error < 1e-9


def test_a_wrong_cache_is_caught():
    model = Remembers()
    result = half(model, X)

    class Forgets(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, cache=None):
            out = self.inner(x, cache)
            out.cache.layers[0].keys = out.cache.layers[0].keys * 1.1
            return out

    assert gp.verify(model, result.model, X, result.coupling, result.plan).error < 1e-9
    with pytest.raises(gp.VerificationError, match="differs from the zeroed original"):
        gp.verify(model, Forgets(copy.deepcopy(result.model)), X, result.coupling, result.plan)


class Table(nn.Module):
    """Adds the first rows of a table of positions; the rest is for longer inputs."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = nn.Parameter(torch.rand(11, 6)), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        rows = F.dropout(self.table, 0.0, self.training)[: x.shape[1]]
        return self.last((self.first(x) + rows).relu())


def test_rows_that_only_a_longer_input_would_read_stay():
    coupling = gp.couple(gp.trace(Table().eval(), torch.rand(2, 5, 3)))
    assert [g.name for g in coupling.groups] == ["first"]
    assert "6 channels stay because it is cut off at these inputs, and other inputs may need it" in coupling.why_not(
        "table", 0
    )


class LowRank(nn.Module):
    """A weight that is the product of two."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(5, 4))

    def forward(self, x):
        return F.linear(x, self.up @ self.down)


def test_what_two_parameters_share_without_the_input_is_free():
    result = half(LowRank(), X)
    assert [(w.name, w.before, w.after) for w in result.report.groups] == [("down", 4, 2)]
    assert result.report.verification.error < 1e-9


class Unheard(nn.Module):
    """Computes a mean that nobody reads, as attention weights that are averaged and thrown away."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        h.mean(-1)
        return self.last(h)


def test_statistics_that_reach_no_output_pin_nothing():
    result = half(Unheard(), X)
    assert "mean" in [node.op for node in result.coupling.program.nodes]
    assert [(w.name, w.after) for w in result.report.groups] == [("first", 3)]
    assert result.report.verification.error < 1e-9


class FaintlyTied(nn.Module):
    """Tied embeddings too faint to matter, and float32 in the middle."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(6, 11, bias=False)
        self.back = nn.Linear(8, 6)
        nn.init.normal_(self.embed.weight, std=1e-3)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.back(self.inner(self.embed(tokens)).tanh())
        return self.head(h.float().sin().to(h.dtype))


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_tied_weights_are_varied_as_one(emit):
    result = half(FaintlyTied(), torch.arange(10).reshape(2, 5), emit=emit)
    check = result.report.verification
    assert {w.name for w in result.report.groups} == {"back", "inner"}
    assert check.error < check.tolerance
    assert result.model.head.weight is result.model.embed.weight


class Grows(nn.Module):
    """Its cache starts with a tensor without elements, to which what comes is appended."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x, cache=None):
        made, h = Cache(), self.first(x).relu()
        made.layers.append(Layer(torch.cat([torch.tensor([], dtype=h.dtype, device=h.device), h], dim=-2)))
        return Output(self.last(made.layers[0].keys), made)


@pytest.mark.parametrize("front_end", ["record", "export"])
def test_a_cache_that_starts_without_elements_is_followed(front_end):
    coupling = gp.couple(gp.trace(Grows().eval(), X, front_end=front_end))
    assert [(g.name, g.size) for g in coupling.groups] == [("first", 6)]
    assert coupling.program.carried == {1}

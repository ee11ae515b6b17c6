"""Times in a report: of every layer, before and after, and how they are known."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cost import COSTS
from graphprune.latency import Latency
from graphprune.report import Change, Layer, Report, Timing
from tests.unit.test_latency import Grouped, even, mlp

X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def pruned(**options) -> gp.Result:
    torch.manual_seed(0)
    return gp.prune(Grouped().eval(), X, target=gp.Target(macs=0.5), **options)


@pytest.fixture(scope="module")
def result() -> gp.Result:
    return pruned(latency=Latency(measure=even))


def by_hand(net: nn.Module) -> dict[str, float]:
    """Nanoseconds of every layer's call: `even` by what the layer gets, and by its weights."""
    found: Counter[str] = Counter()

    def called(name):
        def hook(layer, args, output):
            sizes = [args[0].shape, layer.weight.shape, layer.bias.shape]
            found[name] += (
                1e3
                + sum(map(torch.Size.numel, sizes))
                + sizes[1].numel() * (len(args[0]) if isinstance(layer, nn.Linear) else 1)
            )

        return hook

    hooks = [layer.register_forward_hook(called(name)) for name, layer in net.named_children()]
    net(X)
    for hook in hooks:
        hook.remove()
    return dict(found)


def test_a_layer_takes_what_its_own_calls_take_before_and_after(result):
    torch.manual_seed(0)
    costs = {layer.name: layer.costs["latency"] for layer in result.report.layers}
    for when, net in (("before", Grouped().eval()), ("after", result.model)):
        truth = by_hand(net)
        assert len(truth) == 4
        assert {name: getattr(costs[name], when) for name in truth} == pytest.approx(truth, rel=1e-3)
    assert costs[""].after < costs[""].before  # relu, cat and pooling, in the model's own forward


def test_times_of_layers_add_up_to_the_total(result):
    report = result.report
    assert (report.timing.besides, report.timing.together) == (pytest.approx(0, abs=1), 1)  # the concatenation
    for when in ("before", "after"):
        total = sum(getattr(layer.costs["latency"], when) for layer in report.layers)
        assert total == pytest.approx(getattr(report.costs["latency"], when), abs=len(report.layers))


def test_layers_come_in_the_order_in_which_they_run(result):
    assert [layer.name for layer in result.report.layers] == ["first", "", "depthwise", "grouped", "linear"]


def test_a_latency_without_a_latency_target_is_measured_and_reported(tmp_path):
    report = pruned(latency=Latency(cache=tmp_path, seconds=0.5, progress=False)).report
    assert str(report.requested) == "macs 0.5"
    assert report.costs["latency"].before > report.timing.besides >= 0
    total = sum(layer.costs["latency"].before for layer in report.layers) + report.timing.besides
    assert total == pytest.approx(report.costs["latency"].before, abs=2 + len(report.layers))
    assert min(report.measured.before, report.measured.after) > 0


def test_a_step_by_step_run_reports_times_as_well():
    net = mlp(5, 16, 24, 7)
    ways = {"target": gp.Target(macs=0.5), "latency": Latency(measure=even)}
    first, second = gp.prune_iteratively(net, torch.rand(3, 5), steps=2, **ways).reports
    assert second.costs["latency"].after < first.costs["latency"].after < first.costs["latency"].before
    assert second.layers[0].costs["latency"].before == first.layers[0].costs["latency"].before


def test_nothing_is_timed_unasked():
    report = pruned().report
    assert "latency" not in report.costs
    assert report.timing is report.measured is None
    assert all(set(layer.costs) == {"macs", "params"} for layer in report.layers)
    assert "time" not in report.to_markdown()
    assert "time in" not in report.to_html()


def test_times_of_another_kind_are_not_told_by_layer():
    report = pruned(latency=lambda model, inputs, coupling: replace(COSTS["macs"](coupling), name="latency")).report
    assert report.costs["latency"].before == report.costs["macs"].before
    assert report.timing is report.measured is None
    assert all("latency" not in layer.costs for layer in report.layers)


def test_calls_measured_only_as_all_their_sizes_shrink_are_counted():
    def refusing(call):
        shapes = [o.shape for o in call.operands()]
        if "linear" in str(call.op) and 5 not in shapes[0] and 7 not in shapes[1] and 2 * shapes[0][1] != shapes[1][0]:
            raise RuntimeError("sizes do not fit")
        return even(call)

    net, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    report = gp.prune(net, x, target=gp.Target(macs=0.5), latency=Latency(measure=refusing)).report
    assert report.timing.together == 1
    middle = next(layer for layer in report.layers if layer.name == "2").costs["latency"].before
    assert report.timing.share == pytest.approx(middle / report.costs["latency"].before, rel=1e-3)
    said = f"0.000 ms besides; 1 call, {report.timing.share:.3f} of the time, only as all its sizes shrink at once"
    for page in (str(report), report.to_markdown(), report.to_html()):
        assert f"call by call, {said}" in page


def test_an_elementwise_call_over_several_groups_is_one_of_those():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 12), nn.Linear(8 * 12, 2)

        def forward(self, x):
            return self.c(F.relu(self.a(x)[:, :, None] * self.b(x)[:, None]).flatten(1))

    report = gp.prune(
        Outer().eval(), X[0, 0, :, :3], target=gp.Target(channels=0.5), latency=Latency(measure=even)
    ).report
    assert report.timing.together == 2  # the product and the relu; the linear layers have their sizes one by one
    assert 0 < report.timing.share < 1


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timed(result) -> Report:
    """Times that are easy to find: of layers with MACs, of one that is slow without, and of one that is quick."""
    costs = [
        {"macs": Change(20, 10), "params": Change(4, 2), "latency": Change(400_000, 250_000)},
        {"macs": Change(0, 0), "params": Change(7, 5), "latency": Change(90_000, 80_000)},
        {"macs": Change(0, 0), "params": Change(3, 2), "latency": Change(300, 200)},
        {"macs": Change(0, 0), "params": Change(0, 0)},  # as a report of another hand may have it
    ]
    layers = tuple(Layer(name, cost) for name, cost in zip(("conv", "slow", "quick", "bare"), costs, strict=True))
    return replace(result.report, layers=layers, timing=Timing(61_000.0, 0, 0.0))


def test_markdown_shows_times_by_layer_and_what_is_left(timed):
    rows = [line for line in timed.to_markdown().split("## Layers")[1].split("##")[0].splitlines() if line]
    assert rows == [
        "| layer | MACs before | after | parameters before | after | time before | after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `conv` | 20 | 10 | 4 | 2 | 0.400 ms | 0.250 ms |",
        "| `slow` | 0 | 0 | 7 | 5 | 0.090 ms | 0.080 ms |",
        "| 2 without MACs | 0 | 0 | 3 | 2 | 0.000 ms | 0.000 ms |",
        "| outside all calls | 0 | 0 | 0 | 0 | 0.061 ms | 0.061 ms |",
    ]


def test_the_page_shows_times_by_layer_and_what_is_left(timed):
    rows = re.findall(r"<li><code>([^<]*)</code>(.*?)</li>", timed.to_html().split('class="rows layers timed"')[1])
    assert [(name, re.findall(r'class="n">([^<]*)<', cells)[2], cells.count("<b")) for name, cells in rows] == [
        ("conv", "400 → 250", 3),
        ("slow", "90 → 80", 3),
        ("2 without MACs", "0.3 → 0.2", 0),
        ("outside all calls", "61 → 61", 0),
    ]


def test_times_survive_json_and_older_reports_have_none(timed):
    assert Report.from_json(timed.to_json()) == timed
    data = json.loads(timed.to_json())
    del data["timing"]
    for layer in data["layers"]:
        layer["costs"].pop("latency", None)
    older = Report.from_json(json.dumps(data))
    assert older.timing is None
    assert "time in" not in older.to_html()


@pytest.mark.parametrize("wrong", [{"besides": -1}, {"share": 2}, {"share": "nan"}])
def test_times_that_are_none_are_refused(timed, wrong):
    data = json.loads(timed.to_json())
    data["timing"].update(wrong)
    with pytest.raises(gp.InputError, match="not a report: a time is no number"):
        Report.from_json(json.dumps(data))


@pytest.mark.filterwarnings("default")  # of matplotlib and what it stands on
def test_a_figure_shows_times_by_layer(timed):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    axes = timed.plot()["times"].axes[0]
    assert axes.get_xlabel() == "predicted ms"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.4, 0.09, 0.25, 0.08])
    assert "times" not in pruned().report.plot()

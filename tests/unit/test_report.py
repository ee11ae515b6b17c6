"""Reports: what they hold is true, survives JSON, and is shown escaped in every form."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.allocate import Target
from graphprune.importance.fallback import scored_by
from graphprune.report import Change, History, Layer, Op, Pinned, Report, Slot, Stage, Track, Width, charts, markdown
from graphprune.report.codec import decoded, encoded
from graphprune.report.gather import BINS, SHOWN, described, histogram
from graphprune.report.lanes import FAN, LETTERS, cut, lanes
from graphprune.sensitivity import Curve, Sensitivity
from tests.nets import randomised

EVIL = "</script><img src=x onerror=alert(1)>&\"'`|$x$ ${y}"


class Block(nn.Module):
    """A residual stream of 6 channels, with 5 inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 7)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


def block() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(Block())


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result() -> gp.Result:
    return gp.prune(block(), X, target=gp.Target(channels=0.5))


def wide(report: Report, name: str) -> Width:
    return next(w for w in report.groups if w.name == name)


# -- what a report holds ----------------------------------------------------------------------------------------------


def test_costs_of_layers_add_up_to_the_totals(result):
    report = result.report
    for name in ("macs", "params"):
        for when in ("before", "after"):
            assert sum(getattr(layer.costs[name], when) for layer in report.layers) == getattr(report.costs[name], when)
    parameters = {n: sum(p.numel() for p in m.parameters()) for n, m in result.model.named_children()}
    assert {layer.name: layer.costs["params"].after for layer in report.layers} == parameters


def test_a_call_outside_any_layer_is_a_layer_of_its_module():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return self.b(y) + (y * y) @ torch.ones(5, 2)

    report = gp.prune(Product().eval(), torch.rand(4, 3), target=gp.Target(channels=0.5)).report
    assert {layer.name: layer.costs["macs"].before for layer in report.layers} == {"a": 60, "b": 40, "": 40}


def test_a_member_is_tied_to_one_before_it_by_the_lines_in_between(result):
    report = result.report
    stream = wide(report, "stem")
    names = [str(slot) for slot in stream.slots]
    assert names == [str(m) for m in result.coupling.group("stem").members]
    assert stream.slots[0].to is None
    by_name = dict(zip(names, stream.slots, strict=True))
    inner = by_name["inner.weight[1]"]
    assert inner.to is not None
    ops = [report.ops[k].op for k in inner.through]
    assert ops[-1] == "conv2d"
    assert "relu" in ops
    outer = by_name["outer.weight[0]"]
    codes = [report.ops[k].code for k in outer.through]
    assert "x = x + self.outer(F.relu(self.inner(x)))" in codes
    assert all(slot.to is not None and slot.to < k for k, slot in enumerate(stream.slots) if k)


def test_a_member_that_nothing_ties_to_those_before_it_says_so():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 5).view(2, -1))

    report = gp.prune(Apart().eval(), torch.rand(2, 3), target=gp.Target(channels=0.5)).report
    for k, slot in enumerate(report.groups[0].slots):
        assert (slot.to is None) == (not slot.through)
        assert slot.to is None or slot.to < k


def test_groups_of_thousands_of_members_list_the_first():
    layers = [m for _ in range(30) for m in (nn.BatchNorm1d(5), nn.ReLU())]
    net = randomised(nn.Sequential(nn.Linear(3, 5), *layers, nn.Linear(5, 2)))
    (group,) = gp.prune(net, torch.rand(4, 3), target=gp.Target(channels=0.5)).report.groups
    assert group.members > 100
    assert len(group.slots) == SHOWN


def test_calls_read_and_write_the_groups_that_they_mix(result):
    report = result.report
    axes = [w.name for w in report.groups] + [p.name for p in report.pinned]
    flow = [(report.ops[s.op].module, [axes[a] for a in s.reads], [axes[a] for a in s.writes]) for s in report.stages]
    assert flow == [
        ("stem", ["stem.dim1"], ["stem"]),
        ("inner", ["stem"], ["inner"]),
        ("outer", ["inner"], ["stem"]),
        ("head", ["stem"], ["head"]),
    ]


def test_a_depthwise_convolution_reads_what_it_writes():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)).eval()
    report = gp.prune(net, X, target=gp.Target(channels=0.5)).report
    assert report.stages[1].reads == report.stages[1].writes == (0,)


def test_an_embedding_makes_channels_without_multiplying():
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2)).eval()
    report = gp.prune(net, torch.tensor([[1, 2, 3]]), target=gp.Target(channels=0.5)).report
    assert report.ops[report.stages[0].op].op == "embedding"
    assert report.groups[report.stages[0].writes[0]].name == "0.dim1"


def test_a_report_keeps_no_tensor_of_the_model_alive():
    net = block()
    report = gp.prune(net, X, target=gp.Target(channels=0.5)).report
    held = weakref.ref(net.stem.weight)
    del net
    gc.collect()
    assert held() is None
    assert report.groups


# -- scores -----------------------------------------------------------------------------------------------------------


def test_a_histogram_parts_what_stays_from_what_goes_at_the_cut():
    found = histogram(torch.tensor([4.0, 0.0, 2.0, 3.0]), 2)
    assert (found.low, found.high, found.cut, found.unseen) == (0.0, 4.0, 3.0, 0)
    assert [k for k, n in enumerate(found.removed) if n] == [0, BINS // 2]
    assert [k for k, n in enumerate(found.kept) if n] == [BINS * 3 // 4, BINS - 1]
    assert (sum(found.kept), sum(found.removed)) == (2, 2)


def test_nothing_removed_has_no_cut():
    assert histogram(torch.tensor([1.0, 2.0]), 2).cut is None


def test_infinite_scores_are_counted_and_not_drawn():
    found = histogram(torch.tensor([1.0, float("inf"), 2.0]), 2)
    assert (found.low, found.high, found.unseen) == (1.0, 2.0, 1)
    assert sum(found.kept) + sum(found.removed) == 2
    assert histogram(torch.full((3,), float("inf")), 2).unseen == 3


def test_equal_scores_fall_into_one_bin():
    found = histogram(torch.ones(5), 3)
    assert (found.kept[0], found.removed[0], found.cut) == (3, 2, 1.0)


def test_an_order_is_shown_by_what_each_removal_costs():
    found = histogram(gp.importance.Removal(torch.tensor([2, 0, 1]), torch.tensor([0.5, 4.0, 1.0])), 1)
    assert (found.low, found.high, sum(found.removed)) == (0.5, 4.0, 2)
    assert found.cut is None  # what stays would have cost less than what went: no line parts them


def test_scores_in_a_report_are_those_of_the_criterion(result):
    scores = gp.importance.Magnitude()(block(), result.coupling)
    for w in result.report.groups:
        assert w.scores is not None
        assert w.scores.high == pytest.approx(float(scores[w.name].max()))
        assert (sum(w.scores.kept), sum(w.scores.removed)) == (w.after, w.before - w.after)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (gp.importance.Magnitude(), "Magnitude"),
        (gp.importance.Magnitude(p=1, normalize="mean"), "Magnitude(p=1, normalize='mean')"),
        (gp.importance.Gamma(otherwise=gp.importance.Random(3)), "Gamma(otherwise=Random(seed=3))"),
        (gp.importance.Fisher([(X, X)], F.mse_loss, normalize="macs", progress=False), "Fisher(normalize='macs')"),
        (lambda model, coupling: {}, "<lambda>"),
    ],
)
def test_a_criterion_is_named_with_its_plain_options_and_never_its_batches(criterion, text):
    assert described(criterion) == text


def test_a_report_names_the_criterion_and_the_method(result):
    assert (result.report.importance, result.report.allocation) == ("Magnitude", "uniform")
    assert "  scored    by Magnitude, uniform allocation" in str(result.report)


def test_groups_that_otherwise_scored_are_named():
    net = block()
    gamma = gp.importance.Gamma(otherwise=gp.importance.Magnitude(p=1))
    report = gp.prune(net, X, target=gp.Target(channels=0.5), importance=gamma).report
    assert {w.name: w.criterion for w in report.groups} == {"stem": "", "inner": "Magnitude(p=1)"}
    assert "  scored    1 group by Magnitude(p=1) instead, such as inner" in str(report)
    assert "otherwise=Magnitude(p=1)" in report.importance


def test_otherwise_of_otherwise_is_what_scored():
    class Silent:
        otherwise = gp.importance.Random()

        def __call__(self, model, coupling):
            from graphprune.importance.fallback import complete

            return complete({}, model, coupling, self.otherwise, "Silent:")

    net = block()
    coupling = gp.couple(gp.trace(net, X))
    scores = gp.importance.Gamma(otherwise=Silent())(net, coupling)
    assert {name: described(by) for name, by in scored_by(scores).items()} == {"inner": "Random"}
    assert scored_by({}) == {}


def test_groups_without_scores_are_named():
    def some(model, coupling):
        return {"inner": gp.importance.Magnitude()(model, coupling)["inner"]}

    report = gp.prune(block(), X, target=gp.Target(channels=0.5), importance=some).report
    assert wide(report, "stem").scores is None
    assert "  scored    1 group not at all, such as stem: it stays as it was" in str(report)
    assert report.importance == "some"


def test_a_scan_that_scored_is_in_the_report_with_what_otherwise_scored():
    net = block()
    batch = X, torch.rand(2, 7)
    gamma = gp.importance.Gamma(otherwise=gp.importance.Magnitude())
    scan = gp.sensitivity(net, X, [batch], F.mse_loss, fractions=(0.5,), progress=False)
    report = gp.prune(net, X, target=gp.Target(channels=0.5), importance=scan.importance(gamma)).report
    assert report.sensitivity is scan
    assert report.importance == "Scanned(criterion=Gamma(otherwise=Magnitude))"
    assert wide(report, "inner").criterion == "Magnitude"
    assert "rises" in report.to_markdown()


def test_steps_report_the_scores_of_what_was_left():
    result = gp.prune_iteratively(block(), X, target=gp.Target(macs=0.7), steps=2, allocation="global")
    first, second = result.reports
    assert (first.allocation, second.importance) == ("global", "Magnitude")
    for w in second.groups:
        assert w.scores is not None
        assert sum(w.scores.kept) + sum(w.scores.removed) == wide(first, w.name).after
        assert sum(w.scores.kept) == w.after


def test_a_step_that_was_saved_has_no_scores(tmp_path):
    def again():
        target = gp.Target(channels=0.5)
        return gp.prune_iteratively(block(), X, target=target, steps=1, directory=tmp_path).report

    assert all(w.scores is not None for w in again().groups)
    report = again()
    assert all(w.scores is None for w in report.groups)
    assert "not at all" not in str(report)


# -- JSON -------------------------------------------------------------------------------------------------------------


TRACK = Track(5e-3, ((0.5, 0.5, 0.5, 0.5, 0.5), (0.0, 1e-4, 0.1, 0.4, 0.6)))
HISTORY = History("Slimming", (0, 200), (0.0, 0.25), {"stem": TRACK, "inner": TRACK})


def full(report: Report) -> Report:
    """A report with something of everything."""
    quality = gp.recover.Quality(float("nan"), float("inf"), None, 3)
    same = replace(quality, loss=0.5)
    repair = gp.Repair("bias", same, quality, same, 3, 4, {"a": 1e-4}, {"b": "it is recurrent"}, True, False)
    scan = Sensitivity(0.25, 8, {"stem": Curve(("stem",), 6, (2, 3), (1.5, -0.1))})
    target = Target(macs=0.5, channels={"stem": 0.5}, floor=0.1, protect=["head"], tied=[["a", "b"]])
    return replace(
        report,
        repair=repair,
        requested=replace(target, protect=("head",), tied=(("a", "b"),)),
        unknown=(gp.coupling.Unknown("roll", ("n1", "n2"), "no rule"),),
        unused=("aux.weight",),
        grafts=("a", "b", "c", "d"),
        emitter="graft",
        reason="it does not work",
        groups=(replace(report.groups[0], exactness="renormalised", cause="layer_norm"), *report.groups[1:]),
        training=HISTORY,
    ).with_sensitivity(scan)


def test_a_report_survives_json(result):
    assert Report.from_json(result.report.to_json()) == result.report
    text = full(result.report).to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert again.requested == full(result.report).requested
    assert str(again) == str(full(result.report))
    assert json.loads(text, parse_constant=pytest.fail)["repair"]["pruned"]["loss"] == "nan"


def broken(report: Report, path: str, value: object) -> str:
    data = json.loads(report.to_json())
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at = data
    for step in steps:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "advice"),
    [
        ("format", 2, "its format 2 is not 1"),
        ("format", ..., "its format None is not 1"),
        ("model_class", 3, "Report.model_class is int, not str"),
        ("costs", ..., "lacks or does not know 'costs'"),
        ("more", 3, "lacks or does not know 'more'"),
        ("costs.macs", [], "is list, not a record"),
        ("costs.macs.before", "x", "is str, not int; .* is str, not float"),
        ("costs.macs.before", -1, "a cost is no number"),
        ("costs.macs.after", "nan", "a cost is no number"),
        ("costs.macs", ..., "a cost is missing"),
        ("measured", {"before": 1, "after": -1}, "a cost is no number"),
        ("layers.0.costs", {}, "a cost is missing"),
        ("groups", {}, "Report.groups is dict"),
        ("groups.0.before", True, r"Report.groups\[0\].before is bool, not int"),
        ("groups.0.after", 9, "a group grew"),
        ("groups.1.before", 0, "a group grew, or was empty"),
        ("groups.0.scores.kept", [], "a histogram has no bins"),
        ("groups.0.slots.1.to", 1, "a slot is tied to none before it"),
        ("groups.0.slots.1.through", [999], "an op is not among its ops"),
        ("stages.0.op", -1, "an op is not among its ops"),
        ("stages.0.reads", [99], "a call has no axes, or others"),
        ("stages.0", {"op": 0, "reads": [], "writes": []}, "a call has no axes"),
        ("unknown.0.nodes", [], "an unknown op has no nodes"),
        ("sensitivity.curves.stem.widths", [1], "a curve has no points"),
        ("repair.method", "prayer", "is str, not"),
        ("training.near_zero", [0.5], "a history has other records than steps"),
        ("training.groups.stem.sizes", [], "a history has other records than steps"),
        ("training.groups.stem.sizes.1", [0.5], "a record has not five sizes"),
        ("training.steps", [], "a history has other records than steps"),
        ("requested.macs", 2, "the fraction kept lies in"),
    ],
)
def test_what_is_no_report_is_refused(result, path, value, advice):
    with pytest.raises(gp.InputError, match=rf"not a report: .*{advice}.*write reports with to_json"):
        Report.from_json(broken(full(result.report), path, value))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", "[" * 100_000])
def test_other_text_is_refused(text):
    with pytest.raises(gp.InputError, match="not a report"):
        Report.from_json(text)


def test_fuzzed_reports_are_read_or_refused_and_what_is_read_can_be_shown(result):
    """Values anywhere in the JSON are swapped for others; nothing but our own error comes out."""
    text, rng, read = full(result.report).to_json(), random.Random(0), 0
    values = [None, True, -1, 0, 1, 7, 1e300, "nan", "", "x", [], {}, [[]], {"a": 1}]
    for _ in range(400):
        data = json.loads(text)
        at = data
        key: Any = rng.choice(list(data))
        for _ in range(rng.randint(1, 6)):
            if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.2:
                break
            at, keys = at[key], list(at[key]) if isinstance(at[key], dict) else list(range(len(at[key])))
            key = rng.choice(keys)
        at[key] = rng.choice(values)
        try:
            found = Report.from_json(json.dumps(data))
        except gp.InputError:
            continue
        read += 1
        for show in (str, Report.to_html, Report.to_markdown, Report.table, Report._repr_html_, Report.to_json):
            assert show(found)
    assert read > 20


def test_the_codec_refuses_what_it_has_no_word_for():
    with pytest.raises(ValueError, match="Slot is list, not a record"):
        decoded(Slot, [])
    assert decoded(Slot, {"name": "a", "dim": 1}) == Slot("a", 1)
    assert encoded(float("-inf")) == "-inf"


# -- forms ------------------------------------------------------------------------------------------------------------


def evil(report: Report) -> Report:
    """A report in which everything that comes from the user is hostile."""
    group = replace(
        report.groups[0],
        name=EVIL,
        cause=EVIL,
        criterion=EVIL,
        whole=EVIL,
        exactness="renormalised",
        slots=tuple(replace(s, name=EVIL) for s in report.groups[0].slots),
    )
    return replace(
        full(report),
        model_class=EVIL,
        groups=(group, *report.groups[1:]),
        pinned=(Pinned(EVIL, 3, 1, EVIL, EVIL), *report.pinned[1:]),
        layers=(*report.layers, Layer(EVIL, report.layers[0].costs)),
        ops=tuple(Op(EVIL, EVIL, EVIL, EVIL) for _ in report.ops),
        importance=EVIL,
        reason=EVIL,
        unused=(EVIL,),
        unknown=(gp.coupling.Unknown(EVIL, (EVIL,), EVIL),),
        sensitivity=Sensitivity(0.25, 8, {EVIL: Curve((EVIL,), 6, (2, 3), (1.5, -0.1))}),
        training=replace(HISTORY, penalty=EVIL, groups={EVIL: TRACK}),
    )


class Tags(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and what is in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "path", "rect", "circle", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.mark.parametrize("form", [Report.to_html, Report._repr_html_])
def test_html_is_well_formed_loads_nothing_and_runs_nothing_of_the_users(result, form):
    page = Tags(form(evil(result.report)))
    assert page.open == []
    assert "img" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "onerror", "onclick", "onload", "srcdoc", "action"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")


def test_the_page_forbids_itself_to_load_anything(result):
    page = result.report.to_html()
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in page
    assert "innerHTML" not in page


def test_the_data_of_the_page_is_what_the_report_holds(result):
    data, code = Tags(evil(result.report).to_html()).scripts
    found = json.loads(data)
    assert found["groups"][0][0] == EVIL
    assert found["ops"][0] == [EVIL] * 4
    assert [g[1:3] for g in found["groups"]] == [[w.before, w.after] for w in result.report.groups]
    assert code.startswith('"use strict"')


def test_hostile_names_come_out_as_text(result):
    text: list[str] = []

    class Words(HTMLParser):
        def handle_data(self, data):
            text.append(data)

    Words().feed(evil(result.report).to_html())
    assert sum(EVIL in words for words in text) > 8


def test_markdown_shows_hostile_names_as_they_are(result):
    page = evil(result.report).to_markdown()
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 6)
    outside = re.sub(r"(`+).*?\1", "", page)
    assert "<img" not in outside.replace("\\<", "")
    assert markdown.plain("a_b*") == "a\\_b\\*"


def test_markdown_counts_what_it_does_not_list(result):
    many = replace(result.report, groups=tuple(Width(f"g{k}", 2, 1, 1, "exact") for k in range(300)), stages=())
    page = many.to_markdown()
    assert "and 100 more" in page
    assert "`g199`" in page
    assert "`g200`" not in page


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, ("on 1 input (", "1 axis: it is so", "1 tensor, such as t0: the eval-mode forward does not read it, so it keeps its")),
        (2, ("on 2 inputs (", "2 axes: it is so", "2 tensors, such as t0: the eval-mode forward does not read them, so they keep")),
    ],
)  # fmt: skip
def test_what_is_one_is_told_of_as_one(result, count, words):
    report = replace(
        result.report,
        verification=replace(result.report.verification, inputs=count),
        pinned=(replace(result.report.pinned[0], reason="it is so"),) * count,
        unused=tuple(f"t{i}" for i in range(count)),
    )
    assert all(said in str(report) for said in words)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("", "graph"),
        ("the class does not fit", "graph because the class does not fit"),
        ("it stops: some error\nadvice that goes\non; and on", "graph because it stops: some error ..."),
        ("a word " * 50, "graph because " + "a word " * 42 + "a ..."),  # 294 characters and one more word
        ("x" * 400, "graph because " + "x" * 300 + " ..."),
    ],
)
def test_a_reason_is_shown_in_one_line_and_kept_whole(result, reason, shown):
    report = replace(result.report, emitter="graph", reason=reason)
    assert f"\n  emitted   {shown}\n" in str(report)
    assert shown in report.to_markdown()
    assert shown in report.to_html()
    assert Report.from_json(report.to_json()).reason == reason


def test_every_form_says_what_was_not_proved_or_not_done(result):
    report = replace(full(result.report), verification=None)
    for page in (str(report), report.to_markdown(), report.to_html()):
        assert "no (verify=False)" in page
        assert "roll" in page
        assert "aux.weight" in page
        assert "recurrent" in page
    weak = replace(result.report, verification=replace(result.report.verification, effect=0.0))
    assert "proves nothing" in str(weak)
    assert "class=weak" in weak.to_html()
    assert "class=good" in result.report.to_html()


def test_a_thousand_groups_make_a_page_of_bounded_size():
    net = nn.Sequential(*(m for _ in range(1000) for m in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3)).eval()
    report = gp.prune(net, torch.rand(2, 4), target=gp.Target(channels=0.5), verify=False).report
    assert len(report.groups) == 1000
    page = report.to_html()
    assert len(page) < 1_600_000
    assert page.count("<li data-a=") == 1000
    assert Tags(page).open == []
    assert len(report._repr_html_()) < 40_000
    assert "and 960 more groups" in report._repr_html_()


def test_a_report_is_written_as_its_suffix_says(result, tmp_path):
    report = result.report
    assert report.write(tmp_path / "r.html").read_text() == report.to_html()
    assert report.write(tmp_path / "r.md").read_text() == report.to_markdown()
    assert Report.from_json(report.write(str(tmp_path / "r.json")).read_text()) == report
    assert report.table() in report.write(tmp_path / "r.TXT").read_text()
    with pytest.raises(gp.InputError, match=r"a report is written as .html, .md, .json, .txt; 'r.pdf' ends in none"):
        report.write(tmp_path / "r.pdf")
    assert len(list(tmp_path.iterdir())) == 4


def test_times_are_shown_in_milliseconds(result):
    costs = {**result.report.costs, "latency": Change(12_345_600, 6_123_450), "energy": Change(0.0123456, 0.01)}
    report = replace(result.report, costs=costs, measured=Change(13_000_000, 6_500_000))
    assert "         12.346 ->           6.123  (0.496 kept, ms predicted)" in str(report)
    assert "         13.000 ->           6.500  (0.500 kept, ms measured)" in str(report)
    for page in (report.to_markdown(), report.to_html()):
        assert all(figure in page for figure in ("12.346 ms", "6.123 ms", "13.000 ms", "6.500 ms", "0.01235"))
    assert Report.from_json(report.to_json()) == report


def test_a_report_of_no_scores_is_shown(result):
    bare = replace(
        result.report,
        importance="",
        allocation="",
        groups=tuple(replace(w, scores=None, slots=()) for w in result.report.groups),
        layers=(),
        stages=(),
        ops=(),
        pinned=(),
    )
    assert "requested <b>channels 0.5</b></p>" in bare.to_html()
    assert "Coupling" not in bare.to_html().split("<script")[0]
    assert "scored" not in str(bare)
    assert "not at all" not in bare.to_markdown()


# -- sparse training --------------------------------------------------------------------------------------------------


def test_every_form_says_how_a_penalty_shrank_the_channels(result):
    report = result.report.with_training(HISTORY)
    for page in (str(report), report.to_markdown(), report.to_html()):
        assert "with Slimming for 200 steps: 0.00 " in page
        assert " 0.25 of the channels near zero" in page
    drawn = report.to_html().split('<section id="training">')[1].split("</section>")[0]
    assert re.findall("<figcaption><code>([^<]*)<", drawn) == ["near zero, of all channels", "stem", "inner"]
    assert 'id="training"' not in result.report.to_html()


def test_sizes_are_drawn_on_a_logarithmic_scale_down_to_what_is_near_zero():
    assert TRACK.bounds == (pytest.approx(5e-4), 0.6)
    panel = charts.training(HISTORY).split("<figure>")[2]
    outer, inner = re.findall(r'<polygon class="\w+" points="([^"]*)"', panel)
    (zero,) = re.findall(r'class="cut" points="0.0,(\S+) 200,', panel)
    top = 90 * (1 - np.log(0.5 / 5e-4) / np.log(0.6 / 5e-4))
    assert outer.split() == [f"0.0,{top:.1f}", "200.0,0.0", "200.0,90.0", f"0.0,{top:.1f}"]
    assert inner.split()[2] == "200.0,90.0"
    assert float(zero) == pytest.approx(90 * (1 - np.log(10) / np.log(1200)), abs=0.1)


@pytest.mark.parametrize(
    ("near", "size"), [(0.0, 0.0), (0.0, 2.0), (5.0, 2.0), (0.1, float("nan")), (1.0, float("inf"))]
)
def test_sizes_that_have_no_logarithm_are_drawn(near, size):
    track = Track(near, ((size,) * 5, (size,) * 5))
    low, high = track.bounds
    assert 0 < low < high < float("inf")
    assert "nan" not in charts.training(replace(HISTORY, groups={"a": track}))


def test_of_many_groups_the_page_says_how_many_are_not_drawn():
    many = replace(HISTORY, groups={f"g{k}": TRACK for k in range(30)})
    assert "6 more groups are not drawn" in charts.training(many)
    assert charts.training(many).count("<figure>") == 25


# -- the drawing ------------------------------------------------------------------------------------------------------


def test_lanes_that_are_in_use_at_once_are_apart_and_free_ones_are_used_again():
    stages = [
        Stage(0, (9,), (0,)),  # a stream that stays
        Stage(0, (0,), (1,)),
        Stage(0, (1,), (0,)),
        Stage(0, (0,), (2,)),
        Stage(0, (2,), (0,)),
    ]
    found = {lane.axis: lane for lane in lanes(stages)}
    assert found[0].column == 0
    assert found[1].column == found[2].column == 1
    assert (found[0].first, found[0].last, found[0].made, found[0].ended) == (0, 4, True, False)
    assert (found[9].made, found[9].ended) == (False, True)


def test_lanes_never_overlap():
    rng = random.Random(0)
    for _ in range(50):
        stages = [Stage(0, tuple(rng.sample(range(12), 2)), (rng.randrange(12),)) for _ in range(20)]
        found = lanes(stages)
        assert {lane.axis for lane in found} == {a for s in stages for a in (*s.reads, *s.writes)}
        for a in found:
            for b in found:
                apart = a.last < b.first or b.last < a.first
                assert a is b or a.column != b.column or apart


def test_a_call_with_many_axes_is_one_straight_line():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(3, 4) for _ in range(FAN + 2))
            self.head = nn.Linear(4 * (FAN + 2), 2)

        def forward(self, x):
            return self.head(torch.cat([torch.relu(part(x)) for part in self.parts], 1))

    report = gp.prune(Wide().eval(), torch.rand(2, 3), target=gp.Target(channels=0.5)).report
    page = report.to_html()
    (line,) = re.findall(r'<path class="l" d="(M\d+ \d+H[^"]*)"', page)
    assert line.count("V") == FAN + 3
    assert len(re.findall(r'<path class="l"', page)) == FAN + 3


def test_long_names_lose_their_middle():
    assert cut("a" * LETTERS) == "a" * LETTERS
    assert len(cut("a" * 30 + "b" * 30)) == LETTERS
    assert cut("a" * 30 + "b" * 30).startswith("aaa")


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_need_matplotlib(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(gp.InputError, match="plot needs matplotlib: pip install"):
        result.report.plot()
    with pytest.raises(gp.InputError, match="plot needs matplotlib: pip install"):
        HISTORY.plot()


@pytest.mark.filterwarnings("default")  # of matplotlib and what it stands on
def test_a_history_is_a_figure_by_itself():
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    share, stem, inner = [axes for axes in HISTORY.plot().axes if axes.has_data()]
    assert list(share.lines[0].get_ydata()) == [0.0, 0.25]
    assert (stem.get_yscale(), stem.get_title(), inner.get_title()) == ("log", "stem", "inner")
    assert list(stem.lines[0].get_ydata()) == [0.5, 0.1]


@pytest.mark.filterwarnings("default")  # of matplotlib and what it stands on
def test_figures_show_what_the_report_holds(result, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    found = evil(result.report).plot()
    assert set(found) == {"totals", "widths", "layers", "scores", "sensitivity", "training"}
    bars = [bar.get_width() for bar in found["widths"].axes[0].patches]
    assert bars == [w.before for w in result.report.groups] + [w.after for w in result.report.groups]
    assert len([a for a in found["scores"].axes if a.has_data()]) == len(result.report.groups)
    for name, figure in found.items():
        figure.savefig(tmp_path / f"{name}.png")
    assert set(result.report.plot()) == set(found) - {"sensitivity", "training"}
    bare = replace(result.report, layers=(), groups=())
    assert set(bare.plot()) == {"totals"}
    many = replace(result.report, groups=tuple(Width(f"g{k}", k + 2, 1, 1, "exact") for k in range(100)))
    axes = many.plot()["widths"].axes[0]
    assert axes.get_xlabel() == "channels (the largest 60 of 100)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"g{k}" for k in range(40, 100)]

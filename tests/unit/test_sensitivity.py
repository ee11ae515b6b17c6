"""Scans of what each group is worth to the loss, against explicit masks and against models that were really pruned."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.files import fingerprint
from graphprune.sensitivity.curves import Curve, Sensitivity
from graphprune.trace import held
from tests.nets import CifarResNet, TinyViT, UNet, randomised
from tests.unit.test_iterative import net

torch.manual_seed(0)
BATCHES = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))), (torch.randn(3, 3, 8, 8), torch.randint(0, 5, (3,)))]
X = BATCHES[0][0][:2]


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def scan(model, given=X, batches=BATCHES, loss=F.cross_entropy, **options):
    return gp.sensitivity(model, given, batches, loss, **options)


def mean_loss(model, batches=BATCHES, loss=F.cross_entropy):
    with torch.no_grad():
        total = sum(float(loss(model(x), y)) * len(x) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


# -- what is measured ----------------------------------------------------------------------------------------------


def test_increases_are_those_of_explicit_masks():
    model = net().double()
    batches = [(x.double(), y) for x, y in BATCHES]
    before = fingerprint(held(model))
    found = scan(model, X.double(), batches, fractions=(0.3, 0.8))
    assert (found.samples, found.loss) == (7, pytest.approx(mean_loss(model, batches), rel=1e-12))
    scores = gp.importance.Magnitude()(model, gp.couple(gp.trace(model, X.double())))
    readers = {"0": model[3], "3": model[7], "7": model[9]}
    assert found.curves.keys() == readers.keys()
    for name, reader in readers.items():
        curve = found.curves[name]
        assert (curve.groups, curve.size) == ((name,), len(scores[name]))
        assert curve.widths == (round(0.3 * curve.size), round(0.8 * curve.size))
        for width, increase in zip(curve.widths, curve.increases, strict=True):
            mask = torch.zeros(curve.size, dtype=torch.float64)
            mask[scores[name].argsort(descending=True)[:width]] = 1
            mask = mask.view((-1, 1, 1) if isinstance(reader, nn.Conv2d) else (-1,))
            hook = reader.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,))
            want = mean_loss(model, batches) - found.loss
            hook.remove()
            assert increase == pytest.approx(want, rel=1e-9)
            assert abs(want) > 1e-6
    assert fingerprint(held(model)) == before


def dense_loss(output, target):
    return F.cross_entropy(output.mean((2, 3)), target % 2)


@pytest.mark.parametrize(
    ("build", "loss", "norms"),
    [(TinyViT, F.cross_entropy, "prune"), (TinyViT, F.cross_entropy, "pin"), (UNet, dense_loss, "pin")],
    ids=["vit-renormalised", "vit", "unet"],
)
def test_increases_are_those_of_models_without_the_channels(build, loss, norms):
    torch.manual_seed(0)
    model = randomised(build()).double()
    batches = [(x.double(), y) for x, y in BATCHES]
    coupling = gp.couple(gp.trace(model, X.double()), norms=norms)
    assert any(g.exactness == "renormalised" for g in coupling.groups) == (norms == "prune")
    found = scan(model, coupling, batches, loss, fractions=(0.5,))
    assert len(found.curves) == len(coupling.groups) > 2
    scores = gp.importance.Magnitude()(model, coupling)
    for name, curve in found.curves.items():
        plan = gp.Plan.of(coupling, {name: gp.importance.ordered(scores[name]).keep(curve.widths[0])})
        small = gp.rewrite(model, X.double(), coupling, plan).model
        assert found.loss + curve.increases[0] == pytest.approx(mean_loss(small, batches, loss), rel=1e-9)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def act(self, x):
        return x.relu()

    def forward(self, x):
        return self.b(self.act(self.norm(self.a(x))))


class Guarded(Plain):
    """Goes another way without values than with them."""

    def act(self, x):
        return x.sigmoid() if x.is_meta else x.relu()


def test_a_model_that_runs_otherwise_than_it_was_recorded_runs_as_its_exported_program():
    torch.manual_seed(0)
    odd, plain = randomised(Guarded()), randomised(Plain())
    plain.load_state_dict(odd.state_dict())
    batches = [(torch.randn(n, 3), torch.randint(0, 5, (n,))) for n in (4, 4, 3)]
    one, other = (scan(m, gp.couple(gp.trace(m, torch.randn(2, 3)), norms="prune"), batches) for m in (odd, plain))
    assert one.curves["a"].increases == pytest.approx(other.curves["a"].increases, rel=1e-5)
    assert min(map(abs, one.curves["a"].increases)) > 1e-3


def test_alike_groups_are_cut_together():
    model = randomised(CifarResNet(3))
    coupling = gp.couple(gp.trace(model, X))
    alone = scan(model, coupling, fractions=(0.5,), groups=["layer[12].*.conv1"])
    together = scan(model, coupling, fractions=(0.5,), groups=["layer[12].*.conv1"], by="class")
    assert len(alone.curves) == 6
    assert {n: c.groups for n, c in together.curves.items()} == {
        f"layer{k}.*.conv1": tuple(f"layer{k}.{n}.conv1" for n in range(3)) for k in (1, 2)
    }
    curve = together.curves["layer1.*.conv1"]
    scores = gp.importance.Magnitude()(model, coupling)
    keep = {name: gp.importance.ordered(scores[name]).keep(8) for name in curve.groups}
    small = gp.rewrite(model, X, coupling, gp.Plan.of(coupling, keep)).model
    assert together.loss + curve.increases[0] == pytest.approx(mean_loss(small), rel=1e-4)
    assert torch.allclose(3 * curve.lost()[8], torch.tensor(max(0, curve.increases[0]), dtype=torch.float64))
    sizes = scan(net(), groups=["0", "3", "7"], by="class", fractions=(0.5,))
    assert [*sizes.curves] == ["* (16)", "* (24)", "* (20)"]


# -- what it is for ------------------------------------------------------------------------------------------------


def test_losses_between_what_was_measured_are_lines_that_rise():
    curve = Curve(("a", "b"), 8, (2, 4, 6), (6.0, 1.0, -0.5))
    assert (2 * curve.lost()).tolist() == [11, 8.5, 6, 3.5, 1, 0.5, 0, 0, 0]
    dent = Curve(("a",), 4, (1, 2), (1.0, 3.0))
    assert dent.lost().tolist() == [3, 3, 3, 1.5, 0]


def test_a_scan_is_an_importance_with_the_order_of_another():
    model = net()
    coupling = gp.couple(gp.trace(model, X))
    found = scan(model, coupling, groups=["0", "7"])
    scores = found.importance(gp.importance.FPGM())(model, coupling)
    own = gp.importance.FPGM()(model, coupling)
    assert scores.keys() == {"0", "7"}
    for name, order in scores.items():
        curve = found.curves[name]
        assert order.size == curve.size == len(order.lost) - 1
        assert order.keep(5) == gp.importance.ordered(own[name]).keep(5)
        assert order.lost[curve.size] == 0
        assert order.lost[curve.widths[0]] == max(0, *curve.increases)
        assert (order.lost.diff() <= 0).all()
    result = gp.prune(model, X, target=gp.Target(channels=0.5), importance=found.importance())
    assert [width.after for width in result.report.groups] == [8, 24, 10]


def test_a_scan_is_json_and_text():
    found = scan(net())
    again = Sensitivity.from_json(found.to_json())
    assert (again.loss, again.samples, again.curves) == (found.loss, found.samples, found.curves)
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith(found.worst_first()[0][0])
    for text, told in (("{", "JSONDecodeError"), ("{}", "KeyError"), ('{"format": 1, "loss": 1, "samples": 2, "curves": [1]}', "AttributeError")):  # fmt: skip
        with pytest.raises(gp.InputError, match=f"not a scan: {told}.*write scans with to_json"):
            Sensitivity.from_json(text)
    with pytest.raises(gp.InputError, match="scan format 2 is not 1"):
        Sensitivity.from_json('{"format": 2}')


class Axes:
    """Notes what is drawn."""

    def __init__(self):
        self.lines, self.calls = [], []

    def plot(self, x, y, **options):
        self.lines.append((x, y, options["label"]))

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


def test_a_plot_has_a_line_per_curve(monkeypatch):
    curves = {f"g{k}": Curve((f"g{k}",), 4, (1, 2), (float(k), 0.5)) for k in range(12)}
    current = Axes()
    pyplot = SimpleNamespace(gca=lambda: current)
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    found = Sensitivity(1.0, 2, curves)
    assert found.plot() is current
    assert current.lines[0] == ([0.25, 0.5, 1.0], [11.0, 0.5, 0.0], "g11")
    assert [label for *_, label in current.lines][-3:] == ["g2", None, None]
    assert ("set_xlabel", "fraction kept") in current.calls
    assert found.plot(other := Axes()) is other
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(gp.InputError, match="plot needs matplotlib: pip install"):
        found.plot()


# -- going on ------------------------------------------------------------------------------------------------------


def counting(calls):
    def loss(output, target):
        calls.append(1)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    limit = 12
    return loss


def test_a_scan_that_was_stopped_goes_on(tmp_path):
    model = net()
    whole = scan(model)
    with pytest.raises(KeyboardInterrupt):
        scan(model, loss=counting([]), directory=tmp_path)
    done = len(json.loads((tmp_path / "sensitivity.json").read_text())["losses"])
    assert 0 < done < 9
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target)

    resumed = scan(model, loss=loss, directory=tmp_path)
    assert resumed.curves == whole.curves
    assert len(calls) == 2 + 2 + 2 * (9 - done)  # that of the whole model, whether it is a mean, and the rest
    other = scan(model, directory=tmp_path, importance=gp.importance.Random())
    assert other.curves == scan(model, importance=gp.importance.Random()).curves  # other channels stay


def test_files_of_another_scan_are_refused(tmp_path):
    model = net()
    scan(model, directory=tmp_path)
    path = tmp_path / "sensitivity.json"
    for changed in ({"batches": BATCHES[:1]}, {"loss": lambda o, t: 2 * F.cross_entropy(o, t)}):
        with pytest.raises(gp.InputError, match=r"is of another model, loss or batches: .*pass another directory"):
            scan(model, directory=tmp_path, **changed)
    for text in (path.read_text()[:50], "[]", '{"loss": 1, "samples": 7}'):
        path.write_text(text)
        with pytest.raises(gp.InputError, match=r"sensitivity.json cannot be read .*delete it to scan anew"):
            scan(model, directory=tmp_path)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"by": "layer"}, gp.InputError, "by='layer'; it is 'group' or 'class'"),
        ({"fractions": ()}, gp.InputError, r"fractions=\(\): fractions of the channels that stay"),
        ({"fractions": (0.5, 1.0)}, gp.InputError, "between 0 and 1"),
        ({"fractions": (50,)}, gp.InputError, "between 0 and 1"),
        ({"groups": "0"}, gp.InputError, "groups='0': pass a list, even of one"),
        ({"groups": []}, gp.InputError, "there are no groups to scan"),
        ({"groups": ["0", "8"]}, gp.UnknownName, "no group fits '8'"),
        ({"batches": iter(BATCHES)}, gp.InputError, "an iterator, which is used up"),
        (
            {"importance": lambda m, c: {"0": torch.ones(16)}},
            gp.CriterionError,
            "has no scores for group '3'; leave it out",
        ),
        ({"loss": lambda o, t: o}, gp.CalibrationError, "the loss has shape"),
    ],
)
def test_what_cannot_be_used_is_refused(options, error, told):
    with pytest.raises(error, match=told):
        scan(net(), **options)


def test_models_without_values_or_groups_are_refused():
    with pytest.raises(gp.InputError, match="on the meta device and has no values"):
        scan(net().to("meta"))
    with pytest.raises(gp.InputError, match="there are no groups to scan"):
        scan(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


def test_a_scan_of_another_model_is_no_importance():
    model = net()
    found = scan(model)
    small = gp.prune(model, X, target=gp.Target(channels=0.5)).model
    with pytest.raises(gp.InputError, match="group '0' has 8 channels and had 16 when it was scanned; scan this model"):
        gp.prune(small, X, target=gp.Target(channels=0.5), importance=found.importance())
    with pytest.raises(gp.UnknownName, match="no group '0'"):
        gp.prune(CifarResNet(1), X, target=gp.Target(channels=0.5), importance=found.importance())
    with pytest.raises(gp.CriterionError, match="function has no scores for group '0'"):
        gp.prune(model, X, target=gp.Target(channels=0.5), importance=found.importance(lambda m, c: {}))

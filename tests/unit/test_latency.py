"""Latency: predicted from times of single calls, here made up, so that what is predicted can be known."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.allocate import METHODS
from graphprune.cost import COSTS, widths
from graphprune.latency import Latency, clock
from graphprune.latency.store import Store, file_of, identity
from graphprune.latency.table import LEVELS, Variable, block, build, steps_of
from tests.nets import Attention, CifarResNet, DenseBlock, UNet

BLOCK = block(torch.device("cpu"))


def even(call):
    """Seconds that rise evenly with every size: elements of all tensors, and multiply-adds."""
    shapes = [o.shape for o in call.operands()]
    seconds = 1e-6 + 1e-9 * sum(map(math.prod, shapes))
    if "conv" in str(call.op):
        return seconds + 1e-9 * math.prod(shapes[1])
    if "linear" in str(call.op):
        return seconds + 1e-9 * math.prod(shapes[1][-2:]) * shapes[0][0]
    return seconds


def stepped(call):
    """The same for whole blocks of channels."""
    shapes = [o.shape for o in call.operands()]
    if "linear" not in str(call.op):
        return 1e-9
    (batch, i), (o, _) = shapes[:2]
    return 1e-9 * batch * math.ceil(i / BLOCK) * math.ceil(o / BLOCK)


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, and a linear layer over flattened maps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.grouped = nn.Conv2d(24, 40, 3, groups=4)
        self.linear = nn.Linear(64 * 4, 7)

    def forward(self, x):
        x = torch.relu_(self.first(x))
        x = torch.cat([self.depthwise(x), self.grouped(x)], 1)
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


NETS = {
    "residual": (lambda: CifarResNet(2), (1, 3, 32, 32)),
    "dense": (lambda: DenseBlock(8), (1, 3, 8, 8)),
    "attention": (lambda: nn.Sequential(Attention(), Attention()), (2, 7, 30)),
    "u-net": (lambda: UNet(), (1, 3, 32, 32)),
    "grouped": (Grouped, (2, 3, 9, 9)),
}


def mlp(*sizes):
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def predicted(model, x, measure=even, **options):
    coupling = gp.couple(gp.trace(model, x))
    return coupling, Latency(measure=measure, **options)(model, x, coupling)


def random_plan(coupling, seed):
    rng = np.random.default_rng(seed)
    keep = {g.name: int(rng.integers(max(2, g.size // 4), g.size + 1)) for g in coupling.groups}
    return gp.Plan.of(coupling, {name: range(width) for name, width in keep.items()})


@pytest.mark.parametrize("net", NETS)
def test_a_plan_takes_what_the_calls_of_the_smaller_model_take(net):
    torch.manual_seed(0)
    build, shape = NETS[net]
    model, x = build().eval(), torch.rand(shape)
    coupling, cost = predicted(model, x)
    assert len(cost.parts) > 2
    for seed in range(3):
        plan = random_plan(coupling, seed)
        small = gp.rewrite(model, x, coupling, plan, emit="graph").model
        truth = predicted(small, x)[1]
        assert truth.at({}) < cost.at({})
        # a padding takes time for the widths before and after it, which one number, their sum, does not tell apart
        assert cost.at(widths(plan)) == pytest.approx(truth.at({}), rel=5e-3 if net == "residual" else 1e-4)


def test_gradients_are_the_derivatives_of_the_prediction():
    model, x = NETS["residual"][0]().eval(), torch.rand(1, 3, 32, 32)
    coupling, cost = predicted(model, x)
    assert all(step == 1 for part in cost.parts for step in part.table.steps)
    at = np.array([0.63 * g.size + 0.1 for g in coupling.groups])
    numeric = [(cost.of(at + e) - cost.of(at - e)) / 2e-3 for e in np.eye(len(at)) * 1e-3]
    assert np.allclose(cost.gradient(at), numeric, rtol=1e-5)


def test_steps_are_found_and_a_width_that_fills_no_block_takes_what_the_next_block_takes():
    model, x = mlp(5, 4 * BLOCK, 8 * BLOCK, 7), torch.rand(3, 5)
    _, cost = predicted(model, x, stepped)
    middle = [part for part in cost.parts if len(part.variables) == 2]
    assert [part.table.steps for part in middle] == [(BLOCK, BLOCK)]
    for first, second in ((BLOCK + 1, 3 * BLOCK), (2 * BLOCK, 5 * BLOCK - 3), (4 * BLOCK, 8 * BLOCK)):
        whole = {"0": -(-first // BLOCK) * BLOCK, "2": -(-second // BLOCK) * BLOCK}
        assert cost.of(np.array([first, second])) == pytest.approx(cost.of(np.array(list(whole.values()))))
    assert cost.of(np.array([2 * BLOCK, 4 * BLOCK])) < 0.5 * cost.of(np.array([4 * BLOCK, 8 * BLOCK]))


def test_a_block_that_is_not_full_may_take_longer_than_one_that_is():
    def slower(call):
        odd = any(size % BLOCK for o in call.operands() if o.weight and len(o.shape) == 2 for size in o.shape[:1])
        return stepped(call) * (1.5 if odd else 1.0)

    _, cost = predicted(mlp(5, 4 * BLOCK, 5), torch.rand(3, 5), slower)
    full, unfilled = cost.of(np.array([2.0 * BLOCK])), cost.of(np.array([2.0 * BLOCK - 1]))
    assert full < unfilled <= 1.5 * full


def test_blocks_within_groups_of_channels_are_found_and_even_times_are_not_taken_for_steps():
    def seconds(point):
        groups, channels = point
        return 1e-3 * groups * -(-channels // 8)

    variables = [Variable((), 8), Variable((), 16)]
    assert steps_of(seconds, variables, 16) == [1, 8]
    assert steps_of(lambda point: 1e-3 * point[0] * point[1], variables, 16) == [1, 1]
    assert steps_of(seconds, [Variable((), 8), Variable((), 7)], 16) == [1, 1]  # too few to tell
    found = build(seconds, (8, 16), (1, 8), LEVELS[0])
    assert found.knots[1].tolist() == [8, 16]


def test_widths_that_save_no_time_are_passed_over():
    model, x = mlp(5, 4 * BLOCK, 8 * BLOCK, 7), torch.rand(3, 5)
    coupling, cost = predicted(model, x, stepped)
    every = np.arange(1.0, 8 * BLOCK + 1)
    found = every[cost.worthwhile([1], every)]
    assert set(found) == {1.0, *(k * BLOCK for k in range(1, 9))}
    assert predicted(model, x, even)[1].worthwhile([1], every).mean() > 0.9
    scores = gp.importance.Magnitude()(model, coupling)
    for method in METHODS:
        kept = widths(gp.allocate(scores, gp.Target(latency=0.5), coupling, method=method, latency=cost))
        assert all(w % BLOCK == 0 or w == 1 for w in kept.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", ["residual", "dense", "attention"])
def test_a_latency_is_kept_together_with_other_budgets_and_limits(net, method):
    torch.manual_seed(0)
    build, shape = NETS[net]
    model, x = build().eval(), torch.rand(shape)
    coupling, cost = predicted(model, x)
    scores = gp.importance.Magnitude(normalize="mean")(model, coupling)
    for target in (gp.Target(latency=0.7), gp.Target(latency=0.8, params=0.7), gp.Target(latency=0.8, multiple_of=2)):
        kept = widths(gp.allocate(scores, target, coupling, method=method, latency=cost))
        shares = {"latency": cost.at(kept) / cost.at({})}
        shares["params"] = COSTS["params"](coupling).at(kept) / COSTS["params"](coupling).at({})
        assert all(shares[name] <= value + 1e-3 for name, value in target.budgets.items())
        assert max(shares[name] - value for name, value in target.budgets.items()) > -0.1
        assert all(w % target.multiple_of == 0 or w == coupling.group(n).size for n, w in kept.items())


def test_prune_meets_a_latency_and_reports_it():
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    target = gp.Target(latency=0.6)
    result = gp.prune(model, x, target=target, allocation="greedy", latency=Latency(measure=even))
    change = result.report.costs["latency"]
    assert 0.5 < change.kept <= 0.61
    assert "requested latency 0.6" in str(result.report)
    assert f"{change.after / 1e6:.3f}  ({change.kept:.3f} kept, ms predicted)" in str(result.report)
    assert result.report.measured is None
    assert "latency" not in gp.prune(model, x, target=gp.Target(macs=0.6)).report.costs


def test_prune_iteratively_meets_a_latency_of_the_original():
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    options = {"target": gp.Target(latency=0.5), "allocation": "greedy", "latency": Latency(measure=even)}
    result = gp.prune_iteratively(model, x, steps=2, **options)
    kept = [report.costs["latency"].kept for report in result.reports]
    assert kept[1] <= 0.51 < kept[0] <= 0.76
    assert len({report.costs["latency"].before for report in result.reports}) == 1


class Otherwise(nn.Module):
    """Runs another op without values than with them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 64), nn.Linear(64, 7)

    def forward(self, x):
        x = self.first(x)
        return self.second(x.tanh() if x.is_meta else x.relu())


def test_a_model_that_does_not_run_as_it_was_recorded_is_exported():
    model, x = Otherwise().eval(), torch.rand(3, 5)
    ops = set()
    coupling, cost = predicted(model, x, lambda call: ops.add(call.op._schema.name) or even(call))
    assert any(node.op == "tanh" for node in coupling.program.nodes)
    assert ops == {"aten::linear", "aten::relu"}
    assert list(cost.atoms) == [group.name for group in coupling.groups]
    assert cost.at({"first": 32}) < cost.at({})


def test_less_time_means_fewer_measurements():
    model, x = CifarResNet(2).eval(), torch.rand(1, 3, 32, 32)
    counts = []
    for seconds in (0.0, 1.0, 1e6):
        calls = []
        _, cost = predicted(model, x, lambda call, calls=calls: calls.append(call) or even(call), seconds=seconds)
        counts.append(len(calls))
        assert len({call.key for call in calls}) == len(calls)
        assert cost.at({}) > 0
    assert counts[0] < counts[1] < counts[2]


def test_a_call_whose_sizes_depend_on_each_other_is_measured_at_one_fraction_of_all_groups():
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)

    def refusing(call):
        shapes = [o.shape for o in call.operands()]
        if "linear" in str(call.op) and 5 not in shapes[0] and 7 not in shapes[1] and 2 * shapes[0][1] != shapes[1][0]:
            raise RuntimeError("sizes do not fit")
        return even(call)

    cost = predicted(model, x, refusing)[1]
    assert max(len(part.variables) for part in cost.parts) == 1
    assert cost.at({"0": 32, "2": 64}) < cost.at({})


def test_a_real_device_is_measured_calibrated_and_compared(tmp_path):
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    latency = Latency(cache=tmp_path, seconds=0.5, progress=False)
    result = gp.prune(model, x, target=gp.Target(latency=1.0), latency=latency)
    assert result.report.costs["latency"].kept == 1
    assert result.report.costs["latency"].before > 0
    assert min(result.report.measured.before, result.report.measured.after) > 0
    assert "kept, ms measured)" in str(result.report)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# -- the cache ---------------------------------------------------------------------------------------------------


def counted(monkeypatch, stop=10**9):
    """Real measurements replaced by made-up ones, which are counted, and interrupted after some."""
    calls = []

    def measure(self, call):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(call.key)
        return even(call)

    monkeypatch.setattr(clock.Stopwatch, "__call__", measure)
    return calls


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    coupling = gp.couple(gp.trace(model, x))
    latency = Latency(cache=tmp_path, progress=False)
    calls = counted(monkeypatch)
    latency(model, x, coupling)
    first = len(calls)
    assert first > 10
    latency(model, x, coupling)
    assert len(calls) == first
    Latency(cache=False, progress=False)(model, x, coupling)
    assert len(calls) == 2 * first


def test_an_interrupted_measurement_leaves_what_it_found(tmp_path, monkeypatch):
    model, x = mlp(5, 64, 128, 7), torch.rand(3, 5)
    coupling = gp.couple(gp.trace(model, x))
    latency = Latency(cache=tmp_path, progress=False)
    counted(monkeypatch, stop=9)
    with pytest.raises(KeyboardInterrupt):
        latency(model, x, coupling)
    (file,) = tmp_path.iterdir()
    before = set(json.loads(file.read_text())["seconds"])
    assert len(before) == 9
    again = counted(monkeypatch)
    latency(model, x, coupling)
    assert again
    assert not before & set(again)


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": {"a": "b"}}', '{"seconds": {}, "device": "another"}'])
def test_a_damaged_or_foreign_file_is_written_anew_with_a_warning(tmp_path, text):
    known = identity(torch.device("cpu"))
    path = file_of(tmp_path, known)
    path.write_text(text)
    with pytest.warns(UserWarning, match="holds no times for this device, it is written anew"):
        store = Store(even, path, known)
    assert store.known == {}


def test_two_processes_keep_what_either_measured(tmp_path):
    known = identity(torch.device("cpu"))
    path = file_of(tmp_path, known)
    stores = [Store(even, path, known) for _ in range(2)]
    for key, store in zip("ab", stores, strict=True):
        store.known[key], store.measured = 1.0, 1
        store.write()
    assert Store(even, path, known).known == {"a": 1.0, "b": 1.0}


def test_a_folder_that_goes_away_costs_what_it_would_have_kept_and_no_more(tmp_path):
    known = identity(torch.device("cpu"))
    store = Store(even, file_of(tmp_path / "folder", known), known)
    store.known["a"], store.measured = 1.0, 1
    (tmp_path / "folder").rmdir()
    with pytest.warns(UserWarning, match="could not be kept"):
        store.write()
    assert store.known == {"a": 1.0}


def test_the_file_depends_on_threads_and_is_in_the_users_folder_for_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = identity(torch.device("cpu"))
    assert file_of(None, known).parent == tmp_path / "graphprune" / "latency"
    assert file_of(None, known) != file_of(None, known | {"threads": 64})


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(tmp_path):
    model, x = mlp(5, 64, 7), torch.rand(3, 5)
    coupling = gp.couple(gp.trace(model, x))
    with pytest.raises(gp.InputError, match="cannot be timed, it is not there"):
        Latency(device="cuda:97")(model, x, coupling)
    with pytest.raises(gp.InputError, match="cannot be timed, it is not there"):
        Latency(device="no such device")(model, x, coupling)
    with pytest.raises(gp.InputError, match="name the device the model will run on"):
        Latency(device="meta")(model, x, coupling)
    with pytest.raises(gp.InputError, match="load weights first"):
        Latency()(mlp(5, 64, 7).to("meta"), x, coupling)
    (tmp_path / "file").write_text("")
    with pytest.raises(gp.InputError, match=r"pass gp.Latency\(cache=...\) another folder, or cache=False"):
        Latency(cache=tmp_path / "file" / "folder")(model, x, coupling)
    with pytest.raises(gp.InputError, match="seconds=-1: how long may be measured"):
        Latency(seconds=-1)
    with pytest.raises(gp.InputError, match="seconds='1': how long may be measured"):
        Latency(seconds="1")


def test_a_target_needs_a_prediction_and_a_prediction_is_no_target():
    model, x = mlp(5, 64, 7), torch.rand(3, 5)
    coupling = gp.couple(gp.trace(model, x))
    scores = gp.importance.Magnitude()(model, coupling)
    with pytest.raises(gp.InputError, match=r"pass allocate\(..., latency=gp.Latency\(\)\(model, inputs, coupling\)\)"):
        gp.allocate(scores, gp.Target(latency=0.5), coupling)
    for wrong in (0.7, Latency):
        with pytest.raises(gp.InputError, match="how much of it is kept goes into the target"):
            gp.prune(model, x, target=gp.Target(latency=0.5), latency=wrong)
    with pytest.raises(gp.TargetError, match=r"latency=0.001 cannot be reached: at least 0"):
        gp.prune(model, x, target=gp.Target(latency=0.001), latency=Latency(measure=even))
    with pytest.raises(gp.TargetError, match="the fraction kept lies in"):
        gp.Target(latency=1.5)

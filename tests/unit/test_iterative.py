"""Pruning in steps: what each step gets, where the last one ends, and how a run goes on that was stopped."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cost import COSTS, widths
from graphprune.files import fingerprint, write_whole
from graphprune.iterative.lineage import Lifted
from graphprune.iterative.schedule import targets
from graphprune.trace import held
from tests.nets import CifarResNet, TinyViT, UNet, randomised
from tests.unit.test_migrate import conv_net, grafted_net

torch.manual_seed(0)
X, Y = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def net():
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)),
        )
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def training(step, count=3):
    """A few steps of gradient descent, always the same ones."""
    step.model.train()
    for _ in range(count):
        step.optimizer.zero_grad()
        F.cross_entropy(step.model(X), Y).backward()
        step.optimizer.step()
    step.model.eval()


def chain(plans):
    """Kept positions of each tensor, from one plan after the other, each of the model before it."""
    kept = {}
    for plan in plans:
        for name, dims in plan.kept.items():
            for dim, positions in dims.items():
                at = kept.setdefault(name, {})
                at[dim] = at[dim][positions] if dim in at else positions
    return kept


def same(a, b):
    assert a.keys() == b.keys()
    for name, dims in a.items():
        assert dims.keys() == b[name].keys()
        assert all(torch.equal(positions, b[name][dim]) for dim, positions in dims.items())


# -- where it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("schedule", ["linear", "exponential", lambda t: 1 - (1 - t) ** 3])
def test_the_last_step_ends_where_one_step_would_and_none_overshoots(quantity, schedule):
    model, seen = net(), []
    options = {"verify": False, "emit": "module"}

    def train(step):
        seen.append(step)
        shaken(step)

    target = gp.Target(**{quantity: 0.37})
    result = gp.prune_iteratively(model, X, target=target, steps=4, schedule=schedule, train=train, **options)
    once = gp.prune(model, X, target=target, **options)
    cost = COSTS[quantity](result.coupling)
    assert cost.at(widths(result.plan)) == cost.at(widths(once.plan)) <= 0.37 * cost.at({})
    assert widths(result.plan) == widths(once.plan)
    assert result.plan.groups != once.plan.groups  # scored anew after each training
    aims = targets(target, 4, schedule)
    for aim, report in zip(aims, result.reports, strict=True):
        wanted = getattr(aim, quantity)
        assert report.requested == aim
        assert wanted - 0.06 < report.costs[quantity].kept <= wanted
        assert report.costs[quantity].before == cost.at({})
    assert [(s.number, s.steps, s.report) for s in seen] == [(k, 4, r) for k, r in enumerate(result.reports, 1)]
    assert seen[-1].model is result.model
    counted = sum(p.numel() for p in result.model.parameters())
    assert counted == COSTS["params"](result.coupling).at(widths(result.plan))
    again = seen[-1].result.coupling
    assert COSTS[quantity](again).at(widths(seen[-1].result.plan)) == cost.at(widths(result.plan))


def shaken(step):
    """Stands for training that changes which channels matter."""
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("allocation", ["global", "greedy", "knapsack"])
@pytest.mark.parametrize(
    "target",
    [
        gp.Target(macs=0.3),
        gp.Target(params=0.4, macs=0.45),
        gp.Target(channels=0.5),
        gp.Target(macs=0.4, multiple_of=4, floor=8, protect=["7"]),
        gp.Target(params=0.5, channels={"3": 0.6, "7": 0.9}),
    ],
    ids=["macs", "two", "channels", "limits", "by-group"],
)
def test_every_allocation_uses_what_the_target_leaves(target, allocation):
    model = net()
    options = {"verify": False, "emit": "module", "importance": gp.importance.Magnitude(normalize="mean")}
    result = gp.prune_iteratively(model, X, target=target, steps=3, train=shaken, allocation=allocation, **options)
    before, after = ({g.name: g.after for g in report.groups} for report in result.reports[-2:])
    assert sum(after.values()) < sum(before.values())
    limits = {name: share * COSTS[name](result.coupling).at({}) for name, share in target.budgets.items()}
    costs = {name: COSTS[name](result.coupling) for name in limits}
    assert all(cost.at(after) <= limits[name] for name, cost in costs.items())
    for name, width in after.items():
        assert width % target.multiple_of == 0 or width == result.plan.sizes[name]
        assert width >= target.floor
        more = {**after, name: width + target.multiple_of}
        if more[name] <= before[name] and not isinstance(target.channels, dict):
            assert any(cost.at(more) > limits[key] for key, cost in costs.items())
    if target.protect:
        assert after["7"] == 20
    if isinstance(target.channels, dict):
        assert after["0"] == 16
        assert (after["3"], after["7"]) <= (14, 18)


@pytest.mark.parametrize(
    ("build", "inputs", "emit"),
    [
        (lambda: randomised(CifarResNet(1)), torch.randn(2, 3, 8, 8), "module"),
        (lambda: randomised(UNet()), torch.randn(1, 3, 8, 8), "module"),
        (lambda: randomised(TinyViT()), torch.randn(2, 3, 8, 8), "module"),
        (lambda: randomised(TinyViT()), torch.randn(2, 3, 8, 8), "graph"),
        (lambda: randomised(grafted_net()), torch.randn(2, 3, 5, 5), "graft"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 5)),
            torch.randn(2, 3, 8, 8),
            "module",
        ),
    ],
    ids=["padded", "unet", "vit", "vit-graph", "graft", "grouped"],
)
def test_one_plan_says_of_the_original_what_all_steps_leave(build, inputs, emit):
    model = build()
    before = fingerprint(held(model))
    result = gp.prune_iteratively(model, inputs, target=gp.Target(channels=0.3), steps=3, emit=emit)
    assert len(result.plans) == 3
    assert all(plan.removed for plan in result.plans)
    assert sum(plan.removed for plan in result.plans) == result.plan.removed
    same(result.plan.kept, chain(result.plans))
    assert gp.verify(model, result.model, inputs, result.coupling, result.plan).effect > 1e-3
    assert fingerprint(held(model)) == before


def test_normalised_groups_go_in_steps_too():
    model, inputs = randomised(TinyViT()), torch.randn(2, 3, 8, 8)
    result = gp.prune_iteratively(model, inputs, target=gp.Target(channels=0.4), steps=2, norms="prune")
    assert any(width.exactness == "renormalised" and width.after < width.before for width in result.report.groups)
    assert gp.verify(model, result.model, inputs, result.coupling, result.plan).effect > 1e-3


def test_groups_of_one_channel_stay_while_others_go_on():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 5))
    result = gp.prune_iteratively(model, torch.randn(2, 3), target=gp.Target(channels=0.1), steps=3)
    assert [[g.after for g in report.groups] for report in result.reports] == [[1, 11], [1, 6], [1, 2]]


def test_what_is_no_group_any_more_stays_and_the_target_is_met():
    def train(step):
        step.model[2] = nn.Softmax(1)

    result = gp.prune_iteratively(net(), X, target=gp.Target(macs=0.3), steps=3, train=train)
    widths = [[width.after for width in report.groups] for report in result.reports]
    assert widths[0][0] == widths[1][0] == widths[2][0] < 16
    assert widths[0][1] > widths[1][1] > widths[2][1]
    assert result.report.costs["macs"].kept <= 0.3
    why = "softmax compares or orders its positions, at softmax in 2, found in step 2"
    assert [[width.whole for width in report.groups] for report in result.reports] == [
        ["", "", ""],
        *[[why, "", ""]] * 2,
    ]
    for page in (str(result.report), result.report.to_markdown()):
        assert f"1 group is none any more, such as 0: {why}" in page
        assert "not at all" not in page
    assert why in result.report.to_html()


class Forked(nn.Module):
    """Two groups, which training may make one, or leave out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 5), "apart"
        self.d = nn.Linear(8, 5)

    def forward(self, x):
        if self.how == "gone":
            return self.c(self.a(x))
        a, b = self.a(x), self.b(x)
        return self.c(a + b) + self.d(b) if self.how == "together" else self.c(a) + self.d(b)


@pytest.mark.parametrize(
    ("how", "cause"), [("together", "it is part of a"), ("gone", "no tensor of it is left that the forward reads")]
)
def test_a_group_that_is_part_of_another_one_or_is_not_read_says_so(how, cause):
    def train(step):
        step.model.how = how

    result = gp.prune_iteratively(Forked(), torch.randn(2, 3), target=gp.Target(channels=0.5), steps=2, train=train)
    whole = {width.name: width.whole for width in result.report.groups}
    assert whole.pop("b") == f"{cause}, found in step 2"
    assert [width.after for width in result.reports[0].groups if width.name == "b"] == [6]


def test_orders_are_honoured_in_every_step():
    model, batches = net(), [(X, Y)]
    importance = gp.importance.Reconstruction(batches, search="selection", progress=False)
    result = gp.prune_iteratively(model, X, target=gp.Target(channels=0.5), steps=2, importance=importance)
    assert [width.after for width in result.report.groups] == [8, 12, 10]


def test_what_is_gone_goes_first_and_costs_nothing():
    order = Lifted(gp.importance.ordered(torch.tensor([3.0, 1.0, 2.0])), (1, 4, 5), 7)
    assert [order.keep(w) for w in (1, 2, 3, 4, 7)] == [[1], [1, 5], [1, 4, 5], [0, 1, 4, 5], [*range(7)]]
    assert order.lost.tolist() == [6, 3, 1, 0, 0, 0, 0, 0]


def test_a_target_of_everything_gives_an_equal_model_in_every_step():
    model = net()
    result = gp.prune_iteratively(model, X, target=gp.Target(macs=1.0), steps=2)
    assert result.plan.removed == 0
    assert result.model is not model
    assert torch.equal(result.model(X), model(X))


# -- what goes along -----------------------------------------------------------------------------------------------


def test_the_optimizer_and_averages_go_along():
    model = net()
    optimizer, ema, seen = sgd(model), copy.deepcopy(model), []
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())

    def train(step):
        nonlocal ema
        ema = gp.migrate(ema, step.result)
        mine = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
        assert mine == {id(p) for p in step.model.parameters()}
        assert all(step.optimizer.state[p]["momentum_buffer"].shape == p.shape for p in step.model.parameters())
        seen.append(step.optimizer)
        training(step)

    result = gp.prune_iteratively(model, X, target=gp.Target(channels=0.5), steps=3, train=train, optimizer=optimizer)
    assert result.optimizer is seen[-1]
    assert len({id(o) for o in (*seen, optimizer)}) == 4
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert gp.verify(model, gp.migrate(copy.deepcopy(model), result), X, result.coupling, result.plan).effect > 1e-3
    assert [p.shape for p in ema.parameters()] == [p.shape for p in result.model.parameters()]
    once = gp.migrate(optimizer, result)  # the result is of the original, so its own optimizer can be taken along
    assert once.state[result.model[0].weight]["momentum_buffer"].shape == (8, 3, 3, 3)


def test_every_step_is_repaired_on_the_batches():
    model, seen = net(), []
    options = {"batches": [(X, Y)], "loss": F.cross_entropy, "repair": "least_squares"}
    result = gp.prune_iteratively(model, X, target=gp.Target(channels=0.5), steps=2, train=seen.append, **options)
    assert all(step.report.repair.method == "least_squares" for step in seen)
    assert result.report.repair.repaired.error < result.report.repair.pruned.error
    with pytest.raises(gp.InputError, match="repair and batchnorm need batches"):
        gp.prune_iteratively(model, X, target=gp.Target(channels=0.5), steps=2, repair="bias")


# -- going on ------------------------------------------------------------------------------------------------------

RUN = {"target": gp.Target(macs=0.4), "steps": 3, "verify": False}


def run(directory, train=training, model=None, **options):
    model = model or net()
    return gp.prune_iteratively(model, X, train=train, optimizer=sgd(model), directory=directory, **{**RUN, **options})


def stopping(at, error=KeyboardInterrupt):
    def train(step):
        training(step)
        if step.number == at:
            raise error

    return train


def equal(a, b):
    assert type(a.model) is type(b.model)
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(a.optimizer.state_dict(), b.optimizer.state_dict(), rtol=0, atol=0)
    assert a.plan == b.plan
    assert a.plans == b.plans
    assert [r.costs for r in a.reports] == [r.costs for r in b.reports]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, at):
    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopping(at))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", *(f"step-{k:03d}.pt" for k in range(1, at))]
    trained = []
    resumed = run(tmp_path, lambda step: (training(step), trained.append(step.number)))
    assert trained == [*range(at, 4)]
    equal(resumed, whole)
    again = run(tmp_path, lambda step: pytest.fail("all steps are finished"))
    equal(again, whole)


@pytest.mark.parametrize("emit", ["graph", "graft"])
def test_a_run_of_any_emission_goes_on(tmp_path, emit):
    model, inputs = randomised(grafted_net()), torch.randn(2, 3, 5, 5)
    options = {"target": gp.Target(channels=0.4), "steps": 2, "emit": emit}

    def train(step):
        with torch.no_grad():
            [p.mul_(1.5) for p in step.model.parameters()]

    first = gp.prune_iteratively(model, inputs, directory=tmp_path, train=train, **options)
    again = gp.prune_iteratively(model, inputs, directory=tmp_path, **options)
    assert again.report.emitter == emit
    assert torch.equal(first.model(inputs), again.model(inputs))


def test_files_hold_no_code(tmp_path):
    run(tmp_path)
    found = torch.load(tmp_path / "step-002.pt", weights_only=True)
    assert found.keys() == {"plan", "state", "optimizer"}
    assert gp.Plan.from_json(found["plan"]).removed


def test_a_step_that_is_missing_is_done_again_with_all_that_follow(tmp_path):
    run(tmp_path)
    (tmp_path / "step-002.pt").unlink()
    trained = []
    run(tmp_path, lambda step: (training(step), trained.append(step.number)))
    assert trained == [2, 3]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"target": gp.Target(macs=0.5)}, "targets was"),
        ({"steps": 4}, "steps was 3 and is 4"),
        ({"schedule": "exponential"}, "targets was"),
        ({"allocation": "greedy"}, "allocation was uniform and is greedy"),
        ({"keep_names": ["0"]}, r"keep_names was \[\] and is \['0'\]"),
        ({"model": CifarResNet(1)}, "model was Sequential and is CifarResNet"),
        ({"model": nn.Sequential(nn.Linear(3, 5))}, "weights was"),
    ],
)
def test_another_run_is_refused(tmp_path, changed, told):
    run(tmp_path, steps=3)
    with pytest.raises(gp.InputError, match=f"holds another run: {told}.*pass another directory"):
        run(tmp_path, **changed)


def test_broken_files_are_refused_with_what_to_do(tmp_path):
    run(tmp_path)
    path = tmp_path / "step-002.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(gp.InputError, match=r"step-002.pt cannot be read .*delete it to do step 2 again"):
        run(tmp_path)
    found = torch.load(tmp_path / "step-001.pt", weights_only=True)
    torch.save({**found, "optimizer": None}, tmp_path / "step-001.pt")
    with pytest.raises(gp.InputError, match="was written without an optimizer; pass it again so"):
        run(tmp_path)
    for state in ({}, {**found["state"], "0.bias": torch.zeros(2)}):
        torch.save({**found, "state": state}, tmp_path / "step-001.pt")
        with pytest.raises(gp.InputError, match=r"step-001.pt holds another model: 0.bias differs; pass another"):
            run(tmp_path)
    torch.save(
        {**found, "plan": gp.prune(conv_net(), X[..., :5, :5], target=gp.Target(channels=0.5)).plan.to_json()},
        tmp_path / "step-001.pt",
    )
    with pytest.raises(gp.PlanError, match="the plan was made for another model"):
        run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1')
    with pytest.raises(gp.InputError, match=r"run.json is not readable .*pass another directory"):
        run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(gp.InputError, match=r"run\.json is not readable"):
        run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(gp.InputError, match=r"holds other files and no run\.json; pass an empty directory"):
        run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(gp.InputError, match="file' is a file; pass a directory"):
        run(tmp_path / "file")


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "kept"
    write_whole(path, lambda file: file.write(b"before"))

    def stopped(file):
        file.write(b"aft")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, stopped)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_fingerprint_tells_models_apart():
    model = net()
    prints = [fingerprint(held(model))]
    with torch.no_grad():
        model[1].running_mean[3] += 1
    prints.append(fingerprint(held(model)))
    prints += [fingerprint(held(m)) for m in (net().double(), nn.Sequential(net()), net().to("meta"))]
    assert all(a != b for a, b in itertools.combinations(prints, 2))
    assert fingerprint(held(net())) == prints[0]


# -- refused -------------------------------------------------------------------------------------------------------


def test_schedules_end_at_the_target_and_remove_what_they_say():
    target = gp.Target(macs=0.25)
    assert [round(t.macs, 6) for t in targets(target, 4, "linear")] == [0.8125, 0.625, 0.4375, 0.25]
    assert [round(t.macs, 6) for t in targets(target, 2, "exponential")] == [0.5, 0.25]
    assert [round(t.macs, 6) for t in targets(target, 2, lambda t: t**2)] == [0.8125, 0.25]
    assert targets(target, 3, lambda t: t)[-1] is target
    for steps in (0, -1, 2.0, True):
        with pytest.raises(gp.InputError, match=f"steps={steps!r}: a whole number of steps, at least 1"):
            targets(target, steps, "linear")
    with pytest.raises(gp.InputError, match="schedule='cubic'; it is 'linear', 'exponential' or a callable"):
        targets(target, 2, "cubic")
    for wrong in (lambda t: 2 * t, lambda t: 1 - t, lambda t: t - 1, lambda t: float("nan")):
        with pytest.raises(gp.InputError, match=r"the schedule gives .* rises from 0 to 1"):
            targets(target, 3, wrong)


def test_a_target_out_of_reach_is_refused_before_any_training():
    with pytest.raises(gp.TargetError, match="cannot be reached"):
        gp.prune_iteratively(
            net(), X, target=gp.Target(macs=0.001), steps=3, train=lambda step: pytest.fail("trained in vain")
        )


def test_orders_that_do_not_fit_are_refused_in_any_step():
    calls = []

    def importance(model, coupling):
        calls.append(1)
        size = coupling.groups[0].size + (len(calls) > 1)
        return {coupling.groups[0].name: gp.importance.ordered(torch.arange(float(size)))}

    with pytest.raises(gp.InputError, match="the order of group '0' is of 13 channels; the group has 12"):
        gp.prune_iteratively(net(), X, target=gp.Target(channels=0.5), steps=2, importance=importance)


def test_what_prune_refuses_is_refused():
    with pytest.raises(gp.InputError, match="pass a Target"):
        gp.prune_iteratively(net(), X, target=0.5, steps=2)
    with pytest.raises(gp.PlanError, match="no channels that may be removed"):
        gp.prune_iteratively(nn.Linear(3, 5), torch.randn(1, 3), target=gp.Target(macs=0.5), steps=2)

"""Pruning while training: what is heard in train mode, which channels go, and that the smaller module is the masked one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.report.gather import BINS
from graphprune.training import GroupFisher
from graphprune.training.watch import Watch
from tests.two_processes import beside, needs_gloo


class Block(nn.Module):
    """A residual stream of 6 channels, 5 channels inside a block, with or without batch norms; odd in train mode."""

    def __init__(self, norm=nn.BatchNorm2d, drop=0.0):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), norm(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1), norm(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), norm(6)
        self.drop, self.linear = drop, nn.Linear(6, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        branch = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
        if self.training and self.drop:  # calls that the trace does not have
            branch = branch * branch.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.drop)
            branch = functional.dropout2d(branch, self.drop)
        return self.linear((x + branch).relu_().mean((2, 3)))


def plain(**options):
    return Block(lambda n: nn.Identity(), **options)


def made(make=Block, seed=0, **options):
    torch.manual_seed(seed)
    return make(**options).double().train()


def data(seed=1, count=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator).double(), torch.arange(count) % 4


X, Y = data()


def trained(net, pruner, optimizer, steps=200):
    """An ordinary loop, until the target is met."""
    for step in range(steps):
        if pruner.done:
            return
        x, y = data(step)
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    raise AssertionError("the target was not met")


# -- what is heard --------------------------------------------------------------------------------------------------


def test_gradients_by_masks_are_those_of_masks_in_train_mode():
    net = made(drop=0.5)
    heard = []
    watch = Watch(net, gp.couple(gp.trace(net, X)), heard.append, 0)
    handles = watch.attach()
    torch.manual_seed(7)
    functional.cross_entropy(net(X), Y, reduction="sum").backward()
    for handle in handles:
        handle.remove()

    def masked(stream, inner):
        x = net.bn(net.stem(X)).relu()
        branch = net.bn1(net.conv1(x * stream)).relu()
        branch = net.bn2(net.conv2(branch * inner))
        branch = functional.dropout2d(branch * branch.new_empty(8, 1, 1, 1).bernoulli_(0.5), 0.5)
        return net.linear(((x + branch).relu() * stream).mean((2, 3)))

    masks = [torch.ones(8, n, 1, 1).double().requires_grad_() for n in (6, 5)]
    torch.manual_seed(7)
    loss = functional.cross_entropy(masked(*masks), Y, reduction="sum")
    for name, want in zip(("stem", "conv1"), torch.autograd.grad(loss, masks), strict=True):
        torch.testing.assert_close(heard[0].q[name], want[:, :, 0, 0])
        assert want.abs().max() > 1e-3
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_passes_in_eval_mode_and_without_gradients_are_not_heard():
    net = made()
    heard = []
    watch = Watch(net, gp.couple(gp.trace(net, X)), heard.append, 0)
    watch.attach()
    with torch.no_grad():
        net(X)
    net.eval()(X).sum().backward()
    assert heard == []
    net.train()(X[:3])
    assert heard[0].view.samples == 3


def test_a_pass_that_fails_leaves_nothing_open():
    net = made()
    heard = []
    watch = Watch(net, gp.couple(gp.trace(net, X)), heard.append, 0)
    watch.attach()
    net(X)

    def fails(module, args):
        raise ValueError("out of memory, say")

    handle = net.linear.register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="out of memory, say"):
        net(X)
    handle.remove()
    assert watch.open is None
    assert not nn.modules.module._global_forward_pre_hooks
    net(X)
    assert len(heard) == 2


@pytest.mark.parametrize("amp", [False, True])
def test_the_forward_gives_and_learns_what_it_would(amp):
    net, other = made().float(), made().float()
    heard = []
    Watch(net, gp.couple(gp.trace(net, X.float())), heard.append, 0).attach()
    for model in (net, other):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            output = model(X.float())
        assert output.dtype == (torch.bfloat16 if amp else torch.float32)
        functional.cross_entropy(output, Y).backward()
    assert heard[0].heard
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


# -- which channels go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["memory", "macs", "params", None])
def test_the_first_to_go_is_what_fisher_ranks_lowest(normalize):
    net = made(plain)
    batches = [data(seed, count) for seed, count in ((0, 8), (1, 5))]
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.9), every=2, normalize=normalize)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner.attach(sgd)
    want = gp.importance.Fisher(batches, functional.cross_entropy, normalize=normalize)(net, pruner.coupling)
    for x, y in batches:
        functional.cross_entropy(net(x), y).backward()
        sgd.step()
    (removed,) = pruner.removed
    ((name, (channel,)),) = removed.channels.items()
    assert removed.step == 2
    assert removed.importance == pytest.approx(min(float(s.min()) for s in want.values()))
    assert int(want[name].argmin()) == channel


def test_costs_are_those_at_the_widths_of_the_moment():
    net = made()
    pruner = GroupFisher(net, X, target=gp.Target(macs=0.4), every=1, normalize="macs")
    scores = {name: torch.rand(len(kept)).double() for name, kept in pruner.keep.items()}
    worth = pruner._worth(1, scores)
    stream = {"stem": [0, 1, 2]}
    while len(pruner.keep["stem"]) > 3:
        pruner._take(0, scores)
    plans = [gp.Plan.of(pruner.coupling, stream | {"conv1": list(range(n))}) for n in (5, 4)]
    macs = [pruner.cost.at({name: len(kept) for name, kept in plan.groups.items()}) for plan in plans]
    assert pruner._worth(1, scores) == pytest.approx(float(scores["conv1"].min()) / (macs[0] - macs[1]))
    assert pruner._worth(1, scores) > worth


def test_the_limits_of_a_target_are_kept():
    net = made()
    with pytest.raises(gp.TargetError, match=r"channels=0.5 cannot be reached: at least 0.8182 of the channels"):
        GroupFisher(net, X, target=gp.Target(channels=0.5, protect=["conv1"], floor=4), every=1)
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.85, protect=["conv1"], multiple_of=2), every=1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner.attach(sgd)
    trained(net, pruner, sgd)
    assert [len(kept) for kept in pruner.keep.values()] == [4, 5]
    assert [len(r.channels["stem"]) for r in pruner.removed] == [2]


def test_tied_groups_lose_channels_together():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    pruner = GroupFisher(net, X[:, :, 0, 0], target=gp.Target(channels=0.7, tied=[["0", "2"]]), every=1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner.attach(sgd)
    for _ in range(3):
        functional.cross_entropy(net(X[:, :, 0, 0]), Y).backward()
        sgd.step()
    assert [sorted(removed.channels) for removed in pruner.removed] == [["0", "2"]] * 3
    assert [len(kept) for kept in pruner.keep.values()] == [5, 5]


def test_several_go_at_once_and_the_last_ones_do_not_overshoot():
    net = made()
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.6), every=2, count=3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner.attach(sgd)
    trained(net, pruner, sgd)
    assert [removed.step for removed in pruner.removed] == [2, 2, 2, 4, 4]
    assert sum(map(len, pruner.keep.values())) == 6


def test_the_report_has_the_scores_that_channels_had_when_they_went():
    net = made(plain)
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.6), every=2, normalize=None)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    pruner.attach(sgd)
    trained(net, pruner, sgd)
    report = pruner.finish().report
    assert report.importance == "Fisher of the 2 steps before a channel went, or before the last removal"
    assert (report.allocation, len(pruner.removed)) == ("greedy", 5)
    assert len({removed.importance for removed in pruner.removed}) == 5
    for width in report.groups:
        went = [r.importance for r in pruner.removed if width.name in r.channels]  # one channel each, at no cost
        for value in went:
            at = min(int((value - width.scores.low) / (width.scores.high - width.scores.low) * BINS), BINS - 1)
            assert width.scores.removed[at] > 0
        stays = pruner.scores[width.name][pruner.keep[width.name]]
        assert (sum(width.scores.kept), sum(width.scores.removed)) == (len(stays), len(went))
        assert width.scores.cut == (pytest.approx(float(stays.min())) if max(went) <= stays.min() else None)
        assert width.scores.high == pytest.approx(max([float(stays.max()), *went]))


def test_costs_are_named_in_the_report_and_nothing_is_told_of_no_choice():
    net = made(plain)
    pruner = GroupFisher(net, X, target=gp.Target(macs=0.9), every=1, normalize="macs")
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    pruner.attach(sgd)
    trained(net, pruner, sgd)
    assert "before the last removal, greedy per macs allocation" in str(pruner.finish().report)
    whole = GroupFisher(net, X, target=gp.Target(macs=1.0)).finish().report
    assert whole.importance == whole.allocation == ""
    assert all(width.scores is None for width in whole.groups)


# -- masked, and then smaller ---------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [Block, plain])
def test_the_smaller_module_is_the_masked_one(make, optimizer):
    net = made(make, drop=0.2)
    pruner = GroupFisher(net, X[:2], target=gp.Target(macs=0.5), every=3)
    chosen = OPTIMIZERS[optimizer](net.parameters())
    pruner.attach(chosen)
    trained(net, pruner, chosen)
    masked = net.eval()(X)
    result = pruner.finish()
    assert torch.equal(net(X), masked)
    assert result.report.costs["macs"].kept <= 0.5
    assert result.plan.removed == sum(len(c) for r in pruner.removed for c in r.channels.values()) > 2
    assert result.report.verification.error < 1e-9
    assert result.report.verification.effect > 1e-3
    torch.testing.assert_close(result.model.eval()(X), masked, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gp.verify(net, result.model, X, pruner.coupling, result.plan).error, 0.0, atol=1e-9, rtol=0
    )
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_training_masked_is_training_smaller():
    """Once a channel is gone, the masked model takes the steps of the smaller one, momentum included."""
    net = made()
    pruner = GroupFisher(net, X[:2], target=gp.Target(channels=0.7), every=1)
    sgd = OPTIMIZERS["sgd"](net.parameters())
    pruner.attach(sgd)
    trained(net, pruner, sgd)
    result = pruner.finish()
    moved = gp.migrate(sgd, result)
    pruner.attach(sgd)
    for seed in range(5):
        for model, optimizer in ((net, sgd), (result.model, moved)):
            x, y = data(seed)
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(result.model.eval()(X), net.eval()(X), rtol=1e-9, atol=1e-11)
    pruner.finish()


def decided(loop, **options):
    """The removals of a loop that sees all samples, with weights that stay."""
    net = made(plain)
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.7), every=1, **options)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    loop(net, pruner, sgd)
    return [removed.channels for removed in pruner.removed], [r.importance for r in pruner.removed]


def whole(net, pruner, sgd):
    pruner.attach(sgd)
    for seed in range(4):
        x, y = data(seed)
        sgd.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        sgd.step()


def accumulated(net, pruner, sgd):
    pruner.attach(sgd)
    for seed in range(4):
        x, y = data(seed)
        sgd.zero_grad()
        for part in (slice(0, 3), slice(3, 8)):
            functional.cross_entropy(net(x[part]), y[part]).backward()
        sgd.step()


def scaled(net, pruner, sgd):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    pruner.attach(sgd, scaler)
    for seed in range(4):
        x, y = data(seed)
        for spoilt in (seed == 2, False):
            sgd.zero_grad()
            scaler.scale(functional.cross_entropy(net(x), y) * (float("inf") if spoilt else 1)).backward()
            scaler.step(sgd)
            scaler.update()
            if not spoilt:
                break


def summed(net, pruner, sgd):
    pruner.attach(sgd)
    for seed in range(4):
        x, y = data(seed)
        sgd.zero_grad()
        functional.cross_entropy(net(x), y, reduction="sum").backward()
        sgd.step()


@pytest.mark.parametrize(("loop", "options"), [(accumulated, {}), (scaled, {}), (summed, {"reduction": "sum"})])
def test_decisions_do_not_depend_on_the_loop(loop, options):
    channels, importance = decided(whole)
    assert len(channels) == 4
    found = decided(loop, **options)
    assert found[0] == channels
    assert found[1] == pytest.approx(importance)


def test_heads_of_attention_go_while_training():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.qkv, self.proj = nn.Linear(7, 8), nn.Linear(8, 36), nn.Linear(12, 5)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(self.first(x)).reshape(b, n, 3, 4, 3).permute(2, 0, 3, 1, 4)
            x = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
            return self.proj(x.transpose(1, 2).flatten(2)).mean(1)

    torch.manual_seed(0)
    net, x = Attention().double().train(), torch.randn(6, 5, 7).double()
    pruner = GroupFisher(net, x, target=gp.Target(params=0.6), every=1)
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner.attach(adam)
    for _ in range(60):
        if not pruner.done:
            adam.zero_grad()
            functional.cross_entropy(net(x), torch.arange(6) % 5).backward()
            adam.step()
    masked = net.eval()(x)
    result = pruner.finish()
    torch.testing.assert_close(result.model(x), masked, rtol=1e-9, atol=1e-11)
    assert result.report.verification.error < 1e-9


def test_it_goes_on_where_its_state_was_taken():
    def run(stop):
        net = made()
        pruner = GroupFisher(net, X, target=gp.Target(channels=0.6), every=3)
        sgd = OPTIMIZERS["sgd"](net.parameters())
        pruner.attach(sgd)
        for step in range(15):
            if step == stop:
                kept = net.state_dict(), sgd.state_dict(), pruner.state_dict()
                net = made(seed=5)
                pruner = GroupFisher(net, X, target=gp.Target(channels=0.6), every=3)
                net.load_state_dict(kept[0])
                sgd = OPTIMIZERS["sgd"](net.parameters())
                sgd.load_state_dict(kept[1])
                pruner.load_state_dict(kept[2])
                pruner.attach(sgd)
            x, y = data(step)
            sgd.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            sgd.step()
        return net, pruner

    (want, pruner), (net, other) = run(-1), run(7)
    assert pruner.done
    assert other.removed == pruner.removed
    assert str(other) == str(pruner) == "after 15 steps 5 channels are removed, channels 0.545 of 0.6"
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values(), strict=True))
    assert all(torch.equal(scores, pruner.scores[name]) for name, scores in other.scores.items())
    result = other.finish()
    assert result.report.verification.error < 1e-9
    assert result.report.groups == pruner.finish().report.groups


# -- several processes ----------------------------------------------------------------------------------------------

JOB = """
    import datetime, sys
    import torch, torch.distributed as dist
    from torch.nn import functional
    import graphprune as gp
    from tests.unit.test_group_fisher import data, made, plain

    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    net = made(plain)
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    pruner = gp.training.GroupFisher(net, data()[0], target=gp.Target(macs=0.5), every=2)
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    pruner.attach(sgd)
    for step in range(40):
        x, y = data(step)
        sgd.zero_grad()
        functional.cross_entropy(ddp(x[rank::2]), y[rank::2]).backward()
        sgd.step()
    result = pruner.finish()
    removed = [(r.step, dict(r.channels), r.importance) for r in pruner.removed]
    torch.save((removed, net.state_dict(), result.model(x), result.plan.to_json()), out)
    dist.destroy_process_group()
"""


@needs_gloo
def test_two_processes_take_the_decisions_of_one_on_all_data(tmp_path):
    with beside(JOB, tmp_path):
        net = made(plain)
        pruner = GroupFisher(net, X, target=gp.Target(macs=0.5), every=2)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        pruner.attach(sgd)
        for step in range(40):
            x, y = data(step)
            sgd.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            sgd.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first[0]) > 3
    assert first[0] == second[0]
    assert first[3] == second[3] == pruner.plan.to_json()
    assert [(step, channels) for step, channels, _ in first[0]] == [(r.step, dict(r.channels)) for r in pruner.removed]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-8, atol=1e-11)
        assert torch.equal(first[1][name], second[1][name])


# -- refused --------------------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_are_an_error_where_no_scaler_skips_them():
    net = made()
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.5), every=2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner.attach(sgd)
    (functional.cross_entropy(net(X), Y) * float("inf")).backward()
    with pytest.raises(gp.CalibrationError, match=r"group '.+' are NaN or infinite in step 1; lower the learning rate"):
        sgd.step()


def test_steps_in_which_nothing_is_heard_are_an_error():
    net = made()
    pruner = GroupFisher(net, X, target=gp.Target(channels=0.5), every=2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner.attach(sgd)
    net.eval()
    functional.cross_entropy(net(X), Y).backward()
    sgd.step()
    with pytest.raises(
        gp.CalibrationError, match=r"no sample was heard in 2 steps; call the model itself, in train mode"
    ):
        sgd.step()


def test_a_forward_that_leaves_out_layers_in_train_mode_is_refused():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(x if self.training else self.inner(x).relu())

    net, x = Skips().train(), torch.randn(4, 3)
    pruner = GroupFisher(net, x, target=gp.Target(channels=0.5))
    handle = pruner.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    match = r"Skips in train mode does not run linear in inner \(test_group_fisher.py:\d+\), where channels end"
    with pytest.raises(gp.CalibrationError, match=match):
        net(x)
    handle.remove()
    net(x)


def test_finishing_before_the_target_is_met_is_refused():
    net = made()
    with pytest.raises(
        gp.InputError, match=r"not met: after 0 steps 0 channels are removed, macs 1.000 of 0.5; train on"
    ):
        GroupFisher(net, X, target=gp.Target(macs=0.5)).finish()


@pytest.mark.parametrize("options", [{"every": 0}, {"count": 0}, {"normalize": "time"}, {"reduction": "none"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(gp.InputError, match="every and count are at least 1, normalize is 'memory', 'macs'"):
        GroupFisher(made(), X, target=gp.Target(macs=0.5), **options)


def test_targets_that_leave_no_choice_and_other_things_are_refused():
    with pytest.raises(gp.InputError, match="fractions by group leave nothing to choose; give a fraction of a cost"):
        GroupFisher(made(), X, target=gp.Target(channels={"stem": 0.5}))
    with pytest.raises(gp.InputError, match=r"target=0.5: pass a Target"):
        GroupFisher(made(), X, target=0.5)
    with pytest.raises(gp.PlanError, match="has no channels that may be removed"):
        GroupFisher(nn.Linear(3, 4), torch.zeros(2, 3), target=gp.Target(macs=0.5))


def test_an_optimizer_or_a_state_of_another_model_is_refused():
    net = made()
    pruner = GroupFisher(net, X, target=gp.Target(macs=0.5))
    with pytest.raises(gp.InputError, match="holds no parameter of the model; pass the one that trains it"):
        pruner.attach(torch.optim.SGD(made().parameters(), lr=0.1))
    with pytest.raises(gp.InputError, match="this state is of another model"):
        pruner.load_state_dict(GroupFisher(made(plain), X, target=gp.Target(macs=0.5)).state_dict())

"""Penalties: what they add to gradients, in which loops, and what that does to networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.training import Distribution, GroupLasso, GrowingL2, Slimming, ramp


class Stream(nn.Module):
    """A residual stream of 6 channels that two batch norms scale, and 5 channels inside that one scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.linear(x.mean((2, 3)))


def made(seed=0):
    torch.manual_seed(seed)
    net = Stream()
    for norm in (net.bn, net.bn1, net.bn2):
        nn.init.normal_(norm.weight)
    return net, gp.couple(gp.trace(net, torch.zeros(2, 3, 8, 8)))


def data(seed=1, count=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 4


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def added(net, coupling, penalty):
    """What a call adds to every gradient."""
    x, y = data()
    functional.cross_entropy(net(x), y).backward()
    before = gradients(net)
    penalty()
    return {name: gradient - before[name] for name, gradient in gradients(net).items()}


def test_slimming_adds_the_gradient_of_its_penalty():
    net, coupling = made()
    found = added(net, coupling, Slimming(net, coupling, 0.1))
    scales = [net.bn.weight, net.bn1.weight, net.bn2.weight]
    penalty = 0.1 * (2**0.5 * torch.stack([scales[0], scales[2]]).norm(dim=0).sum() + scales[1].abs().sum())
    want = torch.autograd.grad(penalty, scales)
    for name, gradient in zip(("bn.weight", "bn1.weight", "bn2.weight"), want, strict=True):
        torch.testing.assert_close(found.pop(name), gradient)
    assert len(found) == 8
    assert not any(change.any() for change in found.values())


def test_slimming_each_scale_by_itself_is_the_sign():
    net, coupling = made()
    found = added(net, coupling, Slimming(net, coupling, 0.1, grouped=False))
    for name in ("bn", "bn1", "bn2"):
        torch.testing.assert_close(found[f"{name}.weight"], 0.1 * net.get_submodule(name).weight.sign())


def test_a_scale_of_zero_is_left_there():
    net, coupling = made()
    with torch.no_grad():
        net.bn1.weight[2] = 0
    assert added(net, coupling, Slimming(net, coupling, 0.1))["bn1.weight"][2] == 0


def test_group_lasso_adds_the_gradient_of_its_penalty():
    net, coupling = made()
    found = added(net, coupling, GroupLasso(net, coupling, 0.1))
    live = dict(net.named_parameters())
    penalty = torch.zeros(())
    for group in coupling.groups:
        rows = [live[m.name].movedim(m.dim, 0).reshape(group.size, -1) for m in group.members if m.name in live]
        together = torch.cat(rows, 1)
        penalty = penalty + 0.1 * together.shape[1] ** 0.5 * together.norm(dim=1).sum()
    names = [name for name in live if name != "linear.bias"]
    for name, gradient in zip(names, torch.autograd.grad(penalty, [live[n] for n in names]), strict=True):
        torch.testing.assert_close(found[name], gradient)
    assert not found["linear.bias"].any()


def test_group_lasso_over_filters_leaves_scales_alone():
    net, coupling = made()
    found = added(net, coupling, GroupLasso(net, coupling, 0.1, over="filters"))
    assert not found["bn.weight"].any()
    assert found["stem.weight"].any()


def test_growing_l2_touches_what_the_plan_removes_and_nothing_else():
    net, coupling = made()
    plan = gp.Plan.of(coupling, {"conv1": [0, 2, 3]})
    penalty = GrowingL2(net, coupling, plan, by=0.25, every=2, ceiling=0.6)
    found = added(net, coupling, penalty)
    torch.testing.assert_close(found["conv1.weight"][[1, 4]], 0.25 * net.conv1.weight.detach()[[1, 4]])
    torch.testing.assert_close(found["conv2.weight"][:, [1, 4]], 0.25 * net.conv2.weight.detach()[:, [1, 4]])
    torch.testing.assert_close(found["bn1.weight"][[1, 4]], 0.25 * net.bn1.weight.detach()[[1, 4]])
    assert not found["conv1.weight"][[0, 2, 3]].any()
    assert not found["conv2.weight"][:, [0, 2, 3]].any()
    assert not found["stem.weight"].any()
    assert [penalty._strength(step) for step in range(7)] == [0.25, 0.25, 0.5, 0.5, 0.6, 0.6, 0.6]
    assert not penalty.full
    penalty.step = 4
    assert penalty.full


def test_growing_l2_makes_the_removal_harmless():
    net, coupling = made()
    plan = gp.Plan.of(coupling, {"conv1": [0, 2, 3], "stem": [0, 1, 4]})
    penalty = GrowingL2(net, coupling, plan, by=0.05, every=1, ceiling=2.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = data()
    for _ in range(150):
        sgd.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        penalty()
        sgd.step()
    assert penalty.full
    found = penalty.distribution()
    assert found.near_zero("conv1") == pytest.approx(2 / 5)
    assert found.near_zero("stem") == pytest.approx(3 / 6)
    small = gp.rewrite(net.eval(), x, coupling, plan).model
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def test_every_channel_of_a_concatenation_and_of_heads_is_reached():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 5, 1)
            self.bn, self.last = nn.BatchNorm2d(7), nn.Conv2d(7, 4, 1)

        def forward(self, x):
            return self.last(self.bn(torch.cat([self.a(x), self.b(x)], 1)))

    net = Two()
    nn.init.normal_(net.bn.weight)
    coupling = gp.couple(gp.trace(net, torch.zeros(1, 3, 4, 4)))
    slimming = Slimming(net, coupling, 1.0)
    net(torch.randn(2, 3, 4, 4)).square().sum().backward()
    before = net.bn.weight.grad.clone()
    slimming()
    torch.testing.assert_close(net.bn.weight.grad - before, net.bn.weight.detach().sign())
    assert {name: len(sizes) for name, sizes in slimming.distribution().now.items()} == {"a": 2, "b": 5}


# -- loops ----------------------------------------------------------------------------------------------------------


def trained(loop, optimizer=torch.optim.SGD, **options):
    """Weights after two steps of a loop, which gets the network, its penalty and its optimizer."""
    net, coupling = made()
    loop(net, Slimming(net, coupling, 0.01), optimizer(net.parameters(), lr=0.1, **options))
    return net.state_dict()


def plain(net, penalty, optimizer):
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        functional.cross_entropy(net.eval()(x), y).backward()
        penalty()
        optimizer.step()


def attached(net, penalty, optimizer):
    penalty.attach(optimizer)
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        functional.cross_entropy(net.eval()(x), y).backward()
        optimizer.step()


def accumulating(net, penalty, optimizer):
    penalty.attach(optimizer)
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (functional.cross_entropy(net.eval()(x[part]), y[part]) / 2).backward()
        optimizer.step()
    assert penalty.step == 2


def scaled(net, penalty, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(net.eval()(x), y)).backward()
        penalty(scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()


def unscaled(net, penalty, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(net.eval()(x), y)).backward()
        scaler.unscale_(optimizer)
        penalty()
        scaler.step(optimizer)
        scaler.update()


def attached_scaled(net, penalty, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    penalty.attach(optimizer)
    for seed in (1, 2):
        x, y = data(seed)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(net.eval()(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("loop", [attached, accumulating, scaled, unscaled, attached_scaled])
def test_every_loop_takes_the_same_steps(loop):
    want, before = trained(plain), made()[0].state_dict()
    assert not torch.equal(want["bn.weight"], before["bn.weight"])
    for name, tensor in trained(loop).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_unscales_by_itself_takes_the_same_steps():
    want = trained(plain, torch.optim.AdamW, fused=True)
    for name, tensor in trained(attached_scaled, torch.optim.AdamW, fused=True).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-5)


def test_a_step_that_overflows_adds_nothing():
    net, coupling = made()
    slimming, sgd = Slimming(net, coupling, 0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    slimming.attach(sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = net.bn.weight.detach().clone()
    scaler.scale(functional.cross_entropy(net(data()[0]), data()[1])).backward()
    net.linear.weight.grad.fill_(float("inf"))
    scaler.step(sgd)
    assert slimming.step == 0
    assert torch.equal(net.bn.weight, before)


def test_a_handle_ends_what_was_attached():
    net, coupling = made()
    slimming, sgd = Slimming(net, coupling, 0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    handle = slimming.attach(sgd)
    net(data()[0]).sum().backward()
    sgd.step()
    handle.remove()
    sgd.step()
    assert slimming.step == 1


def test_a_schedule_is_asked_for_every_step_and_goes_on_after_loading():
    net, coupling = made()
    slimming = Slimming(net, coupling, ramp(1.0, 4))
    changes = []
    net(data()[0]).square().sum().backward()
    for _ in range(3):
        before = net.bn1.weight.grad.clone()
        slimming()
        changes.append(float((net.bn1.weight.grad - before).abs().max()))
    assert changes == pytest.approx([0, 0.25, 0.5], abs=1e-4)
    with torch.no_grad():
        net.bn1.weight.zero_()
    again = Slimming(net, coupling, ramp(1.0, 4))
    assert again.distribution().near_zero("conv1") == 0  # nothing is small beside zero
    again.load_state_dict(slimming.state_dict())
    assert again.step == 3
    assert again.distribution().near_zero("conv1") == 1


def test_slimming_parts_the_scales_and_the_record_shows_it():
    net, coupling = made()
    for norm in (net.bn, net.bn1, net.bn2):
        nn.init.constant_(norm.weight, 0.5)
    slimming = Slimming(net, coupling, 0.02)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    slimming.attach(sgd)
    x, y = data(count=64)
    for _ in range(120):
        sgd.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        sgd.step()
    found = slimming.distribution()
    least, _, middle, _, most = found.quantiles("stem")
    assert least < 0.1 * most
    assert middle < 0.5
    assert found.near_zero() > 0
    first, *lines, last = str(found).splitlines()
    assert first.split() == ["group", "channels", "start", "min", "10", "%", "median", "90", "%", "max", "near", "zero"]
    assert [line.split()[:3] for line in lines] == [["stem", "6", "5.00e-01"], ["conv1", "5", "5.00e-01"]]
    assert last.startswith("after 120 steps 0.")
    assert "of 11 channels are near zero" in last


def test_sizes_are_recorded_every_few_steps_and_after_loading():
    def run(stop=None):
        net, coupling = made()
        slimming = Slimming(net, coupling, 0.5)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        slimming.record(every=3)
        for step in range(8):
            if step == stop:
                kept = slimming.state_dict()
                slimming = Slimming(net, coupling, 0.5)
                slimming.load_state_dict(kept)
            sgd.zero_grad()
            net(data()[0]).square().sum().mul(1e-3).backward()
            slimming()
            sgd.step()
        return slimming

    slimming = run()
    history = slimming.history
    assert (history.penalty, history.steps) == ("Slimming", (0, 3, 6, 8))
    assert list(history.groups) == ["stem", "conv1"]
    now = slimming.distribution()
    for name, track in history.groups.items():
        assert track.near == pytest.approx(0.01 * float(now.start[name].median()))
        assert track.sizes[-1] == now.quantiles(name)
        assert track.sizes[0] == Distribution(0, now.start, now.start).quantiles(name)
        medians = [sizes[2] for sizes in track.sizes]
        assert medians == sorted(medians, reverse=True)
        assert medians[-1] < medians[0]
    assert run(stop=5).history == history
    nn.init.zeros_(slimming.groups["conv1"].pieces[0].parameter)
    assert slimming.history.near_zero == (*history.near_zero[:-1], 5 / 11)


def test_without_a_record_a_history_has_the_start_and_now():
    net, coupling = made()
    lasso = GroupLasso(net, coupling, 0.1)
    assert lasso.history.steps == (0,)
    net(data()[0]).sum().backward()
    lasso()
    assert lasso.history.steps == (0, 1)
    assert str(lasso.history) == "with GroupLasso for 1 step: 0.00 -> 0.00 of the channels near zero"


# -- refused --------------------------------------------------------------------------------------------------------


def test_a_model_without_scales_is_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    coupling = gp.couple(gp.trace(net, torch.zeros(2, 3)))
    with pytest.raises(gp.InputError, match=r"Sequential has no batch, .* with gp.training.GroupLasso"):
        Slimming(net, coupling, 0.1)


def test_a_model_without_channels_is_refused():
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(gp.InputError, match="no channels that can be removed; print the coupling"):
        GroupLasso(net, gp.couple(gp.trace(net, torch.zeros(2, 3))), 0.1)


def test_a_call_without_gradients_says_where_it_belongs():
    net, coupling = made()
    with pytest.raises(gp.InputError, match=r"none of 3 parameters has a gradient, such as bn.weight; call it after"):
        Slimming(net, coupling, 0.1)()


def test_frozen_scales_are_passed_over():
    net, coupling = made()
    net.bn1.requires_grad_(False)
    for penalty in (Slimming(net, coupling, 0.1), Slimming(net, coupling, 0.1, grouped=False)):
        net(data()[0]).sum().backward()
        penalty()
        assert net.bn1.weight.grad is None
    GrowingL2(net, coupling, gp.Plan.of(coupling, {"conv1": [0]}))()
    assert net.bn1.weight.grad is None


def test_an_optimizer_of_another_model_is_refused():
    net, coupling = made()
    with pytest.raises(gp.InputError, match=r"holds none of its parameters, such as bn.weight; make the penalty from"):
        Slimming(net, coupling, 0.1).attach(torch.optim.SGD(made()[0].parameters(), lr=0.1))


def test_a_coupling_of_another_model_is_refused():
    net, coupling = made()
    net.bn1 = nn.BatchNorm2d(7)
    with pytest.raises(gp.InputError, match=r"bn1.weight is \[7\] in the model and \[5\] in the coupling; couple this"):
        Slimming(net, coupling, 0.1)


@pytest.mark.parametrize("every", [-1, 1.5, True, "3"])
def test_a_record_is_of_whole_steps(every):
    with pytest.raises(gp.InputError, match="a whole number of steps, such as 100"):
        Slimming(*made(), 0.1).record(every)


@pytest.mark.parametrize("strength", [-0.1, float("nan")])
def test_a_strength_is_not_negative(strength):
    net, coupling = made()
    with pytest.raises(gp.InputError, match="a number that is not negative, or a schedule"):
        Slimming(net, coupling, strength)


def test_growing_l2_refuses_what_cannot_grow_or_removes_nothing():
    net, coupling = made()
    with pytest.raises(gp.InputError, match=r"by=0, every=10, ceiling=1.0: each must be more than 0"):
        GrowingL2(net, coupling, gp.Plan.of(coupling, {"conv1": [0]}), by=0)
    with pytest.raises(gp.InputError, match="removes nothing; allocate one with a target below 1"):
        GrowingL2(net, coupling, gp.Plan.of(coupling, {}))

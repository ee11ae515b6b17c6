"""Repair of pruned networks, against least squares over materialised activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune import recover
from graphprune.calibrate import statistics
from graphprune.recover import consumers, sequential
from graphprune.recover.consumers import Change
from tests.by_hand import coupled, generator, images, labels, rows_of
from tests.nets import Apart, CifarResNet, TinyViT, UNet
from tests.zoo.tiny import causal

CLASSES = F.cross_entropy


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


def pruned(model, coupling, keep, x, emit="auto"):
    plan = gp.Plan.of(coupling, keep)
    return gp.rewrite(model, gp.Inputs.of(x), coupling, plan, emit=emit).model, plan


def once(model, coupling, keep, x, batches, **options):
    """Pruned and repaired in one shot without a ridge, and what the repair says."""
    small, plan = pruned(model, coupling, keep, x)
    return small, gp.repair(model, small, coupling, plan, batches, sequential=False, batchnorm=False, **options)


@pytest.fixture
def no_ridge(monkeypatch):
    monkeypatch.setattr(consumers, "RIDGE", 0.0)


def fitted(x, y, intercept):
    """The weight and bias with which x gives y best."""
    design = torch.cat([x, x.new_ones(len(x), 1)], 1) if intercept else x
    found = torch.linalg.lstsq(design, y, driver="gelsd").solution.T
    return (found[:, :-1], found[:, -1]) if intercept else (found, None)


def near(got, want, tolerance=1e-6):
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm()


# -- in one shot ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_refitted_to_its_outputs(bias):
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5, bias=bias)), torch.rand(2, 3))
    x = torch.randn(60, 3, generator=generator()).double()
    keep = [0, 2, 3, 6]
    small, said = once(model, coupling, {"0": keep}, x[:2], [x[:40], x[40:]])
    hidden = model[:2](x).detach()
    weight, shift = fitted(hidden[:, keep], model(x).detach(), bias)
    near(small[2].weight.detach(), weight)
    if bias:
        near(small[2].bias.detach(), shift)
    assert said.samples == 60
    assert said.ridges == {"2.weight": 0.0}
    assert not said.left
    assert 0 < said.repaired.error < 0.5 * said.pruned.error


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_a_batch_norm_behind_it_has_its_mean_shifted(groups):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1, groups=groups, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    )
    model, coupling = coupled(nn.Sequential(*net, nn.Conv2d(4, 2, 1)), torch.rand(2, 3, 8, 8))
    x = images(12)
    group = "0" if groups == 1 else "0:2x[4]"
    keep = [0, 2, 3, 6] if groups == 1 else [1, 2]
    small, said = once(model, coupling, {group: keep}, x[:2], [x])
    rows = rows_of(model[:2](x).detach(), model[2])
    output = model[:3](x).detach().transpose(0, 1).flatten(1).T
    columns = (torch.tensor(keep)[:, None] * 9 + torch.arange(9)).flatten()
    made = [
        fitted(rows[g][:, columns], output[:, g * 4 // groups : (g + 1) * 4 // groups], True) for g in range(groups)
    ]
    near(small[2].weight.detach().flatten(1), torch.cat([weight for weight, _ in made]))
    near(small[3].running_mean, model[3].running_mean - torch.cat([shift for _, shift in made]))
    assert torch.equal(small[3].running_var, model[3].running_var)
    assert said.repaired.error < said.pruned.error


@pytest.mark.usefixtures("no_ridge")
def test_a_convolution_with_nothing_to_shift_it_is_fitted_through_the_origin():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 2, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    x = images(8)
    small, _ = once(model, coupling, {"0": [1, 4, 5]}, x[:2], [x])
    rows = rows_of(model[:2](x).detach(), model[2])[0]
    columns = (torch.tensor([1, 4, 5])[:, None] * 4 + torch.arange(4)).flatten()
    weight, _ = fitted(rows[:, columns], rows @ model[2].weight.detach().flatten(1).T, False)
    near(small[2].weight.detach().flatten(1), weight)


@pytest.mark.usefixtures("no_ridge")
def test_the_projection_behind_attention_is_refitted_to_the_heads_and_dims_that_stay():
    model, coupling = coupled(TinyViT(Apart(heads=3, dim=4, vdim=3)), torch.rand(2, 3, 8, 8))
    x = images(30)
    seen = []
    hook = model.attention.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(x)
    hook.remove()
    rows = seen[0].flatten(0, 1)
    keep = {"attention.q:[3]x4": [0, 2], "attention.v:3x[3]": [1, 2]}
    small, said = once(model, coupling, keep, x[:2], [x])
    kept = [3 * head + dim for head in (0, 2) for dim in (1, 2)]
    wanted = rows @ model.attention.proj.weight.detach().T + model.attention.proj.bias.detach()
    weight, shift = fitted(rows[:, kept], wanted, True)
    near(small.attention.proj.weight.detach(), weight)
    near(small.attention.proj.bias.detach(), shift)
    assert list(said.ridges) == ["attention.proj.weight"]


@pytest.mark.usefixtures("no_ridge")
def test_all_taps_of_a_channel_are_replaced_alike_where_the_kernel_is_too_large(monkeypatch):
    monkeypatch.setattr(statistics, "UNFOLDED_LIMIT", 53)
    model, coupling = coupled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)), torch.rand(2, 3, 8, 8))
    x, keep, gone = images(8), [1, 4, 5], [0, 2, 3]
    small, said = once(model, coupling, {"0": keep}, x[:2], [x])
    rows = model[:2](x).detach().transpose(0, 1).flatten(1).T
    slopes, offsets = fitted(rows[:, keep], rows[:, gone], True)
    weight = model[2].weight.detach()
    near(small[2].weight.detach(), weight[:, keep] + torch.einsum("opyx,pk->okyx", weight[:, gone], slopes))
    near(small[2].bias.detach(), model[2].bias.detach() + torch.einsum("opyx,p->o", weight[:, gone], offsets))
    assert said.repaired.error < said.pruned.error


def test_dependent_channels_and_few_samples_get_a_ridge_which_is_reported(monkeypatch):
    monkeypatch.setattr(consumers, "RIDGE", 0.0)
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 5)), torch.rand(2, 3))
    x = torch.randn(6, 3, generator=generator()).double()
    _, said = once(model, coupling, {"0": range(12)}, x[:2], [x])
    assert 0 < said.ridges["2.weight"] < 1e-3
    assert said.repaired.error < 1e-3 * said.pruned.error  # six samples are met exactly


@pytest.mark.parametrize("in_sequence", [True, False])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_channels_whose_mean_is_large_beside_their_spread_are_fitted_and_constant_ones_are_made_good(
    in_sequence, spread
):
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 5)).eval()
    with torch.no_grad():
        model[0].weight.mul_(spread)
        model[0].bias.copy_(2000 + torch.arange(16))
    coupling = gp.couple(gp.trace(model, torch.rand(2, 3)))
    x = torch.randn(40, 3, generator=generator())
    small, plan = pruned(model, coupling, {"0": range(11), "2": range(9)}, x[:2])
    said = gp.repair(model, small, coupling, plan, [x], sequential=in_sequence)
    assert max(said.ridges.values()) <= 1e-2
    assert said.repaired.error < 1e-2 * said.pruned.error
    if spread:
        moved, wanted = ((net(x) - net(x).mean(0)).detach() for net in (small, model))
        near(moved, wanted, 0.3)


@pytest.mark.parametrize("kind", ["bias", "batch norm"])
def test_bias_alone_gives_back_the_mean_of_what_is_lost(kind):
    behind = [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)] if kind == "batch norm" else []
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, bias=not behind), *behind)
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    x, keep, gone = images(8), [1, 4, 5], [0, 2, 3]
    small, said = once(model, coupling, {"0": keep}, x[:2], [x], method="bias")
    lost = F.conv2d(model[:2](x)[:, gone], model[2].weight[:, gone], padding=1).mean((0, 2, 3)).detach()
    assert torch.equal(small[2].weight, model[2].weight[:, keep])
    if behind:
        near(small[3].running_mean, model[3].running_mean - lost)
    else:
        near(small[2].bias.detach(), model[2].bias.detach() + lost)
    assert not said.ridges
    assert said.repaired.error < said.pruned.error


def test_bias_alone_names_the_layers_that_have_none():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5, bias=False))
    model, coupling = coupled(net, torch.rand(2, 3))
    x = torch.randn(6, 3, generator=generator()).double()
    small, said = once(model, coupling, {"0": [1, 2]}, x[:2], [x], method="bias")
    assert said.left == {"2.weight": "it has no bias and no batch norm behind it to take the mean"}
    assert torch.equal(small[2].weight, model[2].weight[:, [1, 2]])


# -- shared tensors -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Hidden channels go through one matrix there and back; both heads share one bias; one layer is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8, bias=False)
        self.left, self.right, self.twice = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(8, 8)
        self.right.bias = self.left.bias

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu() @ self.b.weight
        z = self.twice(self.twice(x).relu()).relu()
        return self.left(x + z) + self.right(y.relu() - z)


@pytest.mark.parametrize("method", ["bias", "least_squares"])
@pytest.mark.parametrize("in_sequence", [True, False])
def test_tensors_that_several_parts_read_are_changed_for_all_of_them_or_not_at_all(method, in_sequence):
    model, coupling = coupled(Tied(), torch.rand(2, 4))
    x = torch.randn(64, 4, generator=generator()).double()
    keep = {g.name: range(g.size - 3) for g in coupling.groups}
    small, plan = pruned(model, coupling, keep, x[:2])
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    said = gp.repair(model, small, coupling, plan, [x], method=method, sequential=in_sequence, batchnorm=False)
    assert small.left.bias is small.right.bias
    assert torch.equal(small.b.weight, before["b.weight"])
    assert torch.equal(small.left.bias, before["left.bias"])
    assert "b.weight" in said.left
    if method == "least_squares":
        assert said.left["b.weight"] == consumers.SHARED
        assert not torch.equal(small.right.weight, before["right.weight"])
        if in_sequence:
            assert said.left["twice.weight"] == "it is called 2 times"
    assert 0 < said.repaired.error <= said.pruned.error


def test_the_embedding_of_a_language_model_is_not_refitted_as_its_head():
    model, inputs = causal("Llama", tie_word_embeddings=True)()
    ids = torch.randint(1, 97, (16, 9), generator=generator())
    coupling = gp.couple(gp.trace(model.eval(), inputs), norms="prune")
    plan = gp.allocate(gp.importance.Magnitude()(model, coupling), gp.Target(channels=0.7), coupling)
    small = gp.rewrite(model, gp.Inputs.of(inputs), coupling, plan).model
    before = small.lm_head.weight.clone()
    said = gp.repair(model, small, coupling, plan, [{"input_ids": ids}])
    assert torch.equal(small.lm_head.weight, before)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert said.left["model.embed_tokens.weight"] == consumers.SHARED
    assert said.repaired.error < said.pruned.error


class Normed(nn.Module):
    """A batch norm behind a convolution that takes another value, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.c = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 3, 1, bias=False),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 2, 1),
        )

    def forward(self, x):
        return self.c(self.norm(self.b(self.a(x).relu())).relu() + self.norm(x))


def test_the_mean_of_a_batch_norm_that_takes_other_values_too_is_not_shifted():
    model, coupling = coupled(Normed(), torch.rand(2, 3, 8, 8))
    x = images(8)
    small, said = once(model, coupling, {"a": [0, 1, 4]}, x[:2], [x])
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert said.repaired.error < said.pruned.error


# -- layer by layer -------------------------------------------------------------------------------------------------------------


def ridged(x, y, now, ridge):
    """Weight and bias with which x gives y best, the weight held near `now`: rows with the root of the ridge."""
    x, mean_x, mean_y = x - x.mean(0), x.mean(0), y.mean(0)
    hold = (ridge * x.square().mean() * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    found = torch.linalg.lstsq(torch.cat([x, hold]), torch.cat([y - mean_y, hold @ now.T]), driver="gelsd").solution.T
    return found, mean_y - found @ mean_x


def test_each_layer_is_fitted_to_the_original_from_what_the_repaired_ones_before_it_give():
    net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5))
    model, coupling = coupled(net, torch.rand(2, 3))
    x = torch.randn(80, 3, generator=generator()).double()
    keep = {"0": [0, 2, 3, 6, 8], "2": [1, 2, 5, 7]}
    small, plan = pruned(model, coupling, keep, x[:2])
    cut = {k: v.clone() for k, v in small.state_dict().items()}
    said = gp.repair(model, small, coupling, plan, [x[:50], x[50:]], batchnorm=False)
    assert said.samples == 80
    near(small[0].weight.detach(), cut["0.weight"])  # it loses no inputs
    near(small[0].bias.detach(), cut["0.bias"])
    wanted = {2: model[:3](x)[:, keep["2"]].detach(), 4: model(x).detach()}
    for k, y in wanted.items():
        weight, bias = ridged(small[:k](x).detach(), y, cut[f"{k}.weight"], sequential.RIDGE)
        near(small[k].weight.detach(), weight)
        near(small[k].bias.detach(), bias)
    assert said.ridges == dict.fromkeys(("0.weight", "2.weight", "4.weight"), sequential.RIDGE)
    assert said.repaired.error < 0.5 * said.pruned.error


class Blocks(nn.Module):
    """Two residual blocks, their last layers added to the stream as they are or behind a batch norm."""

    def __init__(self, normed):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
        self.inner = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(8, 6, 1, bias=not normed) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) if normed else nn.Identity() for _ in range(2))

    def streams(self, x):
        found = [self.stem(x)]
        for inner, outer, norm in zip(self.inner, self.outer, self.norms, strict=True):
            found.append(found[-1] + norm(outer(inner(found[-1]).relu())))
        return found

    def forward(self, x):
        return self.head(self.streams(x)[-1])


@pytest.mark.parametrize("normed", [False, True])
def test_the_last_layer_of_a_residual_block_is_fitted_to_what_the_stream_lacks_too(normed):
    model, coupling = coupled(Blocks(normed), torch.rand(2, 3, 4, 4))
    x = images(20, 4)
    small, plan = pruned(model, coupling, {"inner.0": [0, 2, 3, 6], "inner.1": [1, 2, 5, 7]}, x[:2])
    now = small.outer[1].weight.detach().flatten(1).clone()
    said = gp.repair(model, small, coupling, plan, [x], batchnorm=False)
    (_, stream, _), (_, mine, _) = model.streams(x), small.streams(x)
    assert (stream - mine).norm() > 0.01 * stream.norm()
    scale = (
        model.norms[1].weight / (model.norms[1].running_var + model.norms[1].eps).sqrt() if normed else torch.ones(6)
    )
    wanted = model.outer[1](model.inner[1](stream).relu()) + (stream - mine) / scale.view(-1, 1, 1)
    rows, wanted = (t.detach().transpose(0, 1).flatten(1).T for t in (small.inner[1](mine).relu(), wanted))
    weight, bias = ridged(rows, wanted, now, sequential.RIDGE)
    near(small.outer[1].weight.detach().flatten(1), weight)
    near(
        small.norms[1].running_mean if normed else small.outer[1].bias.detach(),
        model.norms[1].running_mean - bias if normed else bias,
    )
    assert said.repaired.error < 0.9 * said.pruned.error


def test_positions_are_thinned_out_evenly_in_what_is_fitted(monkeypatch):
    monkeypatch.setattr(sequential, "ROWS", 2)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    x = images(3)
    small, plan = pruned(model, coupling, {"0": [0, 2, 3]}, x)
    now = small[2].weight.detach().flatten(1).clone()
    said = gp.repair(model, small, coupling, plan, [x], batchnorm=False)
    got, want = (net.detach().flatten(2)[:, :, ::16].transpose(0, 1).flatten(1).T for net in (small[:2](x), model(x)))
    weight, _ = ridged(got, want, now, said.ridges["2.weight"])  # 2 * 6 columns / 3 samples: 4 of 64 positions
    near(small[2].weight.detach().flatten(1), weight)


class Halved(nn.Module):
    """Sizes that stand in the code as numbers: only a graph fits."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 12), nn.Linear(6, 5)

    def forward(self, x):
        a, b = self.mix(self.embed(x).relu()).view(x.shape[0], x.shape[1], 2, 6).unbind(2)
        return self.head((a.sigmoid() * b).mean(1))


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4, bias=False)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 7, 1), nn.ReLU(), nn.Flatten(), nn.Linear(112, 5)),
    )


NETS = {
    "resnet": (lambda: CifarResNet(1), lambda: images(12, 16), "module"),
    "resnet as a graph": (lambda: CifarResNet(1), lambda: images(12, 16), "graph"),
    "vit": (TinyViT, lambda: images(30), "module"),
    "vit with grafts": (TinyViT, lambda: images(30), "graft"),
    "groups go as a whole": (grouped, lambda: images(12), "module"),
    "transposed": (UNet, lambda: images(4, 16), "module"),
    "views": (Halved, lambda: torch.randn(30, 4, 3, generator=generator()).double(), "graph"),
}


@pytest.mark.parametrize("in_sequence", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_output_is_nearer_and_the_structure_stays(name, in_sequence):
    build, data, emit = NETS[name]
    x = data()
    model, coupling = coupled(build(), x[:2])
    held = {k: v.clone() for k, v in model.state_dict().items()}
    keep = {g.name: range(max(1, (2 * g.size) // 3)) for g in coupling.groups}
    small, plan = pruned(model, coupling, keep, x[:2], emit)
    shapes = {k: (v.shape, v.dtype) for k, v in small.state_dict().items()}
    kind, modes = type(small), [m.training for m in small.modules()]
    asked = [p.requires_grad for p in small.parameters()]
    batches = [x[: len(x) // 2], x[len(x) // 2 :]]
    said = gp.repair(model, small, coupling, plan, batches, sequential=in_sequence, batchnorm=False)
    assert plan.removed
    assert {k: (v.shape, v.dtype) for k, v in small.state_dict().items()} == shapes
    assert (type(small), [m.training for m in small.modules()]) == (kind, modes)
    assert [p.requires_grad for p in small.parameters()] == asked
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[key]), key
    assert said.samples == len(x)
    assert 0 < said.repaired.error < 0.9 * said.pruned.error
    want, got = model(x).detach(), small(x).detach()
    assert said.repaired.error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-6)
    assert said.left.keys() == ({"up1", "up2"} if name == "transposed" else set())


def test_a_model_that_runs_otherwise_than_it_was_recorded_is_repaired_too():
    class Guarded(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[2](self[1](x).sigmoid() if x.is_meta else self[1](x).relu())

    model, coupling = coupled(Guarded(nn.Linear(3, 9), nn.Linear(9, 8), nn.Linear(8, 5)), torch.rand(2, 3))
    x = torch.randn(60, 3, generator=generator()).double()
    keep = {g.name: range(g.size - 3) for g in coupling.groups}
    small, plan = pruned(model, coupling, keep, x[:2])
    said = gp.repair(model, small, coupling, plan, [x])
    assert set(said.ridges) == {"0.weight", "1.weight", "2.weight"}
    assert said.repaired.error < 0.9 * said.pruned.error


class Overwriting(nn.Module):
    """What the second layer reads is overwritten afterwards, through a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x)
        x.view(-1).mul_(-2)
        return y + self.c(x)


def test_layers_are_fitted_on_what_they_read_even_where_it_is_overwritten_later():
    model, coupling = coupled(Overwriting(), torch.rand(2, 3))
    x = torch.randn(60, 3, generator=generator()).double()
    small, plan = pruned(model, coupling, {"a": [0, 2, 3, 6]}, x[:2])
    now = small.b.weight.detach().clone()
    gp.repair(model, small, coupling, plan, [x], batchnorm=False)
    hidden = model.a(x).relu().detach()
    weight, _ = ridged(hidden[:, [0, 2, 3, 6]], model.b(hidden).detach(), now, sequential.RIDGE)
    near(small.b.weight.detach(), weight)


class Masked(nn.Module):
    """Two inputs, of which one holds no samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return self.b(self.a(x).relu() * scale)


def test_inputs_without_samples_are_not_joined_and_batches_with_others_are_left_out():
    scale, other = torch.rand(4, 1).double(), torch.rand(4, 1).double()
    model, coupling = coupled(Masked(), torch.rand(2, 4, 3), scale)
    x = [torch.randn(n, 4, 3, generator=generator(n)).double() for n in (4, 9, 2)]
    small, plan = pruned(model, coupling, {"a": [0, 2, 3, 6]}, (x[0], scale))
    said = gp.repair(model, small, coupling, plan, [(x[0], scale), (x[1], scale), (x[2], other)])
    assert said.samples == 13
    assert said.repaired.error < said.pruned.error


def test_repair_takes_samples_along_the_dim_that_the_criterion_says():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.gru(x)[0][-1])

    model = Steps().eval()
    batches = [(torch.randn(7, n, 3, generator=generator(n)), labels(n)) for n in (6, 5)]
    criterion = gp.importance.Fisher(batches, CLASSES, sample_dim=1)
    result = gp.prune(
        model, batches[0][0], target=gp.Target(channels=0.5), importance=criterion, repair="least_squares"
    )
    assert result.report.repair.samples == 11
    assert result.report.repair.left == {"gru": "it is recurrent: what it hands on to itself is not seen"}
    assert result.report.repair.repaired.error < result.report.repair.pruned.error


def test_no_more_samples_are_taken_than_fit_into_memory(monkeypatch):
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)), torch.rand(2, 3))
    monkeypatch.setattr(sequential, "MEMORY", 10 * (3 + 8) * 8)
    x = torch.randn(16, 3, generator=generator()).double()
    small, plan = pruned(model, coupling, {"0": range(6)}, x)
    assert gp.repair(model, small, coupling, plan, list(x.split(4))).samples == 8


def test_layers_that_are_not_fitted_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(sequential, "UNFOLDED_LIMIT", 20)
    net = nn.Sequential(
        *(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 7, 1), nn.ReLU(), nn.Flatten(2), nn.Conv1d(7, 6, 3), nn.ReLU()),
        *(nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 5, 1)), nn.ReLU(), nn.ConvTranspose1d(5, 4, 1)),
    )
    model, coupling = coupled(net, torch.rand(2, 3, 2, 3, 4))
    x = torch.randn(6, 3, 2, 3, 4, generator=generator()).double()
    keep = {g.name: range(g.size - 2) for g in coupling.groups}
    small, plan = pruned(model, coupling, keep, x)
    assert gp.repair(model, small, coupling, plan, [x]).left == {
        "2.weight": "convolutions over volumes are not unfolded",
        "5.weight": "each output has 21 weights, more than 20",
        "7": "its weight is computed",
        "9": "it is a transposed convolution",
    }


def test_repair_after_channels_that_a_norm_takes_statistics_over_are_gone():
    model = TinyViT().eval()
    batches = [(images(20).float(), labels(20))]
    result = gp.prune(
        model,
        batches[0][0][:2],
        target=gp.Target(channels=0.7),
        importance=gp.importance.Fisher(batches, CLASSES),
        norms="prune",
        repair="least_squares",
    )
    assert result.model.norm1.weight.numel() < 10
    assert 0 < result.report.repair.repaired.error < result.report.repair.pruned.error


# -- batch norm statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_train_mode_over_equal_batches():
    model, coupling = coupled(CifarResNet(1), torch.rand(2, 3, 16, 16))
    keep = {g.name: range(g.size // 2) for g in coupling.groups}
    batches = [images(16, 16, seed=s) for s in range(3)]
    small, plan = pruned(model, coupling, keep, batches[0][:2])
    small.load_state_dict({k: v + 9 if "running" in k else v for k, v in small.state_dict().items()})
    expected, _ = pruned(model, coupling, keep, batches[0][:2])
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.train()
            module.momentum = None
    for x in batches:
        expected(x)
    said = gp.repair(model, small, coupling, plan, batches, method="none")
    assert said.batchnorm
    assert said.repaired.error < said.pruned.error
    for (name, got), (_, want) in zip(small.named_buffers(), expected.named_buffers(), strict=True):
        if name.endswith("running_mean"):
            near(got, want)
        if name.endswith("running_var"):  # torch averages variances within batches, we take that of all samples
            near(got, want, 0.02)


def test_statistics_are_taken_back_where_they_do_not_help():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    x = images(6)
    small, plan = pruned(model, coupling, {"0": range(5)}, x)
    with torch.no_grad():
        small[3].weight.copy_(model[3].weight[:, :5])
    before = {k: v.clone() for k, v in small.state_dict().items()}
    said = gp.repair(model, small, coupling, plan, [x * 5 + 3], method="none")
    assert not said.batchnorm
    assert said.repaired == said.pruned
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[key]), key


# -- in prune, and in the report ---------------------------------------------------------------------------------------------------


def test_the_report_says_what_repair_did_and_was_worth():
    model = CifarResNet(1).eval()
    batches = [(images(8, 16, seed=s).float(), labels(8, 10)) for s in (1, 2)]
    held = {k: v.clone() for k, v in model.state_dict().items()}
    result = gp.prune(
        model,
        batches[0][0][:2],
        target=gp.Target(macs=0.6),
        importance=gp.importance.Taylor(batches, CLASSES),
        repair="least_squares",
        batchnorm=True,
    )
    text = str(result.report)
    said = result.report.repair
    assert "repaired  least_squares, on 16 of 16 samples; batch norm statistics" in text
    for title, quality in (("before pruning", said.original), ("pruned", said.pruned), ("repaired", said.repaired)):
        line = f"    {title:<15} loss {quality.loss:.4g}, output off by {quality.error:.3g}, same largest output for"
        assert f"{line} {quality.agreement:.1%}" in text
    assert f"fitted          {len(said.ridges)} layers, ridge 1e-03 to" in text
    assert "not repaired" not in text
    assert said.original.error == 0
    assert said.original.agreement == 1
    losses = torch.stack([CLASSES(model(x), y).detach() for x, y in batches])
    assert said.original.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert said.repaired.loss != said.pruned.loss
    assert result.report.verification.error <= 1e-9
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[key]), key


def test_layers_that_are_left_are_in_the_report():
    model, x = UNet().eval(), images(4, 16).float()
    result = gp.prune(model, x, target=gp.Target(channels=0.7), repair="least_squares", batches=[x])
    assert "not repaired    2 layers, such as up2: it is a transposed convolution" in str(result.report)


def test_repair_under_mixed_precision_fits_in_single_precision():
    model = TinyViT().eval()
    coupling = gp.couple(gp.trace(model, images(2).float()))
    x = images(30).float()
    made = {}
    for mixed in (False, True):
        small, plan = pruned(model, coupling, {g.name: range(2) for g in coupling.groups}, x[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            said = gp.repair(model, small, coupling, plan, [x])
        assert said.repaired.error < said.pruned.error
        made[mixed] = small.attention.proj.weight.detach()
    assert 0 < (made[True] - made[False]).norm() < 0.1 * made[False].norm()


def test_repair_of_nothing_changes_nothing():
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)), torch.rand(2, 3))
    x = torch.randn(16, 3, generator=generator()).double()
    small, plan = pruned(model, coupling, {"0": range(6)}, x)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    said = gp.repair(model, small, coupling, plan, [x], method="none")
    assert said.repaired == said.pruned
    assert said.samples == 0
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


# -- bad input --------------------------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)).eval()


X = torch.randn(4, 3, generator=generator())


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "the loader is empty"),
        (iter([X]), "used up after one pass; pass a list or a DataLoader"),
        (X, "batches=Tensor is no iterable of batches"),
        (None, "repair and batchnorm need batches: pass prune"),
    ],
)
@pytest.mark.parametrize("repair", ["least_squares", "bias"])
def test_batches_that_repair_cannot_use_are_refused(batches, match, repair):
    with pytest.raises(gp.GraphpruneError, match=match):
        gp.prune(net(), X, target=gp.Target(channels=0.5), repair=repair, batches=batches)


def test_a_calibration_is_no_batches():
    model = net()
    coupling = gp.couple(gp.trace(model, X))
    held = gp.calibrate(model, coupling, [X], statistics=["moments"])
    with pytest.raises(gp.InputError, match="repair and batchnorm need batches"):
        gp.prune(model, X, target=gp.Target(channels=0.5), importance=gp.importance.Activation(held), repair="bias")


def test_an_unknown_method_is_refused():
    model = net()
    coupling = gp.couple(gp.trace(model, X))
    small, plan = pruned(model, coupling, {"0": range(6)}, X)
    with pytest.raises(gp.InputError, match="repair='lstsq': it is one of none, bias, least_squares"):
        gp.repair(model, small, coupling, plan, [X], method="lstsq")


@pytest.mark.parametrize("in_sequence", [True, False])
def test_batches_that_are_not_finite_are_refused(in_sequence):
    model = net()
    coupling = gp.couple(gp.trace(model, X))
    small, plan = pruned(model, coupling, {"0": range(6)}, X)
    with pytest.raises(gp.CalibrationError, match="not finite"):
        gp.repair(model, small, coupling, plan, [X * float("nan")], sequential=in_sequence)


def test_weights_that_do_not_help_are_taken_back_and_the_report_says_so(monkeypatch):
    net, x = CifarResNet(1).eval(), torch.rand(4, 3, 32, 32)

    def worse(model, small, coupling, plan, inputs):
        return Change({name: torch.zeros_like(p) for name, p in small.named_parameters()}, {}, {})

    monkeypatch.setattr(recover, "refit", worse)
    plain = gp.prune(net, x[:1], target=gp.Target(channels=0.7))
    result = gp.prune(net, x[:1], target=gp.Target(channels=0.7), repair="least_squares", batches=[x])
    assert not result.report.repair.kept
    assert result.report.repair.repaired == result.report.repair.pruned
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), result.model.parameters(), strict=True))
    assert "taken back since it did not help" in str(result.report)


def test_the_report_says_how_many_of_the_samples_weights_were_fitted_on(monkeypatch):
    monkeypatch.setattr(sequential, "MEMORY", 0)
    batches = [torch.rand(4, 3, 32, 32), torch.rand(6, 3, 32, 32)]
    target = gp.Target(channels=0.7)
    report = gp.prune(CifarResNet(1).eval(), batches[0], target=target, repair="least_squares", batches=batches).report
    assert (report.repair.samples, report.repair.given) == (4, 10)
    assert "on 4 of 10 samples" in str(report)

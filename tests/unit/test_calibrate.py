"""The pass over the user's batches: what it collects, against the same figures from materialised masks and tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.calibrate import statistics
from graphprune.interpret import Replay
from tests.by_hand import along, brute_force, coupled, generator, images, labels, part, rows_of, singly
from tests.nets import Apart, Attention, CifarResNet, DenseBlock, TinyViT, UNet, Yolo, randomised

CLASSES = F.cross_entropy


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


def agree(found, q, tolerance=1e-10):
    """Counts first; then first and second moments and products."""
    assert int(found.count) == len(q)
    assert q.abs().max() > 1e-6
    for got, want in ((found.first, q.mean(0)), (found.second, q.square().mean(0)), (found.matrix, q.T @ q / len(q))):
        assert (got - want).norm() <= tolerance * want.norm()


# -- gradients ----------------------------------------------------------------------------------------------------------


STREAM = {
    **{f"layer1.{k}.conv1.weight": along(1) for k in range(3)},
    "layer2.0.conv1.weight": along(1),
    **{f"layer2.{k}.conv1.weight": along(1, part(8, 16, 32)) for k in (1, 2)},
    "layer3.0.conv1.weight": along(1, part(8, 16, 32)),
    **{f"layer3.{k}.conv1.weight": along(1, part(24, 16, 64)) for k in (1, 2)},
    "linear.weight": along(1, part(24, 16, 64)),
}
"""Everything that reads the channels of the first stage, which the padded shortcuts carry to the end."""


@pytest.fixture(scope="module")
def resnet():
    model, coupling = coupled(CifarResNet(3), torch.rand(2, 3, 16, 16))
    batches = [(images(3, 16), labels(3, 10)), (images(2, 16, seed=1), labels(2, 10))]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES)
    return model, coupling, batches, found


@pytest.mark.parametrize(
    ("group", "masked"),
    [
        ("layer1.1.conv1", {"layer1.1.conv2.weight": along(1)}),
        ("layer3.0.conv1", {"layer3.0.conv2.weight": along(1)}),
        ("conv1", STREAM),
        (
            "layer3.0.conv2[48:64]",
            {
                **{f"layer3.{k}.conv1.weight": along(1, part(48, 16, 64)) for k in (1, 2)},
                "linear.weight": along(1, part(48, 16, 64)),
            },
        ),
    ],
)
def test_gradients_of_resnet20_are_those_of_an_explicit_mask(resnet, group, masked):
    model, coupling, batches, found = resnet
    q = brute_force(model, masked, coupling.group(group).size, singly(batches), CLASSES)
    agree(found.gradients[group], q)
    losses = torch.stack([CLASSES(model(x), y).detach() for x, y in singly(batches)])
    assert found.loss == pytest.approx(float(losses.mean()))


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 7, 1), nn.ReLU(), nn.Flatten(), nn.Linear(28, 5)),
    )


def test_gradients_of_a_net_with_grouped_convolutions_are_those_of_an_explicit_mask():
    model, coupling = coupled(grouped(), torch.rand(2, 3, 8, 8))
    batches = [(images(3), labels(3)), (images(3, seed=1), labels(3))]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES).gradients
    masks = {
        "0:[4]x3": {"7.weight": along(1, lambda m: m.repeat_interleave(2))},
        "0:4x[3]": {"3.weight": along(1)},
        "3:4x[2]": {"7.weight": along(1, lambda m: m.repeat(4))},
        "7": {"10.weight": along(1, lambda m: m.repeat_interleave(4))},
    }
    assert found.keys() == masks.keys()
    for group, masked in masks.items():
        agree(found[group], brute_force(model, masked, coupling.group(group).size, singly(batches), CLASSES))


class Fast(Attention):
    """The same in one call of torch's attention."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


HEADS = {"attention.proj.weight": along(1, lambda m: m.repeat_interleave(4))}
FUSED = {
    "attention.qkv:3x[3]x4": HEADS,
    "attention.qkv:3x3x[4]": {
        "attention.qkv.weight": along(0, lambda m: torch.cat([m.repeat(3), m.new_ones(24)])),
        "attention.qkv.bias": along(0, lambda m: torch.cat([m.repeat(3), m.new_ones(24)])),
        "attention.proj.weight": along(1, lambda m: m.repeat(3)),
    },
    "mlp.0": {"mlp.2.weight": along(1)},
}
APART = {
    "attention.q:[3]x4": {"attention.proj.weight": along(1, lambda m: m.repeat_interleave(2))},
    "attention.q:3x[4]": {
        "attention.q.weight": along(0, lambda m: m.repeat(3)),
        "attention.q.bias": along(0, lambda m: m.repeat(3)),
    },
    "attention.v:3x[2]": {"attention.proj.weight": along(1, lambda m: m.repeat(3))},
    "mlp.0": {"mlp.2.weight": along(1)},
}


@pytest.mark.parametrize(
    ("attention", "masks"), [(None, FUSED), (Fast(10, 3, 4), FUSED), (Apart(), APART)], ids=["matmul", "sdpa", "bmm"]
)
def test_gradients_of_a_vit_are_those_of_an_explicit_mask(attention, masks):
    model, coupling = coupled(TinyViT(attention), torch.rand(2, 3, 8, 8))
    batches = [(images(3), labels(3)), (images(4, seed=1), labels(4)), (images(1, seed=2), labels(1))]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES).gradients
    assert found.keys() == masks.keys()
    for group, masked in masks.items():
        agree(found[group], brute_force(model, masked, coupling.group(group).size, singly(batches), CLASSES))


class Stream(nn.Module):
    """Layers from a residual stream straight back into it."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.mix, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 6),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.conv(x).relu()).mean((2, 3))
        return self.head(x + self.mix(x).relu())


def test_gradients_of_a_stream_that_layers_read_and_write_are_those_of_an_explicit_mask():
    model, coupling = coupled(Stream(), torch.rand(2, 3, 8, 8))
    batches = [(images(3), labels(3))]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES).gradients
    masked = {"conv.weight": along(1), "mix.weight": along(1), "head.weight": along(1)}
    agree(found["stem"], brute_force(model, masked, 6, singly(batches), CLASSES))


READ_ALONG = {nn.Conv2d: 1, nn.Linear: 1, nn.ConvTranspose2d: 0}


@pytest.mark.parametrize(
    ("build", "groups"),
    [(UNet, 12), (lambda: Yolo(4, 1), 57), (lambda: DenseBlock(4), 5)],
    ids=["unet", "yolo", "dense"],
)
def test_mean_gradients_are_those_of_the_weights_that_read_the_channels(build, groups):
    """The derivative by a mask is the sum of weight times its gradient over all weights that the mask multiplies."""
    model, coupling = coupled(build(), torch.rand(2, 3, 32, 32))
    x = images(3, 32)

    def loss(output):
        return output.sigmoid().flatten(1).square().sum(1)

    found = gp.calibrate(model, coupling, [x[:2], x[2:]], statistics=["gradients"], loss=loss).gradients
    parameters = dict(model.named_parameters())
    asked = [p for p in parameters.values() if p.requires_grad]
    gradients = dict(zip(map(id, asked), torch.autograd.grad(loss(model(x)).sum(), asked), strict=True))
    want = {g.name: torch.zeros(g.size).double() for g in coupling.groups}
    for path, module in model.named_modules():
        dim = READ_ALONG.get(type(module))
        if dim is None or not module.weight.requires_grad:
            continue
        products = (module.weight.detach() * gradients[id(module.weight)]).transpose(0, dim).flatten(1).sum(1)
        axis = coupling.dims[coupling.slot(f"{path}.weight")][dim]
        for name, atom in coupling.atoms.items():
            at, which = coupling.axes.places(axis, {atom: 0})
            want[name].index_add_(0, torch.from_numpy(which), products[torch.from_numpy(at)])
    assert len(found) == groups
    for name, held in found.items():
        assert (held.total - want[name]).norm() <= 1e-9 * want[name].norm(), name


# -- samples ------------------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Attention inside 2 x 2 windows of a 4 x 4 grid: windows are merged into the batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, 10), Attention(10, 3, 4), nn.Linear(10, 5)

    def forward(self, x):
        b = x.shape[0]
        x = self.embed(x.permute(0, 2, 3, 1)).view(b, 2, 2, 2, 2, 10).permute(0, 1, 3, 2, 4, 5)
        x = self.attention(x.reshape(b * 4, 4, 10)).view(b, 16, 10)
        return self.head(x.mean(1))


def test_samples_are_told_apart_where_windows_are_merged_into_the_batch():
    model, coupling = coupled(Windows(), torch.rand(2, 3, 4, 4))
    batches = [(images(3, 4), labels(3)), (images(2, 4, seed=1), labels(2))]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES).gradients
    agree(found["attention.qkv:3x[3]x4"], brute_force(model, HEADS, 3, singly(batches), CLASSES))
    assert int(found["attention.qkv:3x3x[4]"].count) == 5


class SequenceFirst(nn.Module):
    """(time, batch, features): torch's own attention, which merges batch and heads, and a GRU."""

    def __init__(self):
        super().__init__()
        self.attention, self.gru = nn.MultiheadAttention(6, 3), nn.GRU(6, 7)
        self.mlp, self.out = nn.Linear(7, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.mlp(self.gru(x)[0]).relu())


def last_step(output, target):
    return CLASSES(output[-1], target)


def test_samples_are_told_apart_in_models_that_take_time_first():
    model, coupling = coupled(SequenceFirst(), torch.rand(8, 2, 6))
    batches = [(torch.randn(8, n, 6, generator=generator(n)).double(), labels(n)) for n in (3, 2, 1)]
    options = {"statistics": ["products"], "loss": last_step, "sample_dim": 1}
    found = gp.calibrate(model, coupling, batches, **options).gradients
    first = along(0, lambda m: torch.cat([m.repeat(3), m.new_ones(12)]))  # of queries, keys and values
    masks = {
        "mlp": {"out.weight": along(1)},
        "gru.weight_ih_l0:3x[7]": {"mlp.weight": along(1)},
        "attention.in_proj_weight:3x[3]x2": {"attention.out_proj.weight": along(1, lambda m: m.repeat_interleave(2))},
        "attention.in_proj_weight:3x3x[2]": {
            "attention.in_proj_weight": first,
            "attention.in_proj_bias": first,
            "attention.out_proj.weight": along(1, lambda m: m.repeat(3)),
        },
    }
    assert masks.keys() == found.keys()
    for group, masked in masks.items():
        agree(found[group], brute_force(model, masked, coupling.group(group).size, singly(batches, 1), last_step))
    alone = gp.calibrate(model, coupling, [(x, y) for x, y in singly(batches, 1)], **options).gradients
    for group in found:
        torch.testing.assert_close(found[group].products, alone[group].products, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sizes", [(8, 12, 8), (12,), (8, 10, 12)])
def test_batches_of_several_shapes_add_up_to_the_samples_one_by_one(sizes):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    batches = [(images(k + 1, size), labels(k + 1)) for k, size in enumerate(sizes)]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES)
    agree(found.gradients["0"], brute_force(model, {"4.weight": along(1)}, 6, singly(batches), CLASSES))
    assert found.samples == sum(k + 1 for k in range(len(sizes)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_may_be_a_mean_a_sum_or_one_number_per_sample(reduction):
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), torch.rand(2, 3))
    batches = [(torch.randn(n, 3, generator=generator(n)).double(), labels(n)) for n in (1, 4, 2, 1)]

    def loss(output, target):
        return CLASSES(output, target, reduction=reduction)

    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=loss)
    agree(found.gradients["0"], brute_force(model, {"2.weight": along(1)}, 6, singly(batches), CLASSES))


class Positions(nn.Module):
    """A network on positions alone is added to every sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 5)
        self.mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4))
        self.register_buffer("grid", torch.randn(7, 2))

    def forward(self, x):
        return self.head((self.embed(x) + self.mlp(self.grid)).relu().mean(1))


def test_a_value_without_samples_counts_once_and_each_sample_has_its_share_of_the_gradient():
    model, coupling = coupled(Positions(), torch.rand(2, 7, 3))
    batches = [(torch.randn(n, 7, 3, generator=generator(n)).double(), labels(n)) for n in (3, 2)]
    found = gp.calibrate(model, coupling, batches, statistics=["products", "activations"], loss=CLASSES)
    q = brute_force(model, {"mlp.2.weight": along(1)}, 6, singly(batches), CLASSES)
    torch.testing.assert_close(found.gradients["mlp.0"].total, q.sum(0), rtol=1e-10, atol=0)
    shown = model.mlp[1](model.mlp[0](model.grid)).detach()
    activations = found.activations["mlp.0"]
    torch.testing.assert_close(activations.mean, shown.mean(0))
    torch.testing.assert_close(activations.variance, shown.var(0, correction=0))
    torch.testing.assert_close(activations.zeros / activations.count, (shown == 0).double().mean(0))


class Biased(nn.Module):
    """Attention with an additive mask, an input without samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.head = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x, bias):
        y = self.embed(x).relu()
        return self.head(self.proj((x @ x.mT + bias).softmax(-1) @ y).relu().mean(1))


def test_an_input_without_samples_is_not_taken_for_one_whose_first_dim_is_as_long():
    model, coupling = coupled(Biased(), torch.rand(2, 4, 3), torch.rand(4, 4))
    bias = torch.randn(4, 4, generator=generator()).double()
    batches = [(torch.randn(n, 4, 3, generator=generator(n)).double(), bias, labels(n)) for n in (4, 2)]
    found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES).gradients
    samples = [(x[n : n + 1], bias, y[n : n + 1]) for x, _, y in batches for n in range(len(x))]
    agree(found["embed"], brute_force(model, {"proj.weight": along(1)}, 6, samples, CLASSES))
    agree(found["proj"], brute_force(model, {"head.weight": along(1)}, 4, samples, CLASSES))


class Halves(nn.Module):
    """The two halves of a batch meet, as the frames of a pair do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x):
        first, second = self.a(x).relu().chunk(2)
        return self.b(torch.cat([first, second + first]))


def test_a_batch_that_the_model_cuts_into_pieces_is_refused():
    model, coupling = coupled(Halves(), torch.rand(4, 3))
    with pytest.raises(gp.CalibrationError, match="pass batches of one sample"):
        gp.calibrate(model, coupling, [torch.rand(4, 3).double()], statistics=["activations"])


# -- activations, ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [(nn.Flatten(), nn.Linear(216, 5)), (nn.Conv2d(6, 5, 1),)], ids=["flat", "conv"])
def test_activations_are_those_of_the_values_that_layers_read(rest):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *rest)
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    batches = [images(3), images(2, seed=1)]
    found = gp.calibrate(model, coupling, batches, statistics=["activations"])
    shown = model[:2](torch.cat(batches)).transpose(0, 1).flatten(1).detach()
    held = found.activations["0"]
    assert (held.zeros > 0).any()
    assert held.count.tolist() == [5 * 36] * 6
    torch.testing.assert_close(held.zeros, (shown == 0).double().sum(1))
    torch.testing.assert_close(held.magnitude, shown.abs().sum(1))
    torch.testing.assert_close(held.squares, shown.square().sum(1))
    torch.testing.assert_close(held.mean, shown.mean(1))
    torch.testing.assert_close(held.variance, shown.var(1, correction=0))


class Branches(nn.Module):
    """One value read twice and another once, all with the channels of the stem; what is flattened is an image still."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right, self.late = (nn.Conv2d(6, n, 1) for n in (2, 4, 5))
        self.group, self.head = nn.Conv2d(6, 9, 3, groups=3), nn.Linear(16 * 11 + 36 * 9, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        y = F.max_pool2d(x, 2)
        joined = torch.cat([self.left(y), self.right(y), self.late(y)], 1).relu()
        return self.head(torch.cat([joined.flatten(1), self.group(x).relu().flatten(1)], 1))


def loop_of_ranks(*values):
    """Sums of `matrix_rank` of every map of every value, (channels,)."""
    return sum(
        torch.tensor([[float(torch.linalg.matrix_rank(m)) for m in sample] for sample in value]).double().sum(0)
        for value in values
    )


def test_ranks_are_those_of_a_loop_over_the_maps():
    model, coupling = coupled(Branches(), torch.rand(2, 3, 8, 8))
    model.float()
    flat = torch.rand(2, 3, 8, 8) * torch.rand(2, 3, 1, 1)
    flat[1] = flat[1, :, :1]  # every row is the same: maps of low rank
    batches = [images(3).float(), flat]
    found = gp.calibrate(model, coupling, batches, statistics=["ranks"]).ranks
    with torch.no_grad():
        x = torch.cat(batches)
        stem = model.stem(x).relu()
        y = F.max_pool2d(stem, 2)
        inner = {"left": model.left(y).relu(), "right": model.right(y).relu(), "late": model.late(y).relu()}
        groups = loop_of_ranks(model.group(stem).relu()).view(3, 3)
    stem = loop_of_ranks(stem, y).view(3, 2)
    assert set(found) == {"stem:[3]x2", "stem:3x[2]", "left", "right", "late", "group:3x[3]"}
    assert len(set(stem.flatten().tolist())) > 1
    torch.testing.assert_close(found["stem:3x[2]"].total, stem.sum(0))
    torch.testing.assert_close(found["stem:[3]x2"].total, loop_of_ranks(y).view(3, 2).sum(1) + groups.sum(1))
    for name, value in inner.items():
        torch.testing.assert_close(found[name].total, loop_of_ranks(value))
        torch.testing.assert_close(found[name].normalised, loop_of_ranks(value) / (5 * 4))
    assert found["group:3x[3]"].count.tolist() == [15.0] * 3
    torch.testing.assert_close(found["group:3x[3]"].total, groups.sum(0))


# -- moments ------------------------------------------------------------------------------------------------------------


CONVOLUTIONS = {
    "plain": ((3, 8, 8), lambda: nn.Conv2d(6, 4, 3)),
    "strided": ((3, 9, 8), lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 2))),
    "dilated": ((3, 9, 9), lambda: nn.Conv2d(6, 4, 3, dilation=(2, 1), padding=1)),
    "grouped": ((3, 8, 8), lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2)),
    "same": ((3, 8, 7), lambda: nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(3, 1))),
    "valid": ((3, 8, 7), lambda: nn.Conv2d(6, 4, 3, padding="valid")),
    "one tap": ((3, 8, 7), lambda: nn.Conv2d(6, 4, 1)),
    "one tap, strided": ((3, 8, 7), lambda: nn.Conv2d(6, 4, 1, stride=2)),
    "one tap, padded": ((3, 8, 7), lambda: nn.Conv2d(6, 4, 1, padding=1)),
    "conv1d": ((3, 11), lambda: nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2)),
    "conv1d same": ((3, 11), lambda: nn.Conv1d(6, 4, 4, padding="same")),
    "conv3d one tap": ((3, 4, 5, 4), lambda: nn.Conv3d(6, 4, 1)),
    "conv3d one tap, strided": ((3, 5, 4, 6), lambda: nn.Conv3d(6, 4, 1, stride=(2, 1, 3))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_of_a_convolution_are_those_of_its_unfolded_input(name):
    shape, build = CONVOLUTIONS[name]
    torch.manual_seed(0)
    conv = build()
    first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1](3, 6, 1)
    model, coupling = coupled(nn.Sequential(first, nn.ReLU(), conv), torch.rand(2, *shape))
    batches = [torch.randn(n, *shape, generator=generator(n)).double() for n in (3, 2)]
    found = gp.calibrate(model, coupling, batches, statistics=["moments"]).moments["2.weight"]
    rows = rows_of(model[:2](torch.cat(batches)).detach(), conv)
    output = model(torch.cat(batches)).detach()
    weight = conv.weight.detach().flatten(1).view(conv.groups, -1, rows.shape[2])
    made = torch.einsum("grc,goc->gor", rows, weight).flatten(0, 1) + conv.bias.detach()[:, None]
    torch.testing.assert_close(made, output.transpose(0, 1).flatten(1))  # the rows are what they should be
    assert int(found.count) == rows.shape[1]
    torch.testing.assert_close(found.mean, rows.mean(1))
    torch.testing.assert_close(found.second, rows.mT @ rows / rows.shape[1])


def test_moments_are_of_the_channels_alone_where_the_kernel_is_too_large(monkeypatch):
    monkeypatch.setattr(statistics, "UNFOLDED_LIMIT", 53)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    found = gp.calibrate(model, coupling, [images(3)], statistics=["moments"]).moments["2.weight"]
    rows = model[:2](images(3)).detach().transpose(0, 1).flatten(1).T
    assert found.taps == 1
    torch.testing.assert_close(found.second[0], rows.T @ rows / len(rows))


def test_moments_are_the_same_in_pieces(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3))
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    whole = gp.calibrate(model, coupling, [images(5)], statistics=["moments"]).moments["2.weight"]
    monkeypatch.setattr(statistics, "CHUNK", 2 * 6 * 64 * 9)
    pieces = gp.calibrate(model, coupling, [images(5)], statistics=["moments"]).moments["2.weight"]
    assert int(whole.count) == int(pieces.count) == 5 * 36
    torch.testing.assert_close(whole.products, pieces.products)


class Transposed(nn.Module):
    """A weight stored (inputs, outputs), as GPT-2 has it."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Transposed(6, 4)], ids=["linear", "addmm"])
def test_moments_of_a_linear_layer_are_over_samples_and_tokens(layer):
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), layer), torch.rand(2, 7, 3))
    batches = [torch.randn(n, 7, 3, generator=generator(n)).double() for n in (3, 2)]
    found = gp.calibrate(model, coupling, batches, statistics=["moments"]).moments["2.weight"]
    rows = model[:2](torch.cat(batches)).detach().flatten(0, 1)
    assert int(found.count) == 35
    torch.testing.assert_close(found.second[0], rows.T @ rows / 35)


class Shared(nn.Module):
    """One layer called on two values."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.shared(x) + self.shared(x.flip(3) * 2)).relu())


def test_moments_of_a_layer_called_twice_add_up():
    model, coupling = coupled(Shared(), torch.rand(2, 3, 8, 8))
    found = gp.calibrate(model, coupling, [images(3)], statistics=["moments"]).moments["shared.weight"]
    x = model.stem(images(3)).relu().detach()
    rows = rows_of(torch.cat([x, x.flip(3) * 2]), model.shared)[0]
    assert int(found.count) == 2 * 3 * 64
    torch.testing.assert_close(found.second[0], rows.T @ rows / len(rows))


def test_means_come_without_the_products():
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), torch.rand(2, 3))
    x = torch.randn(4, 3, generator=generator()).double()
    found = gp.calibrate(model, coupling, [x], statistics=["means"]).moments["2.weight"]
    torch.testing.assert_close(found.mean[0], model[:2](x).mean(0).detach())
    with pytest.raises(gp.CalibrationError, match=r"statistics=\('moments',\)"):
        _ = found.second


# -- how the model is run -------------------------------------------------------------------------------------------------


class Guarded(nn.Module):
    """Goes another way without values than with them."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.b(x.sigmoid() if x.is_meta else x.relu())


class Plain(Guarded):
    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


def test_a_model_that_runs_otherwise_than_it_was_recorded_runs_as_its_exported_program():
    x = torch.rand(2, 3)
    (odd, coupling), (plain, _) = coupled(Guarded(), x), coupled(Plain(), x)
    plain.load_state_dict(odd.state_dict())
    batches = [(torch.randn(n, 3, generator=generator(n)).double(), labels(n)) for n in (4, 4, 3)]
    asked = {"statistics": ["products", "activations", "moments"], "loss": CLASSES}
    found = gp.calibrate(odd, coupling, batches, **asked)
    want = gp.calibrate(plain, gp.couple(gp.trace(plain, x.double())), batches, **asked)
    assert found.samples == want.samples == 11
    assert found.loss == pytest.approx(want.loss, rel=1e-12)
    torch.testing.assert_close(found.gradients["a"].products, want.gradients["a"].products)
    torch.testing.assert_close(found.activations["a"].zeros, want.activations["a"].zeros)
    torch.testing.assert_close(found.moments["b.weight"].products, want.moments["b.weight"].products)
    q = brute_force(plain, {"b.weight": along(1)}, 6, singly(batches), CLASSES)
    agree(found.gradients["a"], q)


class Laid(Fast):
    """Asks for memory in order, which some kernels give unasked, and starts a cache on the device of its input."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
        return x + torch.cat([torch.tensor([], device=x.device), self.proj(y.view(b, n, -1))])


def test_a_model_whose_memory_is_laid_out_otherwise_than_it_was_recorded_is_played_all_the_same():
    model, inputs = randomised(TinyViT(Laid(10, 3, 4))), gp.Inputs((images(2).float(),), {})
    replay, met = Replay(model), []
    with torch.no_grad():
        output = replay.run(inputs, lambda node, *_: met.append(node.op))
    assert replay.program(inputs).source is None
    assert met.count("scaled_dot_product_attention") == 1
    torch.testing.assert_close(output, model(*inputs.args).detach())


CALLS = []


class Turning(nn.Module):
    """Goes another way from the second batch on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x):
        if not x.is_meta:
            CALLS.append(1)
        x = self.a(x)
        return self.b(x.sigmoid() if len(CALLS) > 1 else x.relu())


def test_a_model_that_goes_another_way_on_a_later_batch_is_refused():
    model, coupling = coupled(Turning(), torch.rand(2, 3))
    CALLS.clear()
    with pytest.raises(gp.CalibrationError, match="batch 1: the model does not run as it was traced"):
        gp.calibrate(model, coupling, [X, X], statistics=["moments"])


class Restless(nn.Module):
    """Counts its calls, draws random numbers, and has dropout and a batch norm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.drop = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        return self.b(self.drop(self.norm(self.a(x)).relu())) + 0 * torch.rand(5, dtype=x.dtype)


def failing(output, target):
    raise ZeroDivisionError("no such loss")


@pytest.mark.parametrize("loss", [CLASSES, failing])
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(loss, mode):
    model, coupling = coupled(Restless(), torch.rand(2, 3))
    model.train(mode)
    model.norm.eval()
    model.a.bias.requires_grad_(False)
    model.b.weight.grad = torch.ones(5, 6).double()
    called = []
    model.a.register_forward_hook(lambda *_: called.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    batches = [(torch.randn(n, 3, generator=generator(n)).double(), labels(n)) for n in (4, 3)]
    arguments = {"statistics": ["gradients", "moments", "ranks", "activations"], "loss": loss}
    if loss is failing:
        with pytest.raises(ZeroDivisionError):
            gp.calibrate(model, coupling, batches, **arguments)
    else:
        gp.calibrate(model, coupling, batches, **arguments)
    assert called
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["a.bias"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["b.weight"]
    assert torch.equal(model.b.weight.grad, torch.ones(5, 6).double())
    assert len(model.a._forward_hooks) == 1
    assert not model.seen
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_statistics_can_be_collected_where_gradients_are_switched_off(off):
    model, coupling = coupled(Plain(), torch.rand(2, 3))
    batches = [(torch.randn(4, 3, generator=generator()).double(), labels(4))]
    with off():
        batches = [(x.clone(), y.clone()) for x, y in batches]
        found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES)
    samples = singly([(x.clone(), y.clone()) for x, y in batches])
    agree(found.gradients["a"], brute_force(model, {"b.weight": along(1)}, 6, samples, CLASSES))


def test_mixed_precision_is_close_to_single_precision():
    model, coupling = coupled(TinyViT(), torch.rand(2, 3, 8, 8))
    model.float()
    batches = [(images(8, seed=s).float(), labels(8)) for s in range(2)]
    asked = {"statistics": ["products", "activations", "moments"], "loss": CLASSES}
    want = gp.calibrate(model, coupling, batches, **asked)
    with torch.autocast("cpu", torch.bfloat16):
        found = gp.calibrate(model, coupling, batches, **asked)
    for name in want.gradients:  # bfloat16 has 8 bits, and errors add up over the layers
        for got, exact in (
            (found.gradients[name].products, want.gradients[name].products),
            (found.activations[name].squares, want.activations[name].squares),
        ):
            assert 0 < (got - exact).norm() < 0.05 * exact.norm()
    for name, held in want.moments.items():
        assert (found.moments[name].products - held.products).norm() < 0.05 * held.products.norm()


# -- batches in any form --------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Arguments by name; may compute its own loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x, shift=None, labels=None):
        logits = self.b(self.a(x).relu() + (0 if shift is None else shift))
        return {"logits": logits, "loss": CLASSES(logits, labels) if labels is not None else None}


def test_batches_may_be_tensors_tuples_mappings_or_pairs():
    net = Named()
    x, y = torch.randn(4, 3, generator=generator()).double(), labels(4)
    model, coupling = coupled(net, x)

    def by_output(output, target):
        return CLASSES(output["logits"], target)

    forms = {
        "tuple": ([(x, y)], by_output),
        "list": ([[x, y]], by_output),
        "mapping with labels": ([{"x": x, "labels": y}], lambda out, batch: out["loss"]),
        "mapping, loss by hand": ([{"x": x, "labels": y}], lambda out, batch: CLASSES(out["logits"], batch["labels"])),
        "mapping and target": ([({"x": x}, y)], by_output),
        "inputs and target": ([(gp.Inputs((x,), {}), y)], by_output),
        "tensor": ([x], lambda output: output["logits"].square().mean()),
        "one-tuple": ([(x,)], lambda output: output["logits"].square().mean()),
        "several targets": ([(x, y, y)], lambda output, targets: by_output(output, targets[1])),
        "loader": (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3), by_output),
        "generator": (iter([(x, y)]), by_output),
    }
    plain = brute_force(model, {"b.weight": along(1)}, 6, singly([(x, y)]), by_output)
    squares = brute_force(
        model, {"b.weight": along(1)}, 6, singly([(x, y)]), lambda out, _: out["logits"].square().mean()
    )
    for name, (batches, loss) in forms.items():
        found = gp.calibrate(model, coupling, batches, statistics=["products"], loss=loss)
        agree(found.gradients["a"], squares if name in ("tensor", "one-tuple") else plain)


class Switched(nn.Module):
    """Arguments that are no tensors decide what is computed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x, power=1, labels=None):
        x = self.a(x).relu()
        return self.b(x**power if power > 1 else x)


def test_batches_of_the_same_shapes_may_have_other_arguments():
    model, coupling = coupled(Switched(), torch.rand(2, 3))
    x = torch.randn(4, 3, generator=generator()).double()
    batches = [{"x": x}, {"x": x, "power": 2}, {"x": x, "power": 3}]
    found = gp.calibrate(model, coupling, batches, statistics=["means"])
    read = model.a(x).relu().detach()
    torch.testing.assert_close(found.moments["b.weight"].total[0], (read + read**2 + read**3).sum(0))


def test_a_progress_bar_is_shown_where_it_is_asked_for(capfd):
    model, coupling = coupled(Plain(), torch.rand(2, 3))
    for progress in (True, False):
        gp.calibrate(model, coupling, [torch.rand(2, 3).double()], statistics=["moments"], progress=progress)
        assert ("calibrating" in capfd.readouterr().err) == progress


# -- bad input ------------------------------------------------------------------------------------------------------------


def pair():
    return coupled(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)), torch.rand(2, 3))


X, Y = torch.randn(4, 3, generator=generator()).double(), labels(4)
WEIGHTS = torch.tensor([1.0, 20, 3, 4, 50]).double()


def used_up():
    batches = iter([(X, Y)])
    list(batches)
    return batches


BAD_BATCHES = {
    "empty": ([], "the loader is empty"),
    "used up": (used_up(), "already used up"),
    "a tensor": (X, "is no iterable of batches"),
    "a mapping": ({"x": X}, "is no iterable of batches"),
    "nothing": (None, "is no iterable of batches"),
    "labels missing": ([X], "the batches have no targets: pass .inputs, targets."),
    "NaN inputs": ([(X * float("nan"), Y)], "batch 0: the model.s output is not finite: the batch is not"),
    "infinite inputs": ([(X, Y), (X / 0, Y)], "batch 1: the model.s output is not finite: the batch is not"),
    "empty batch": ([(X[:0], Y[:0])], "all example inputs are empty"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_that_cannot_be_used_are_refused_with_the_cure(name):
    batches, match = BAD_BATCHES[name]
    model, coupling = pair()
    with pytest.raises(gp.GraphpruneError, match=match):
        gp.calibrate(model, coupling, batches, statistics=["gradients"], loss=CLASSES)


def test_batches_with_too_few_parts_are_refused():
    model, coupling = coupled(Biased(), torch.rand(2, 4, 3), torch.rand(4, 4))
    with pytest.raises(gp.CalibrationError, match="batch 0 has 1 part, but the model was traced with 2 inputs"):
        gp.calibrate(model, coupling, [[torch.rand(2, 4, 3).double()]], statistics=["moments"])


BAD_LOSSES = {
    "weighted mean": (lambda out, y: CLASSES(out, y, weight=WEIGHTS), "no sum or mean of one loss per sample"),
    "batch statistics": (lambda out, y: CLASSES(out - out.mean(0), y), "no sum or mean of one loss per sample"),
    "a table": (lambda out, y: out, r"the loss has shape \(4, 5\); return one number"),
    "a number": (lambda out, y: 3.0, "the loss returns float; return a tensor"),
    "no gradient": (lambda out, y: CLASSES(out.detach(), y), "it has no gradient"),
    "NaN": (
        lambda out, y: CLASSES(out, y) * float("nan"),
        "batch 0: the loss is nan though the model.s output is finite",
    ),
    "not for a part": (lambda out, y: CLASSES(out, Y), "(?s)fails on a part of a batch, ValueError.*reduction='none'"),
    "NaN gradient": (
        lambda out, y: (out - out).abs().sum().sqrt(),
        "batch 0: the gradient at linear in 2 is not finite",
    ),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused_with_the_cure(name):
    loss, match = BAD_LOSSES[name]
    model, coupling = pair()
    with pytest.raises(gp.CalibrationError, match=match):
        gp.calibrate(model, coupling, [(X, Y)], statistics=["gradients"], loss=loss)


class Rooted(nn.Module):
    """NaN from one layer on, hidden from the output or not."""

    def __init__(self, hidden):
        super().__init__()
        self.a, self.b, self.c, self.hidden = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 1), hidden

    def forward(self, x):
        x = self.c(self.b((self.a(x) - 100).sqrt()).relu()).mean((2, 3))
        return torch.nan_to_num(x) if self.hidden else x


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("statistic", ["gradients", "activations", "ranks", "moments", "means"])
def test_activations_that_are_not_finite_are_refused_with_the_layer(statistic, hidden):
    model, coupling = coupled(Rooted(hidden), torch.rand(2, 3, 8, 8))
    where = r"not finite.*: the first such values come out of sqrt in the model itself \(test_calibrate.py:"
    with pytest.raises(gp.CalibrationError, match=f"batch 0: .*{where}"):
        gp.calibrate(model, coupling, [(images(2), labels(2))], statistics=[statistic], loss=CLASSES)


def test_a_layer_whose_weights_are_not_finite_is_named():
    model, coupling = pair()
    with torch.no_grad():
        model[0].weight[2, 1] = float("inf")
    with pytest.raises(gp.CalibrationError, match="not finite: the first such values come out of linear in 0"):
        gp.calibrate(model, coupling, [X], statistics=["moments"])


def test_batches_of_shapes_at_which_the_groups_are_others_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y.relu() if x.shape[2] < 9 else y.softmax(1))

    model, coupling = coupled(Odd(), torch.rand(2, 3, 8, 8))
    with pytest.raises(gp.CalibrationError, match="use example inputs like the batches"):
        gp.calibrate(model, coupling, [images(2), images(2, 9)], statistics=["moments"])


def test_arguments_that_cannot_be_honoured_are_refused():
    model, coupling = pair()
    with pytest.raises(gp.InputError, match=r"statistics=\['rank'\]: they are gradients, products"):
        gp.calibrate(model, coupling, [X], statistics=["rank"])
    with pytest.raises(gp.InputError, match="gradients need a loss"):
        gp.calibrate(model, coupling, [X], statistics=["products"])
    with pytest.raises(gp.InputError, match="load weights first"):
        gp.calibrate(model.to("meta"), coupling, [X], statistics=["moments"])


class Overwritten(nn.Module):
    """A layer's input changes in place after the layer read it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        x.view(-1, 6).mul_(2)
        return y + self.c(x)


def test_an_input_that_is_overwritten_through_a_view_is_named_and_its_moments_are_of_what_was_read():
    model, coupling = coupled(Overwritten(), torch.rand(2, 3))
    found = gp.calibrate(model, coupling, [X], statistics=["means"]).moments
    torch.testing.assert_close(found["b.weight"].mean, model.a(X).mean(0)[None].detach())
    torch.testing.assert_close(found["c.weight"].mean, 2 * model.a(X).mean(0)[None].detach())
    with pytest.raises(gp.CalibrationError, match="use the operation that does not write in place"):
        gp.calibrate(model, coupling, [(X, Y)], statistics=["gradients"], loss=CLASSES)

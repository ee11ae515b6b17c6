"""Criteria that read data, against their formulas worked out from explicit masks and materialised activations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.importance import (
    Activation,
    APoZ,
    Collaborative,
    Fisher,
    Magnitude,
    Rank,
    Reconstruction,
    Taylor,
)
from tests.by_hand import along, brute_force, coupled, generator, images, labels, rows_of, singly
from tests.nets import CifarResNet, TinyViT
from tests.zoo.tiny import causal, encoder, hf, tokens

CLASSES = F.cross_entropy


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


def mlp():
    return coupled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)), torch.rand(2, 3))


def rows(count, width=3, seed=0):
    return torch.randn(count, width, generator=generator(seed)).double()


# -- gradients ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stem whose channels are read by a block, by a strided convolution and by a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn = nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.down = nn.Conv2d(7, 6, 3, padding=1), nn.Conv2d(6, 4, 1, stride=2)
        self.head, self.last = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        y = (x + self.conv2(self.bn(self.conv1(x)).relu())).relu()
        return self.head(y.mean((2, 3))) + self.last(self.down(y).relu().mean((2, 3)))


READERS = {"conv1.weight": along(1), "head.weight": along(1), "down.weight": along(1)}


@pytest.fixture
def residual():
    model, coupling = coupled(Residual(), torch.rand(2, 3, 8, 8))
    batches = [(images(4), labels(4)), (images(3, seed=1), labels(3))]
    return model, coupling, batches, brute_force(model, READERS, 6, singly(batches), CLASSES)


def close(got, want, tolerance=1e-10):
    assert want.norm() > 0
    assert (got - want).norm() <= tolerance * want.norm()


def test_taylor_is_the_size_of_the_mean_derivative(residual):
    model, coupling, batches, q = residual
    close(Taylor(batches, CLASSES)(model, coupling)["stem"], q.mean(0).abs())


def test_fisher_is_half_the_mean_squared_derivative(residual):
    model, coupling, batches, q = residual
    close(Fisher(batches, CLASSES)(model, coupling)["stem"], q.square().mean(0) / 2)


@pytest.mark.parametrize(
    ("normalize", "freed"),
    [
        ("memory", {"stem": 64 * 2, "conv1": 64}),  # elements of outputs of stem and conv2 for one image; of conv1
        ("macs", {"stem": 64 * (3 + 2 * 7) * 9 + 4 * 16 + 5, "conv1": 64 * 12 * 9}),
        ("params", {"stem": 27 + 1 + 2 * 63 + 1 + 4 + 5, "conv1": 54 + 54 + 2}),
    ],
)
def test_fisher_is_divided_by_what_a_channel_frees(residual, normalize, freed):
    model, coupling, batches, _ = residual
    plain = Fisher(batches, CLASSES)(model, coupling)
    found = Fisher(batches, CLASSES, normalize=normalize)(model, coupling)
    ratio = plain["stem"].sum() / found["stem"].sum() / (plain["conv1"].sum() / found["conv1"].sum())
    assert float(ratio) == pytest.approx(freed["stem"] / freed["conv1"])


def test_collaborative_keeps_what_exhaustive_search_keeps_at_every_width():
    model, coupling = coupled(CifarResNet(1), torch.rand(2, 3, 16, 16))
    batches = [(images(6, 16), labels(6, 10))]
    orders = Collaborative(batches, CLASSES)(model, coupling)
    assert [name for name, order in orders.items() if order.size == 8] == [
        "layer2.0.conv2[0:8]",
        "layer2.0.conv2[24:32]",
    ]
    masked = {"layer3.0.conv1.weight": along(1, lambda m: torch.cat([m.new_ones(24), m]))}
    masked |= {"linear.weight": along(1, lambda m: torch.cat([m.new_ones(40), m, m.new_ones(16)]))}
    q = brute_force(model, masked, 8, singly(batches), CLASSES)
    best = orders["layer2.0.conv2[24:32]"]
    first, second = -q.mean(0), q.T @ q / len(q) / 2

    def cost(removed):
        z = torch.zeros(8, dtype=torch.float64)
        z[list(removed)] = 1
        return float(first @ z + z @ second @ z)

    assert float(best.lost[8]) == 0
    for width in range(9):
        everything = {c: cost(c) for c in itertools.combinations(range(8), 8 - width)}
        removed = tuple(i for i in range(8) if i not in best.keep(width))
        spread = max(everything.values()) - min(everything.values())
        assert everything[removed] <= min(everything.values()) + 0.01 * spread
        assert float(best.lost[width]) == pytest.approx(everything[removed], abs=1e-9)


# -- ranks, zeros -----------------------------------------------------------------------------------------------------------


def convnet():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(320, 5))
    return coupled(net, torch.rand(2, 3, 8, 8))


def low_rank(count):
    """Images in which one column after the other is like the one before."""
    return torch.stack([x[:, :, [min(k, j) for j in range(8)]] for k, x in enumerate(images(count))])


def test_rank_is_the_mean_rank_and_ties_go_by_the_mean_square():
    model, coupling = convnet()
    with torch.no_grad():
        model[0].weight[4] = 3 * model[0].weight[1]  # the same ranks, but larger
        model[0].bias[4] = 3 * model[0].bias[1]
        model[0].bias[2] = -1  # few positive values
    x = low_rank(5)
    scores = Rank([x[:3], x[3:]])(model, coupling)
    maps = model[:2](x).detach()
    mean = torch.linalg.matrix_rank(maps).double().mean(0)
    assert torch.equal((scores["0"] * 5).floor() / 5, mean)
    assert scores["0"][4] > scores["0"][1]
    assert ((scores["0"] - mean) < 1 / 5).all()
    assert len(set(mean.tolist())) > 1
    plan = gp.allocate(scores, gp.Target(channels=0.5), coupling)
    order = sorted(range(6), key=lambda i: (mean[i], maps[:, i].square().mean()))
    assert list(plan.groups["0"]) == sorted(order[3:])
    flat = torch.linalg.matrix_rank(model[:3](x).detach()).double().mean(0)
    assert torch.equal((scores["2"] * 5).floor() / 5, flat)  # read flattened by the linear layer


def test_variants_of_rank_and_the_normalised_one():
    model, coupling = convnet()
    x = low_rank(5)
    plain = Rank([x])(model, coupling)["0"]
    reverse, edge = (Rank([x], variant=v)(model, coupling)["0"] for v in ("reverse", "edge"))
    assert torch.equal(reverse, -plain)
    assert set(edge.argsort()[:2].tolist()) == {int(plain.argmin()), int(plain.argmax())}
    assert set(edge.argsort()[-2:].tolist()) == set(plain.argsort()[2:4].tolist())
    close(Rank([x], normalised=True)(model, coupling)["0"], plain / 8)


def test_apoz_is_the_fraction_that_is_not_zero():
    model, coupling = mlp()
    x = rows(7)
    scores = APoZ([x[:4], x[4:]])(model, coupling)["0"]
    close(scores, (model[:2](x) != 0).double().mean(0))
    assert 0 < scores.min() < 1


def test_apoz_counts_zeros_of_maps_that_are_pooled_away():
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 7, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2)),
    )
    model, coupling = coupled(net, torch.rand(2, 3, 8, 8))
    x = images(6)
    for layer in (2, 5):  # half of what each channel holds before its activation is negative
        with torch.no_grad():
            model[layer].bias -= model[: layer + 1](x).transpose(0, 1).flatten(1).median(1).values
    found = gp.calibrate(model, coupling, [x[:4], x[4:]], statistics=["activations"], progress=False)
    scores = APoZ(found)(model, coupling)
    for name, upto in (("0", 2), ("2", 5)):  # these are read as maps, after the pooling too
        close(scores[name], (model[:upto](x) != 0).double().mean((0, 2, 3)))
        assert torch.equal(found.activations[name].looked, found.activations[name].count)
    maps, pooled = model[:7](x), model[:8](x)
    assert (pooled != 0).all()
    zeros = (maps == 0).double().sum((0, 2, 3))
    close(scores["5"], 1 - zeros / (6 * maps[0, 0].numel() + 6))
    assert scores["5"].min() < 1
    close(found.activations["5"].mean, pooled.double().mean((0, 2, 3)), 1e-6)


class Pooled(nn.Module):
    """Maps that are pooled twice, and may be read by a convolution as well."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.c, self.read = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Linear(6, 5), read

    def forward(self, x):
        x = self.a(x).relu()
        pooled = self.c(x.mean((2, 3))) + self.c(x.amax((2, 3)))
        return pooled + self.b(x).sum((2, 3)) if self.read else pooled


@pytest.mark.parametrize("read", [True, False])
def test_maps_that_are_pooled_twice_or_read_as_well_are_counted_once(read):
    model, coupling = coupled(Pooled(read), torch.rand(2, 3, 8, 8))
    x = images(4)
    found = gp.calibrate(model, coupling, [x], statistics=["activations"], progress=False).activations["a"]
    assert found.count.tolist() == [4 * (2 + 64 * read)] * 6
    assert found.looked.tolist() == [4 * (2 + 64)] * 6
    maps = model.a(x).relu()
    assert found.zeros.sum() == (maps == 0).sum() + (maps.amax((2, 3)) == 0).sum()


# -- reconstruction -----------------------------------------------------------------------------------------------------------


def inputs_of(model, x):
    """What each layer that reads the stem of `Residual` reads."""
    seen = {}
    hooks = [
        getattr(model, name).register_forward_pre_hook(
            lambda m, given, name=name: seen.update({name: given[0].detach()})
        )
        for name in ("conv1", "head", "down")
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def change(model, seen, removed):
    """How much the outputs of all readers change without some channels: mean square, summed over outputs and readers."""
    gone = torch.zeros(6, dtype=torch.float64)
    gone[list(removed)] = 1
    total = 0.0
    for name, x in seen.items():
        layer = getattr(model, name)
        x = x * gone.view(-1, *[1] * (x.dim() - 2))
        without = layer(x) - (0 if layer.bias is None else layer.bias.view(-1, *[1] * (x.dim() - 2)))
        total += float(without.detach().square().transpose(0, 1).flatten(1).mean(1).sum())
    return total


def test_removal_is_the_greedy_search_over_materialised_outputs(residual):
    model, coupling, batches, _ = residual
    x = torch.cat([x for x, _ in batches])
    order = Reconstruction([x for x, _ in batches])(model, coupling)["stem"]
    seen, gone = inputs_of(model, x), []
    for step in range(6):
        costs = {i: change(model, seen, [*gone, i]) for i in range(6) if i not in gone}
        gone.append(min(costs, key=costs.get))
        assert float(order.lost[5 - step]) == pytest.approx(costs[gone[-1]], rel=1e-8)
    assert order.order.tolist() == gone


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_selection_is_the_search_by_least_squares_over_materialised_outputs(kind):
    if kind == "linear":
        model, coupling = mlp()
        x, layer = rows(40), model[2]
        taken = model[:2](x).detach()
    else:
        model, coupling = coupled(
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2)), torch.rand(2, 3, 8, 8)
        )
        x, layer = images(9), model[2]
        taken = rows_of(model[:2](x).detach(), layer)[0]
    size = layer.weight.shape[1]
    columns = torch.arange(taken.shape[1]).view(size, -1)
    output = taken @ layer.weight.detach().flatten(1).T

    def missed(kept):
        a = taken[:, columns[sorted(kept)].flatten()]
        return float((output - a @ torch.linalg.lstsq(a, output, driver="gelsd").solution).square().sum())

    order = Reconstruction([x], search="selection")(model, coupling)["0"]
    kept = []
    for width in range(1, size + 1):
        left = {i: missed([*kept, i]) for i in range(size) if i not in kept}
        kept.append(min(left, key=left.get))
        share = left[kept[-1]] / float(output.square().sum())
        assert float(order.lost[width] - order.lost[size]) == pytest.approx(share, abs=1e-6)  # its ridge is 1e-8
    assert order.order.tolist() == kept[::-1]


def test_selection_falls_back_to_removal_where_a_group_is_read_as_several_values(residual):
    model, coupling, batches, _ = residual
    x = [x for x, _ in batches]
    removal, selection = (Reconstruction(x, search=s)(model, coupling) for s in ("removal", "selection"))
    assert torch.equal(removal["stem"].order, selection["stem"].order)
    assert removal["conv1"].lost[0] != selection["conv1"].lost[0]


@pytest.mark.parametrize("moment", ["energy", "fluctuation"])
def test_activation_is_what_a_channel_carries_into_the_layers_that_read_it(residual, moment):
    model, coupling, batches, _ = residual
    seen = inputs_of(model, torch.cat([x for x, _ in batches]))
    want = torch.zeros(6).double()
    for name, x in seen.items():
        layer = getattr(model, name)
        taken = x if layer is model.head else rows_of(x, layer)[0]
        held = taken.square().mean(0) if moment == "energy" else taken.var(0, correction=0)
        want += (layer.weight.detach().flatten(1).square().sum(0) * held).view(6, -1).sum(1)
    close(Activation([x for x, _ in batches], moment=moment)(model, coupling)["stem"], want)


class Twice(nn.Module):
    """One layer reads two values."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.shared(x) + self.shared(2 * x.roll(1, 0))).relu())


def test_a_layer_called_twice_is_one_layer_over_all_that_it_reads():
    model, coupling = coupled(Twice(), torch.rand(2, 3))
    x = rows(9)
    hidden = model.stem(x).relu().detach()
    read = torch.cat([hidden, 2 * hidden.roll(1, 0)])
    weights = model.shared.weight.detach().square().sum(0)
    close(Activation([x])(model, coupling)["stem"], weights * read.square().mean(0))
    gram = model.shared.weight.detach().T @ model.shared.weight.detach() * (read.T @ read / len(read))
    lost = Reconstruction([x])(model, coupling)["stem"].lost
    assert float(lost[0]) == pytest.approx(float(gram.sum()))


# -- every kind of network -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """The last step of a recurrent layer, through an MLP."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.mlp, self.head = cell(3, 7, batch_first=True), nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.mlp(self.cell(x)[0][:, -1]).relu())


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 7, 1), nn.ReLU(), nn.Flatten(), nn.Linear(28, 5)),
    )


def pictures(count, size=8):
    return [(images(count, size, seed=s).float(), labels(count)) for s in (1, 2)]


def steps(count):
    return [(torch.randn(count, 4, 3, generator=generator(s)), labels(count)) for s in (1, 2)]


def sentences(count, *, classes=0):
    """Rows of tokens with labels: the tokens themselves, or a class for each row."""
    made = []
    for seed in (1, 2):
        ids = torch.randint(1, 97, (count, 9), generator=generator(seed))
        made.append({"input_ids": ids, "labels": labels(count, classes) if classes else ids})
    return made


def own_loss(output, batch):
    return output.loss


def gpt2():
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 101, "n_positions": 33}
    return hf("GPT2LMHeadModel", "GPT2Config", **sizes), tokens()


KINDS = {
    "convnet": lambda: (CifarResNet(1), pictures(4, 16), CLASSES),
    "grouped": lambda: (grouped(), pictures(4), CLASSES),
    "vit": lambda: (TinyViT(), pictures(4), CLASSES),
    "mlp": lambda: (
        nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 5)),
        [(rows(6, seed=s).float(), labels(6)) for s in (1, 2)],
        CLASSES,
    ),
    "gru": lambda: (Recurrent(nn.GRU), steps(4), CLASSES),
    "lstm": lambda: (Recurrent(nn.LSTM), steps(4), CLASSES),
    "bert": lambda: (
        encoder("BertForSequenceClassification", "BertConfig", num_labels=5)()[0],
        sentences(4, classes=5),
        own_loss,
    ),
    "gpt2": lambda: (gpt2()[0], sentences(4), own_loss),
    "llama": lambda: (causal("Llama")()[0], sentences(4), own_loss),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_criterion_scores_every_group_of_every_kind_of_network(kind):
    model, batches, loss = KINDS[kind]()
    model.eval()
    example = batches[0] if isinstance(batches[0], dict) else batches[0][0]
    coupling = gp.couple(gp.trace(model, example))
    found = gp.calibrate(
        model, coupling, batches, statistics=["products", "activations", "ranks", "moments"], loss=loss
    )
    otherwise = Magnitude()
    assert coupling.groups
    assert found.samples == 2 * len(labels(4 if kind != "mlp" else 6))
    for criterion in (
        *(Taylor(found), Fisher(found, normalize="memory"), Collaborative(found)),  # these have something to say always
        *(Rank(found, otherwise=otherwise), APoZ(found, otherwise=otherwise)),
        *(Activation(found, otherwise=otherwise), Reconstruction(found, otherwise=otherwise)),
        Reconstruction(found, search="selection", otherwise=otherwise),
    ):
        scores = criterion(model, coupling)
        assert set(scores) == {g.name for g in coupling.groups}, criterion
        plan = gp.allocate(scores, gp.Target(channels=0.5), coupling)
        assert all(0 < len(kept) < plan.sizes[name] for name, kept in plan.groups.items()), criterion
    for group in coupling.groups:
        assert found.gradients[group.name].squares.any(), group.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_repaired_by_least_squares(kind):
    model, batches, loss = KINDS[kind]()
    model.eval()
    example = batches[0] if isinstance(batches[0], dict) else batches[0][0]
    criterion = Fisher(batches, loss)
    result = gp.prune(model, example, target=gp.Target(channels=0.6), importance=criterion, repair="least_squares")
    repair = result.report.repair
    assert repair.ridges
    assert repair.samples > 0
    assert repair.original.error == 0
    assert 0 < repair.repaired.error < repair.pruned.error


# -- bad input ------------------------------------------------------------------------------------------------------------------


def test_criteria_that_have_nothing_to_say_about_a_group_name_it_or_leave_it_to_another():
    model, coupling = coupled(nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 5)), torch.rand(2, 3))
    for criterion, match in (
        (Rank([rows(4)]), r"Rank: there are no feature maps in 1 of 1 group: '0'; name a criterion"),
        (APoZ([rows(4)]), r"APoZ: no activation is zero in 1 of 1 group: '0'; name a criterion"),
    ):
        with pytest.raises(gp.CriterionError, match=match):
            criterion(model, coupling)
    left = Rank([rows(4)], otherwise=Magnitude())(model, coupling)
    assert torch.equal(left["0"], Magnitude()(model, coupling)["0"])


class Unread(nn.Module):
    """The channels of `a` end in a product of two activations, those of `c` in nothing that a loss of `b` sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x) @ self.b(x).mT, self.c(x).relu() @ x.new_ones(4, 2)


def test_criteria_that_read_layers_say_where_there_are_none():
    model, coupling = coupled(Unread(), torch.rand(2, 7, 3))
    x = torch.randn(4, 7, 3, generator=generator()).double()
    for criterion, match in (
        (Reconstruction([x]), "Reconstruction: no linear layer or convolution reads 2 of 2 groups: 'a', 'c'"),
        (Activation([x]), "Activation: no linear layer or convolution reads 2 of 2 groups: 'a', 'c'"),
        (Taylor([x], lambda out: out[0].mean()), "Taylor: no gradient reaches 1 of 2 groups: 'c'"),
        (Fisher([x], lambda out: out[0].mean()), "Fisher: no gradient reaches 1 of 2 groups: 'c'"),
        (Collaborative([x], lambda out: out[0].mean()), "Collaborative: no gradient reaches 1 of 2 groups: 'c'"),
    ):
        with pytest.raises(gp.CriterionError, match=match):
            criterion(model, coupling)


def test_a_calibration_must_hold_what_is_asked_for_and_be_of_this_model():
    model, coupling = mlp()
    batches = [(rows(4), labels(4))]
    held = gp.calibrate(model, coupling, batches, statistics=["moments"])
    with pytest.raises(gp.CriterionError, match=r"Taylor needs gradients.* statistics=\['gradients'\]"):
        Taylor(held)(model, coupling)
    with pytest.raises(gp.CriterionError, match=r"Collaborative needs products"):
        Collaborative(gp.calibrate(model, coupling, batches, statistics=["gradients"], loss=CLASSES))(model, coupling)
    both = gp.calibrate(model, coupling, batches, statistics=["products"], loss=CLASSES)
    assert torch.equal(Taylor(both)(model, coupling)["0"], Taylor(batches, CLASSES)(model, coupling)["0"])
    other = coupled(nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5)), torch.rand(2, 3))
    with pytest.raises(gp.CriterionError, match="Reconstruction: the calibration is of a model with other groups"):
        Reconstruction(held)(*other)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Rank([], variant="random"), r"Rank\(variant='random'\): it is one of 'rank', 'edge', 'reverse'"),
        (lambda: Fisher([], normalize="latency"), r"Fisher\(normalize='latency'\)"),
        (lambda: Reconstruction([], search="greedy"), r"Reconstruction\(search='greedy'\)"),
        (lambda: Activation([], moment="mean"), r"Activation\(moment='mean'\)"),
    ],
)
def test_an_option_that_is_none_of_its_words_is_refused(make, match):
    with pytest.raises(gp.InputError, match=match):
        make()


@pytest.mark.parametrize("criterion", [Taylor, Fisher, Collaborative])
def test_criteria_of_gradients_need_a_loss(criterion):
    with pytest.raises(gp.InputError, match="gradients need a loss"):
        criterion([(rows(4), labels(4))])(*mlp())


@pytest.mark.parametrize("criterion", [Rank, APoZ, Activation, Reconstruction])
def test_criteria_need_batches(criterion):
    with pytest.raises(gp.CalibrationError, match="the loader is empty"):
        criterion([])(*mlp())

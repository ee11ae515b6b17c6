"""How published tables count: their figures come out of their networks and their rates."""

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.nets import TinyViT

RATES = [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1, 0.4] * 4
"""Fractions of the outputs of each convolution of ResNet-56 that HRank removes, as its authors' repository says."""


def chain(plan, side, tail=()):
    """Convolutions of 3 x 3, one after the other, at (width, side) each, and what follows; nothing is computed."""
    layers, entering, at = [], 3, side
    with torch.device("meta"):
        for width, size in plan:
            if size < at and not tail:
                layers.append(nn.Conv2d(entering, width, 3, 2, 1, bias=False))
            else:
                layers += [nn.MaxPool2d(2)] * (size < at) + [nn.Conv2d(entering, width, 3, 1, 1)]
            layers.append(nn.ReLU())
            entering, at = width, size
        if not tail:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, 10)]
        net = nn.Sequential(*layers, *tail)
        return gp.couple(gp.trace(net.eval(), torch.empty(1, 3, side, side)))


def convolutions(coupling):
    return [n.removesuffix(".weight") for v in coupling.program.parameters if len(v.shape) == 4 for n in [v.target]]


def test_outputs_alone_give_the_figure_of_hrank_for_resnet56():
    """62.72 M, of 125.49 M. Every convolution loses outputs of its own there, whatever shortcuts tie: a chain does."""
    coupling = chain([(16, 32)] * 19 + [(32, 16)] * 18 + [(64, 8)] * 18, 32)
    names = convolutions(coupling)
    assert len(names) == len(RATES) == 55
    sizes = [coupling.group(name).size for name in names]
    kept = {name: size - int(rate * size) for name, size, rate in zip(names, sizes, RATES, strict=True)}
    cost = gp.cost.macs(coupling, convention="outputs")
    assert round(cost.at({}) / 1e6, 2) == 125.49
    assert round(cost.at(kept) / 1e6, 2) == 62.72
    assert gp.cost.macs(coupling).at(kept) < 0.75 * cost.at(kept)  # what is really left


def test_two_flops_to_a_multiply_add_give_the_figure_of_thinet_for_vgg16():
    """ThiNet-Conv halves the first ten convolutions of VGG-16: 9.58 B, of 30.94 B."""
    plan = [(64, 224)] * 2 + [(128, 112)] * 2 + [(256, 56)] * 3 + [(512, 28)] * 3 + [(512, 14)] * 3
    with torch.device("meta"):
        tail = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512 * 49, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)]
    coupling = chain(plan, 224, tail)
    kept = {name: coupling.group(name).size // 2 for name in convolutions(coupling)[:10]}
    cost = gp.cost.flops(coupling)
    assert round(cost.at({}) / 1e9, 2) == 30.94
    assert round(cost.at(kept) / 1e9, 2) == 9.58
    assert cost.at(kept) == 2 * gp.cost.macs(coupling).at(kept)


def test_outputs_alone_count_what_each_layer_computes_by_hand():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 7, 1), nn.Conv2d(7, 5, 1)
    )
    coupling = gp.couple(gp.trace(net, torch.rand(1, 2, 4, 4)))
    kept = {"0": 4, "2": 3}
    by_hand = 16 * (4 * 2 * 9 + 4 * 9 + 3 * 6 + 5 * 7)
    assert gp.cost.macs(coupling, convention="outputs").at(kept) == by_hand
    assert gp.cost.flops(coupling, convention="outputs").at(kept) == 2 * by_hand
    assert gp.cost.macs(coupling).at(kept) == 16 * (4 * 2 * 9 + 4 * 9 + 3 * 4 + 5 * 3)


def test_of_attention_and_recurrent_layers_the_sums_stay_too():
    coupling = gp.couple(gp.trace(TinyViT().eval(), torch.rand(1, 3, 8, 8)))
    left, outputs = gp.cost.macs(coupling), gp.cost.macs(coupling, convention="outputs")
    heads, dims = "attention.qkv:3x[3]x4", "attention.qkv:3x3x[4]"
    tokens, width = 4, 10
    computed = tokens * 3 * 4 * (3 * width)  # q, k and v; scores and the mix follow the heads, not the dims they sum
    assert left.at({}) - outputs.at({heads: 2}) == computed // 3 + tokens * tokens * 2 * 4
    assert left.at({}) - outputs.at({dims: 2}) == computed // 2 + tokens * tokens * 3 * 2
    assert left.at({}) - outputs.at({"mlp.0": 3}) == tokens * 4 * width
    assert left.at({}) - left.at({"mlp.0": 3}) == 2 * tokens * 4 * width
    recurrent = nn.Sequential(nn.Linear(3, 5), nn.GRU(5, 7))
    coupling = gp.couple(gp.trace(recurrent, torch.rand(2, 1, 3)))
    assert gp.cost.macs(coupling, convention="outputs").at({"0": 2}) == 2 * (3 * 2 + 3 * 7 * (5 + 7))


@pytest.mark.parametrize("cost", [gp.cost.macs, gp.cost.flops])
def test_an_unknown_convention_is_refused(cost):
    coupling = gp.couple(gp.trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), torch.rand(1, 3)))
    with pytest.raises(gp.InputError, match="convention='paper': it is one of left, outputs"):
        cost(coupling, convention="paper")

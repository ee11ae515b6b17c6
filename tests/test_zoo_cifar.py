"""The reference networks have the counts that the literature gives, and each of them is pruned exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import cost

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import zoo_cifar

PUBLISHED = {
    "vgg16_bn": (313.46, 14.98),
    "vgg19_bn": (398.14, 20.02),
    "resnet20": (40.55, 0.27),
    "resnet56": (125.49, 0.85),
    "resnet110": (252.89, 1.72),
    "densenet40": (282.92, 1.04),
    "googlenet": (1521.76, 6.15),
}
"""Millions of multiply-adds and of parameters. Of the pre-activation ResNet-164 there are none: it is counted by hand."""


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo_cifar.NETWORKS[name]().eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_papers(name):
    network = built(name)
    assert (round(zoo_cifar.macs(network) / 1e6, 2), round(zoo_cifar.weights(network) / 1e6, 2)) == PUBLISHED[name]


def test_the_pre_activation_resnet_164_has_the_counts_of_its_formula():
    macs = weights = 3 * 16 * 9
    macs *= 32 * 32
    channels, layers = 16, 1
    for planes, side in ((16, 32), (32, 16), (64, 8)):
        for k in range(18):
            before = 2 * side if k == 0 and planes > 16 else side  # the first 1 x 1 of a stage is before its stride
            three, last = planes * planes * 9, planes * 4 * planes
            shortcut = channels * 4 * planes if k == 0 else 0
            macs += channels * planes * before**2 + (three + last + shortcut) * side**2
            weights += channels * planes + three + last + shortcut
            channels, layers = 4 * planes, layers + 3
    network = built("preresnet164")
    assert layers + 1 == 164
    assert zoo_cifar.macs(network) == macs + 256 * 10
    assert zoo_cifar.weights(network) == weights + 256 * 10 + 10


@pytest.mark.parametrize("name", zoo_cifar.NETWORKS)
def test_our_costs_agree_and_every_convolution_is_reached(name):
    network = built(name)
    coupling = gp.couple(gp.trace(network, torch.zeros(1, 3, 32, 32)))
    assert cost.macs(coupling).at({}) == zoo_cifar.macs(network)
    assert cost.params(coupling).at({}) == sum(p.numel() for p in network.parameters())
    outputs = {(m.name, m.dim) for group in coupling.groups for m in group.members}
    convolutions = [f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 10
    assert [n for n in convolutions if (n, 0) not in outputs] == []


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet40", "googlenet"])
def test_half_of_the_multiply_adds_go_exactly(name):
    result = gp.prune(built(name), torch.randn(2, 3, 32, 32), target=gp.Target(macs=0.5))
    assert result.report.emitter == "module"
    assert zoo_cifar.macs(result.model) <= 0.5 * zoo_cifar.macs(built(name))
    assert result.report.verification.error < 1e-9


def test_the_table_has_a_line_for_each_and_refuses_other_names(capsys):
    zoo_cifar.main(["resnet20", "vgg16_bn"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["resnet20", "40.55", "M", "MACs", "0.27", "M", "parameters"]
    assert second.split()[:2] == ["vgg16_bn", "313.46"]
    with pytest.raises(SystemExit):
        zoo_cifar.main(["resnet21"])
    assert "no network 'resnet21'; there are vgg16_bn" in capsys.readouterr().err

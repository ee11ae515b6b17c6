"""The benchmarks of targets and allocation measure what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from tests import shim

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.modules.setdefault("shim", shim)  # it does the same; torchvision's operators can be declared only once

import targets  # noqa: E402
import targets_nets  # noqa: E402
import targets_table  # noqa: E402

needs_peer = pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is missing")


@pytest.fixture(scope="module")
def measured():
    def tiny():
        layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 5, 1)
        return nn.Sequential(*layers), torch.rand(1, 3, 8, 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets_nets, "NETWORKS", {"tiny": tiny})
        return targets.network("tiny")


def test_every_target_is_tried_by_every_method_and_none_is_passed(measured):
    rows = measured["rows"]
    assert len(rows) == len(targets_nets.SCORES) * len(targets.TARGETS) * len(targets.ALLOCATIONS)
    found = [row for row in rows if "infeasible" not in row]
    assert found
    assert not any(row["over"] for row in found)
    assert all(row["multiples"] for row in found)
    assert not any(row["a_step_would_fit"] for row in found if row["method"] != "uniform")
    assert all(0 < row["lost"] < 1 for row in found)


def test_what_comes_out_is_counted_by_others_means(measured):
    assert measured["counted"] == {what: measured["whole"][what] for what in ("macs", "params")}
    assert measured["emitted"]
    for plan in measured["emitted"]:
        assert plan["said"] == plan["counted"]
        assert plan["said"] != measured["counted"]


def test_attention_is_counted_too():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    x = torch.rand(2, 7, 12)
    coupling = gp.couple(gp.trace(layer, x))
    assert targets.counted(layer, x)["macs"] == gp.cost.macs(coupling).at({}) > 0


def test_a_budget_that_is_passed_and_room_that_is_left_are_noticed():
    coupling, orders = targets_nets.small(0)
    costs = {"macs": gp.cost.macs(coupling)}
    target = gp.Target(macs=0.5)
    plan = gp.allocate(orders, target, coupling, method="greedy")
    right = targets.achieved(plan, target, costs, coupling, orders)
    assert (right["over"], right["a_step_would_fit"]) == (False, False)
    assert targets.achieved(plan, gp.Target(macs=0.3), costs, coupling, orders)["over"]
    assert targets.achieved(plan, gp.Target(macs=0.9), costs, coupling, orders)["a_step_would_fit"]
    odd = gp.Target(macs=0.9, multiple_of=5)
    assert not targets.achieved(plan, odd, costs, coupling, orders)["multiples"]


def test_gaps_are_above_the_best_choice_and_the_tables_show_them(measured):
    found = targets.small(2)
    assert found["problems"] == 2 * len(targets.SMALL)
    assert all(gap >= -1e-9 for gaps in found["gaps"].values() for gap in gaps)
    assert max(found["gaps"]["uniform"]) > 0
    about = {"versions": {"torch": "x"}, "cpus": 1, "threads": 1, "date": "today"}
    data = {"environment": about, "floor": 0.1, "spread": 0.5, "networks": {"tiny": measured}, "small": found}
    shown = targets_table.text(data)
    assert "| tiny | 2 | 40 |" in shown
    assert "against the best of all choices" in shown.lower()


def test_the_order_of_methods_can_fail():
    lost = {"knapsack": 1.0, "greedy": 1.0, "global": 2.0, "global per cost": 1.5, "uniform": 1.9}
    assert not targets_table.ordered(lost, "global")
    assert targets_table.ordered(lost, "global per cost")


@needs_peer
def test_a_cell_of_cifar_has_each_repair_and_peers_are_within_the_same_cost():
    import allocation_cifar
    from importance_accuracy import Subject
    from importance_data import Test, cifar

    torch.manual_seed(0)
    network = cifar.ResNet(1).eval()
    images, labels = torch.randn(24, 3, 32, 32), torch.randint(10, (24,))
    subject = Subject(network, (), [(images, labels)], allocation_cifar.STATISTICS)
    test = Test(images, network(images).argmax(1))
    cell = {"seed": 0, "groups": "all", "target": 0.6}
    found = [
        allocation_cifar.measured(cell | {"criterion": name, "allocation": how}, subject, test)
        for name, how in (("Fisher", "knapsack"), ("reconstruction", "greedy"), ("torch-pruning magnitude", "global"))
    ]
    assert [set(c["accuracy"]) for c in found] == [{"none", "least_squares"}] * 2 + [{"none"}]
    assert all(0.3 < c["kept"]["macs"] <= 0.6 for c in found)
    about = {"versions": {"torch": "x"}, "threads": 1, "date": "today"}
    base = {"accuracy": 0.9, "images": 24}
    data = {"environment": about, "base": base, "calibration_images": 24, "floor": 0.1, "cells": found}
    assert "| reconstruction, greedy |" in allocation_cifar.text(data)

"""The benchmark of criteria measures what it says, and goes on from what is done."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests import shim

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.modules.setdefault("shim", shim)  # it does the same; torchvision's operators can be declared only once

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is missing")
if importlib.util.find_spec("torch_pruning"):
    import importance_accuracy
    import importance_data
    import importance_table
    from importance_data import cifar


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    network = cifar.ResNet(2).eval()
    images, labels = torch.randn(24, 3, 32, 32), torch.randint(10, (24,))
    with torch.no_grad():
        network.train()(images)  # batch norms get statistics
    return importance_accuracy.Subject(network.eval(), (), [(images, labels)])


@pytest.fixture(scope="module")
def test_set(subject):
    images = torch.randn(60, 3, 32, 32)
    return importance_data.Test(images, subject.network(images).argmax(1))


def cell(criterion: str) -> dict:
    return {"network": "x", "groups": "all", "seed": 0, "criterion": criterion, "target": 0.6, "accuracy": {}}


def test_every_repair_of_a_cell_is_measured_and_no_plan_twice(subject, test_set, monkeypatch):
    found = importance_accuracy.measured(cell("magnitude L2"), subject, importance_accuracy.REPAIRS, test_set, [])
    assert set(found["accuracy"]) == set(importance_accuracy.REPAIRS)
    assert 0.3 < found["kept"]["macs"] <= 0.6
    assert found["error"] < 1e-9
    assert all(a["images"] == 60 for a in found["accuracy"].values())
    assert "LAMP" in importance_table.line(found | {"criterion": "LAMP"})
    monkeypatch.setattr(subject, "pruned", None)  # LAMP ranks as L2 does, so nothing is left to do
    again = importance_accuracy.measured(cell("LAMP"), subject, importance_accuracy.REPAIRS, test_set, [found])
    assert again["accuracy"] == found["accuracy"]


@pytest.mark.parametrize("criterion", importance_accuracy.CRITERIA if "importance_accuracy" in globals() else ())
def test_every_criterion_chooses_channels(subject, criterion):
    plan = subject.plan(criterion, 0, 0.6)
    assert plan.groups
    assert 0.3 < subject.kept(plan)["macs"] <= 0.6


def test_least_squares_comes_nearer_to_the_original(subject):
    plan = subject.plan("magnitude L2", 0, 0.6)
    small, _ = subject.pruned(plan)
    repaired, samples = subject.repaired(small, plan, "least_squares")
    (x, _), *_ = subject.batches
    want = subject.network(x)
    assert samples == 24
    assert (repaired(x) - want).norm() < 0.8 * (small(x) - want).norm()


def test_few_right_answers_end_the_measurement_and_are_marked(subject):
    images = torch.randn(2100, 3, 8, 8)
    wrong = importance_data.Test(images, torch.full((2100,), -1))
    assert wrong.accuracy(subject.network) == importance_data.Found(0.0, 2000)
    assert wrong.accuracy(subject.network, screen=False).images == 2100
    assert importance_table.percent({"accuracy": 0.5, "images": 2000}) == "~50.00"

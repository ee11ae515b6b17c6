"""The benchmark of latency prunes by random plans, finds the MAC target of the same time, and says what it found."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import shim
from tests.unit.test_latency import even

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.modules.setdefault("shim", shim)  # it does the same; torchvision's operators can be declared only once

latency = importlib.import_module("latency")


@pytest.fixture
def subject(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )
    monkeypatch.setattr(latency, "build", lambda name: network)
    return latency.Subject(
        "", argparse.Namespace(size=16, seconds=60.0, cache=None, rounds=1, clock="wall", measure=even)
    )


def test_random_plans_are_measured_once_each(subject):
    rows = list(latency.plans(subject, 3, []))
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert all(0 < row["macs"] < 1 for row in rows)
    assert all(row["measured"] > 0 for row in rows)
    assert [row["seed"] for row in latency.plans(subject, 4, rows)] == [3]


def test_the_mac_target_found_takes_as_long_as_the_latency_target(subject, monkeypatch):
    monkeypatch.setattr(subject, "measured", lambda plans: [subject.about(plan)["macs"] ** 0.5 for plan in plans])
    result = latency.target(subject, 0.8)
    assert abs(result["macs"]["measured"] - result["macs"]["latency_measured"]) <= 0.02
    rows = latency.multiples(subject, 0.5, "uniform")
    assert [row["multiple_of"] for row in rows] == [1, 8, 16, 32]
    assert all(row["macs"] <= 0.5 for row in rows)
    plans = {"x": {"seconds": 1.0, "rows": list(latency.plans(subject, 2, []))}}
    text = latency.table({"environment": ENVIRONMENT, "plans": plans, "target": result, "multiples": rows})
    assert text.count("\n| ") == 3 + 1 + 2 + 4
    same = [{"predicted": p, "measured": p / 1.1} for p in (0.3, 0.5, 0.9)]
    assert latency.agreement(same)["median_error"] == pytest.approx(0.1)
    assert latency.agreement(same)["rank_correlation"] == pytest.approx(1.0)


ENVIRONMENT = {
    "date": "",
    "versions": {"torch": ""},
    "device": "",
    "threads": 1,
    "clock": "wall",
    "size": 16,
    "rounds": 1,
}

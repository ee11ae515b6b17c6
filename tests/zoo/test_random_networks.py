"""Every kind of block alone, and random directed graphs of them, pruned by random plans."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphprune as gp
from tests.zoo import random_networks, random_run
from tests.zoo.blocks import BLOCKS
from tests.zoo.random_networks import Network, Step, check, drawn, inputs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

NOTHING_OF_THEIR_OWN = {
    "shuffle": "it has no parameters",
    "pad": "it has no parameters",
    "layer norm 2d": "statistics are taken over all that it has",
}
"""Blocks in which no group has a member, and why."""


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_loses_channels_exactly(kind):
    """Whole networks too: the comparison could have failed, and recording and export agree."""
    steps = [Step("conv"), Step(kind), Step("conv", 1)]
    found = [check(steps, seed, emit, fronts=emit == "auto") for seed, emit in ((0, "auto"), (1, "graph"))]
    assert {outcome.emitter for outcome in found} <= {"module", "graft", "graph"}
    assert all(outcome.removed > 0 for outcome in found)
    assert all(not outcome.unknown for outcome in found)
    assert all((kind in outcome.own) == (kind not in NOTHING_OF_THEIR_OWN) for outcome in found)
    assert found[0].alike
    assert max(outcome.effect for outcome in found) > 1e-3


STEPS = st.builds(
    Step,
    kind=st.sampled_from(list(BLOCKS)),
    factor=st.integers(1, 3),
    source=st.integers(0, 3),
    join=st.sampled_from(["", "add", "cat"]),
    other=st.integers(0, 7),
)


# The same networks every time: others are for `random_run`, whose seeds a failure can be found again by.
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=2, max_size=5), st.integers(0, 2**31), st.sampled_from(["auto", "graph"]))
def test_any_plan_of_any_network_equals_the_zeroed_original(steps, seed, emit):
    check(steps, seed, emit)


@pytest.mark.parametrize("number", range(6))
def test_recording_and_export_find_the_same_groups(number):
    steps, seed, emit = drawn(1, number)
    assert check(steps, seed, emit, fronts=True).alike


def test_networks_are_directed_graphs_with_two_inputs_and_two_outputs():
    add, cat = Step("residual", source=0, join="add", other=1), Step("conv", source=1, join="cat", other=0)
    net = Network([Step("residual", source=1), Step("residual", source=2), add, cat]).eval()
    assert [sources for sources, _ in net.routes] == [[0], [0], [3, 2], [3, 0]]
    assert net.unread == [1, 4]
    image, words = inputs(2).args
    outputs = net(image, words)
    assert [tuple(t.shape) for t in outputs] == [(2, 5), (2, 3)]
    other = net(image, words.flip(0))
    assert torch.equal(outputs[0], other[0])
    assert not torch.equal(outputs[1], other[1])


def test_a_network_that_was_pruned_wrong_is_seen(monkeypatch):
    right = random_networks.emit_verified

    def wrong(*args, **options):
        rewritten, proof = right(*args, **options)
        with torch.no_grad():
            rewritten.model.get_parameter("head.weight").mul_(1.01)
        return rewritten, proof

    monkeypatch.setattr(random_networks, "emit_verified", wrong)
    with pytest.raises(AssertionError, match="with another batch size"):
        check([Step("conv"), Step("residual")], 0)


def test_a_run_goes_on_where_it_stopped_and_keeps_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(random_run.CONSOLE, "quiet", True)
    run = random_run.fresh(seed=3)
    random_run.one(run, 0)
    random_run.write(run | {"date": "2000-01-01"}, tmp_path / "run.json")
    again = json.loads((tmp_path / "run.json").read_text())

    def failing(*_, **__):
        raise gp.VerificationError("it differs\nfrom there on")

    monkeypatch.setattr(random_run, "check", failing)
    random_run.one(again, 1)
    assert again["done"] == 2
    assert again["groups"] == run["groups"] > 0
    kinds = [s.kind for s in drawn(3, 1)[0]]
    assert again["failures"] == [{"network": 1, "blocks": kinds, "error": "VerificationError: it differs"}]
    assert f"* network 1 ({', '.join(kinds)}): VerificationError: it differs" in random_run.table(again)
    assert "2 networks, 1 of them with groups; 1 failures" in random_run.table(again)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["run.json", "run.md"]

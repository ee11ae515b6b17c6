from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.collector import paused


@pytest.fixture(autouse=True)
def as_before():
    enabled = gc.isenabled()
    yield
    gc.enable() if enabled else gc.disable()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_paused_and_then_as_before(enabled):
    gc.enable() if enabled else gc.disable()
    with paused():
        assert not gc.isenabled()
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_a_failure_leaves_it_as_before():
    gc.enable()
    with pytest.raises(gp.InputError, match="itself fails on these example inputs"):
        gp.trace(nn.Linear(3, 5), torch.rand(2, 4))
    assert gc.isenabled()


def test_nothing_is_collected_while_a_model_is_coupled():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
    program, started, threshold = gp.trace(model, torch.rand(1, 8)), [], gc.get_threshold()
    gc.callbacks.append(lambda phase, info: started.append(phase))
    try:
        gc.set_threshold(50)
        coupling = gp.couple(program)
        while_coupling = len(started)
        kept = [[] for _ in range(1000)]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert len(coupling.groups) == 299
    assert while_coupling <= 2  # one on the way in, which starts and stops
    assert len(started) > while_coupling + len(kept) // 100  # outside it does collect

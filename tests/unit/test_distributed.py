"""Statistics under `torch.distributed`: two processes that each see a part of the data agree with one that sees it all."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

from tests.two_processes import beside, needs_gloo

JOB = """
    import datetime, sys
    import torch, torch.distributed as dist
    from torch import nn
    import graphprune as gp

    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    ).double().eval()
    batches = [(torch.randn(n, 3, 8, 8).double(), torch.arange(n) % 5) for n in (4, 2, 3)]
    mine = {-1: batches, 0: batches[:2], 1: batches[2:]}[rank]
    if rank >= 0:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
        )
    coupling = gp.couple(gp.trace(net, batches[0][0]))
    found = gp.calibrate(
        net,
        coupling,
        mine,
        statistics=["products", "activations", "ranks", "moments"],
        loss=nn.functional.cross_entropy,
    )
    sums = [
        tensor
        for kind in (found.gradients, found.activations, found.ranks, found.moments)
        for held in kind.values()
        for tensor in held.tensors()
    ]
    scores = gp.importance.Fisher(found)(net, coupling)
    torch.save((found.samples, found.loss, sums, scores), out)
    if rank >= 0:
        dist.destroy_process_group()
"""


@needs_gloo
def test_two_processes_get_the_statistics_of_one_on_all_data(tmp_path, monkeypatch):
    with beside(JOB, tmp_path) as script:
        monkeypatch.setattr(sys, "argv", ["", "-1", "", str(tmp_path / "-1.pt")])
        runpy.run_path(str(script))
    alone, *together = (torch.load(tmp_path / f"{rank}.pt") for rank in (-1, 0, 1))
    assert alone[0] == 9
    assert len(alone[2]) > 20
    for samples, loss, sums, scores in together:
        assert samples == 9
        assert loss == pytest.approx(alone[1], rel=1e-12)
        assert len(sums) == len(alone[2])
        for got, want in zip(sums, alone[2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert scores.keys() == alone[3].keys()
        for name, want in alone[3].items():
            torch.testing.assert_close(scores[name], want, rtol=1e-10, atol=0)

"""A detector of the YOLO kind: halves of unequal width, random plans, and why the bins of the boxes stay."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.pruning import emit_verified
from tests.nets import Yolo, randomised

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def yolo():
    torch.manual_seed(0)
    return randomised(Yolo())


@pytest.fixture
def coupling(yolo):
    return gp.couple(gp.trace(yolo, IMAGES), on_unknown="error")


def carried_out(yolo, coupling, keep):
    inputs, plan = gp.Inputs.of(IMAGES), gp.Plan.of(coupling, keep)
    rewritten, check = emit_verified(yolo, inputs, coupling, plan)
    assert plan.removed > 0
    assert check.precision == "float64"
    assert check.error < 1e-9
    assert check.effect > 1e-3
    return rewritten


def test_halves_of_unequal_width_keep_the_class(yolo, coupling):
    """`chunk(2)` splits evenly: only the block whose halves differ gets its forward from the trace."""
    rewritten = carried_out(yolo, coupling, {"up3.cv1.0[0:16]": [1, 4, 9], "up3.cv1.0[16:32]": range(11)})
    assert rewritten.emitter == "graft"
    assert rewritten.grafts == ("up3",)
    assert isinstance(rewritten.model, Yolo)
    block = rewritten.model.up3
    assert (block.cv1[0].out_channels, block.cv2[0].in_channels) == (3 + 11, 3 + 11 + 16)
    assert block.m[0].cv1[0].in_channels == 11


@pytest.mark.parametrize("seed", range(3))
def test_a_random_number_of_channels_of_every_group(yolo, coupling, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in coupling.groups:
        left = int(torch.randint(1, group.size, (), generator=generator))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:left].tolist()
    rewritten = carried_out(yolo, coupling, keep)
    blocks = {name for name, module in yolo.named_modules() if type(module).__name__ == "C2f"}
    assert isinstance(rewritten.model, Yolo)
    assert rewritten.emitter == "graft"
    assert set(rewritten.grafts) <= blocks


def test_what_stays_whole_is_the_image_the_bins_and_the_outputs(coupling):
    kept = {p.name: p.reason for p in coupling.pinned if not p.name.endswith(("dim2", "dim3"))}
    assert kept == {
        "stem.0.0.dim1": "it reaches dim 1 of the model's input x",
        "head.cv2.0.2:[4]x16": "its positions matter to conv2d",
        "head.cv2.0.2:4x[16]": "softmax compares or orders its positions",
        "head.cv3.0.2": "it reaches dim 1 of the model's output 0",
    }

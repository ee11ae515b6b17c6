"""Random networks of residual, concatenation, split, grouped convolution, gating and attention blocks; random plans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.pruning import emit_verified
from graphprune.reference import run_zeroed
from graphprune.verify import difference
from tests.nets import randomised

KINDS = (
    "conv residual bottleneck concat split grouped depthwise gate shuffle dense attention pad norm shared transposed"
)
BLOCKS = st.sampled_from(KINDS.split())


class Network(nn.Module):
    """Blocks in a row over a map of 4 x 4; earlier outputs of the same width may be added again at any block."""

    def __init__(self, plan: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.plan, width = plan, 4
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleList()
        for kind, factor, _ in plan:
            part, width = _build(kind, width, factor)
            self.parts.append(part)
        self.head = nn.Linear(width * 16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        seen = []
        for part, (kind, _, again) in zip(self.parts, self.plan, strict=True):
            x = _run(kind, part, x)
            if again:
                for earlier in seen:
                    if earlier.shape == x.shape:
                        x = x + earlier
            seen.append(x)
        return self.head(x.flatten(1)), x.sum((1, 2, 3))


class Pad(nn.Module):
    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.added, self.added))


def _build(kind: str, width: int, factor: int) -> tuple[nn.Module, int]:
    """The module of a block, and the width after it."""
    conv = nn.Conv2d
    if kind == "conv":
        return nn.Sequential(conv(width, 2 * factor, 3, padding=1), nn.BatchNorm2d(2 * factor), nn.ReLU()), 2 * factor
    if kind in ("residual", "shared"):
        return conv(width, width, 3, padding=1), width
    if kind == "bottleneck":
        return nn.Sequential(conv(width, factor + 1, 1), nn.ReLU(inplace=True), conv(factor + 1, width, 1)), width
    if kind in ("concat", "dense"):
        return nn.ModuleList([conv(width, factor, 1), conv(width, factor + 2, 3, padding=1)]), (
            2 * factor + 2 + (width if kind == "dense" else 0)
        )
    if kind == "split":
        width += width % 2
        return nn.ModuleList([conv(width - width % 2, width // 2, 1), conv(width // 2, factor, 1)]), width // 2 + factor
    if kind == "grouped":
        groups = 2 if width % 2 == 0 else 1
        return conv(width, 2 * groups * factor, 3, padding=1, groups=groups), 2 * groups * factor
    if kind == "depthwise":
        return nn.Sequential(conv(width, width, 3, padding=1, groups=width), nn.ReLU6(), conv(width, width, 1)), width
    if kind == "gate":
        return nn.Sequential(conv(width, factor, 1), nn.ReLU(), conv(factor, width, 1), nn.Sigmoid()), width
    if kind == "attention":
        return nn.ModuleList([nn.Linear(width, 3 * 2 * factor), nn.Linear(2 * factor, width)]), width
    if kind == "pad":
        return Pad(factor), width + 2 * factor
    if kind == "norm":
        return nn.GroupNorm(2 if width % 2 == 0 else 1, width), width
    if kind == "transposed":
        return nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(width, factor + 1, 2, 2)), factor + 1
    return nn.Identity(), width  # shuffle


def _run(kind: str, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if kind == "residual":
        return F.relu(x + part(x))
    if kind == "shared":
        return part(F.silu(part(x)))
    if kind == "bottleneck":
        return x + part(x)
    if kind == "concat":
        return torch.cat([F.gelu(p(x)) for p in part], dim=1)
    if kind == "dense":
        return torch.cat([x, *(F.elu(p(x)) for p in part)], dim=1)
    if kind == "split":
        first = part[0](F.pad(x, (0, 0, 0, 0, 0, x.shape[1] % 2)))
        return torch.cat([first, part[1](first)], dim=1)
    if kind == "gate":
        return x * part(x.mean((2, 3), keepdim=True))
    if kind == "shuffle" and x.shape[1] % 2 == 0:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    if kind == "attention":
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = part[0](tokens).reshape(b, h * w, 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, -1)
        return (tokens + part[1](y)).transpose(1, 2).reshape(b, c, h, w)
    return part(x)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(BLOCKS, st.integers(1, 3), st.booleans()), min_size=1, max_size=5),
    st.integers(0, 2**31),
    st.sampled_from(["auto", "graph"]),
)
def test_any_plan_of_any_network_equals_the_zeroed_original(blocks, seed, emit):
    check(blocks, seed, emit)


def check(blocks: list[tuple[str, int, bool]], seed: int, emit: str) -> float:
    """Prune a random network by a random plan; how far that moved the outputs (padding and dead units move nothing)."""
    torch.manual_seed(seed % 1000)
    model, generator = randomised(Network(blocks), seed), torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 4, 4)
    coupling = gp.couple(gp.trace(model, x), on_unknown="error")
    if not coupling.groups:
        return 0.0
    keep = {}
    for group in coupling.groups:
        chosen = torch.rand(group.size, generator=generator) < 0.6
        chosen[torch.randint(group.size, (1,), generator=generator)] = True
        keep[group.name] = chosen.nonzero().flatten().tolist()
    plan = gp.Plan.of(coupling, keep)
    rewritten, verification = emit_verified(model, gp.Inputs((x,)), coupling, plan, emit=emit)
    assert verification.error < 1e-9
    other = gp.Inputs((torch.rand(3, 3, 4, 4),))
    with torch.no_grad():
        got = list(rewritten.model(*other.args))
    assert difference(got, run_zeroed(model, plan, other)) < 1e-4
    return verification.effect


@pytest.mark.parametrize("kind", KINDS.split())
def test_the_comparison_could_have_failed(kind):
    effects = [check([("conv", 2, False), (kind, 2, True), ("conv", 1, False)], seed, "auto") for seed in range(3)]
    assert max(effects) > 1e-3

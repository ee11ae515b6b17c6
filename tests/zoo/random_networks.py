"""Random networks of blocks, pruned by random plans and held against the zeroed original."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.pruning import emit_verified
from graphprune.reference import run_zeroed
from graphprune.verify import difference
from tests.nets import randomised
from tests.zoo.blocks import BLOCKS
from tests.zoo.blocks_map import SIDE

WORDS = 11
WIDEST = 20
"""Channels that a concatenation of two values may have."""
REFUSED = "keep more or fewer channels of one of them"
"""What the library says of such a plan; it is right to."""
FIXED = "the batch size stays"
"""What it says of a graph module that takes no other batch size."""


@dataclass(frozen=True)
class Step:
    """One block and what it reads.

    Attributes:
        kind: a key of `BLOCKS`.
        factor: its inner widths.
        source: how many values back it reads.
        join: whether an earlier value is added to what it reads, or concatenated.
        other: which of the values that can be joined.
    """

    kind: str
    factor: int = 2
    source: int = 0
    join: Literal["", "add", "cat"] = ""
    other: int = 0


class Network(nn.Module):
    """Blocks between two inputs, an image and words, and two outputs: a directed graph, as the steps say.

    The first output reads the last value; the second one an inner value and the sums of all that nothing else reads.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(WORDS, 6)
        self.blocks = nn.ModuleList()
        self.routes: list[tuple[list[int], str]] = []
        widths = [4, 6]
        for step in steps:
            sources = _sources(step, widths)
            width = sum(widths[s] for s in sources) if step.join == "cat" else widths[sources[0]]
            self.blocks.append(BLOCKS[step.kind](width, step.factor))
            self.routes.append((sources, step.join))
            widths.append(self.blocks[-1].out)
        read = {s for sources, _ in self.routes for s in sources}
        self.unread = [k for k in range(len(widths) - 1) if k not in read]
        self.inner = len(widths) // 2
        self.head, self.side = nn.Linear(widths[-1] * SIDE * SIDE, 5), nn.Linear(widths[self.inner], 3)

    def forward(self, image, words):
        values = [F.relu(self.image(image)), self.words(words).transpose(1, 2).unflatten(2, (SIDE, SIDE))]
        for block, (sources, join) in zip(self.blocks, self.routes, strict=True):
            x = values[sources[0]]
            if len(sources) > 1:
                other = values[sources[1]]
                x = x + other if join == "add" else torch.cat([x, other], dim=1)
            values.append(block(x))
        side = self.side(values[self.inner].mean((2, 3)))
        for k in self.unread:
            side = side + values[k].sum((1, 2, 3)).unsqueeze(1)
        return self.head(values[-1].flatten(1)), side


def _sources(step: Step, widths: Sequence[int]) -> list[int]:
    """The values a step reads: one, or two where another one fits."""
    first = len(widths) - 1 - step.source % len(widths)
    fits = {"": lambda w: False, "add": lambda w: w == widths[first], "cat": lambda w: w + widths[first] <= WIDEST}
    others = [k for k, w in enumerate(widths) if k != first and fits[step.join](w)]
    return [first, others[step.other % len(others)]] if others else [first]


def inputs(batch: int) -> gp.Inputs:
    return gp.Inputs((torch.rand(batch, 3, SIDE, SIDE), torch.randint(WORDS, (batch, SIDE * SIDE))))


def drawn(seed: int, number: int) -> tuple[list[Step], int, Literal["auto", "graph"]]:
    """Network `number` of a run: its steps, the seed of its weights and plan, and how it is emitted."""
    rng = random.Random(f"{seed}/{number}")
    steps = [
        Step(
            kind=rng.choice(list(BLOCKS)),
            factor=rng.randint(1, 3),
            source=rng.choice((0, 0, 1, 2, 3)),
            join=rng.choice(("", "add", "cat")),
            other=rng.randrange(8),
        )
        for _ in range(rng.randint(1, 6))
    ]
    return steps, rng.randrange(2**31), rng.choice(("auto", "graph"))


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        emitter: the one that was taken; "none" where the network has no group, "refused" where the plan gives one
            width to what an op tells apart by its sizes.
        reason: why not an earlier one.
        error, effect: of the proof.
        sizes: channels by group.
        removed: channels that the plan removes.
        unknown: ops without a rule.
        own: kinds of blocks that have a group in a parameter of theirs.
        alike: whether recording and export gave the same groups; None if they were not compared.
        seconds: for all of it.
    """

    emitter: str
    reason: str
    error: float
    effect: float
    sizes: dict[str, int]
    removed: int
    unknown: tuple[str, ...]
    own: frozenset[str]
    alike: bool | None
    seconds: float


def check(steps: Sequence[Step], seed: int, emit: gp.Emit = "auto", *, fronts: bool = False) -> Outcome:
    """Prune a random network by a random plan, and hold it against the zeroed original.

    Args:
        steps: the network.
        seed: of its weights, and of the plan, which keeps three channels of five.
        emit: as for `gp.prune`.
        fronts: compare the groups found by recording with those found by export.
    Raises:
        AssertionError: the pruned network is not the zeroed one.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    model, generator = randomised(Network(steps), seed), torch.Generator().manual_seed(seed)
    given = inputs(2)
    coupling = gp.couple(gp.trace(model, given))
    alike = None
    if fronts:
        alike = coupling.alike(gp.couple(gp.trace(model, given, front_end="export")))
    keep = {}
    for group in coupling.groups:
        chosen = torch.rand(group.size, generator=generator) < 0.6
        chosen[torch.randint(group.size, (1,), generator=generator)] = True
        keep[group.name] = chosen.nonzero().flatten().tolist()
    sizes = {group.name: group.size for group in coupling.groups}
    names = {m.name for g in coupling.groups for m in g.members}
    own = frozenset(s.kind for k, s in enumerate(steps) if any(n.startswith(f"blocks.{k}.") for n in names))
    found = _proved(model, coupling, gp.Plan.of(coupling, keep), emit) if sizes else ("none", "", 0.0, 0.0)
    removed = sum(sizes[name] - len(kept) for name, kept in keep.items())
    unknown = tuple(u.op for u in coupling.unknown)
    return Outcome(*found, sizes, removed, unknown, own, alike, time.perf_counter() - start)


def _proved(model: nn.Module, coupling: gp.Coupling, plan: gp.Plan, emit: gp.Emit) -> tuple[str, str, float, float]:
    """Emitter, reason, error and effect, once the pruned network was also run with another batch size."""
    try:
        rewritten, proof = emit_verified(model, inputs(2), coupling, plan, emit=emit)
    except gp.RewriteError as error:
        if REFUSED in str(error):
            return "refused", str(error), 0.0, 0.0
        raise
    assert proof.error < 1e-9
    if FIXED not in rewritten.reason:
        other = inputs(3)
        with torch.no_grad():
            got = list(rewritten.model(*other.args))
        apart = difference(got, run_zeroed(model, plan, other))
        assert apart < 1e-4, f"off by {apart:.1e} with another batch size"
    return rewritten.emitter, rewritten.reason, proof.error, proof.effect

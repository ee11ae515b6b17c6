"""Accuracy of pruned networks without fine-tuning: every criterion, with every repair, at several costs.

A cell is one network with one criterion at one target. Statistics are collected once per network, set of groups and
calibration seed, and every criterion reads them; the repairs are the steps of `graphprune.repair` on these statistics.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from importance_data import Batches, Found, Test, cifar
from torch import nn

import graphprune as gp
from graphprune.calibrate import read
from graphprune.cost import macs, params, widths
from graphprune.importance import ordered
from graphprune.plan import Plan, sliced
from graphprune.pruning import emit_verified
from graphprune.recover.batchnorm import reestimated
from graphprune.recover.consumers import changed
from graphprune.recover.sequential import merged, refit
from graphprune.trace import Inputs, held

Record = dict[str, Any]
LOSS = nn.functional.cross_entropy
CRITERIA: Mapping[str, Callable[[gp.Calibration, int], Any]] = {
    "random": lambda c, seed: gp.importance.Random(seed),
    "magnitude L1": lambda c, seed: gp.importance.Magnitude(p=1, over="filters"),
    "magnitude L2": lambda c, seed: gp.importance.Magnitude(p=2),
    "FPGM": lambda c, seed: gp.importance.FPGM(),
    "LAMP": lambda c, seed: gp.importance.LAMP(),
    "gamma": lambda c, seed: gp.importance.Gamma(),
    "APoZ": lambda c, seed: gp.importance.APoZ(c),
    "rank": lambda c, seed: gp.importance.Rank(c),
    "rank, edge": lambda c, seed: gp.importance.Rank(c, variant="edge"),
    "rank, reverse": lambda c, seed: gp.importance.Rank(c, variant="reverse"),
    "Taylor": lambda c, seed: gp.importance.Taylor(c),
    "Fisher": lambda c, seed: gp.importance.Fisher(c),
    "collaborative": lambda c, seed: gp.importance.Collaborative(c),
    "activation, energy": lambda c, seed: gp.importance.Activation(c),
    "activation, fluctuation": lambda c, seed: gp.importance.Activation(c, moment="fluctuation"),
    "reconstruction, removal": lambda c, seed: gp.importance.Reconstruction(c),
    "reconstruction, selection": lambda c, seed: gp.importance.Reconstruction(c, search="selection"),
}
"""By name, from statistics and a seed; LAMP ranks as L2 inside a group, so uniform plans are the same."""
SETTINGS: Mapping[str, Sequence[str]] = {"all": (), "inner": cifar.STREAM}
"""Which groups are pruned: all of them, or those inside the blocks; what is kept then is the residual stream."""
STATISTICS = ("gradients", "products", "activations", "ranks", "moments")
"""What the criteria read."""
REPAIRS = ("none", "batchnorm", "bias", "least_squares")
"""Nothing; statistics of batch norms taken anew and nothing else; means given back; layers refitted in turn."""


class Subject:
    """One network, one set of groups, one choice of calibration images.

    Args:
        network: the trained network.
        keep_names: what is not pruned.
        batches: calibration images.
        statistics: what is collected of them.
    """

    def __init__(
        self, network: nn.Module, keep_names: Sequence[str], batches: Batches, statistics: Sequence[Any] = STATISTICS
    ) -> None:
        self.wanted = statistics
        self.network, self.keep_names, self.batches = network, keep_names, batches
        self.inputs = Inputs.of(batches[0][0][:2])
        self.coupling = gp.couple(gp.trace(network, self.inputs), keep_names=keep_names)

    @cached_property
    def statistics(self) -> gp.Calibration:
        """Collected in one pass."""
        return gp.calibrate(
            self.network, self.coupling, self.batches, statistics=self.wanted, loss=LOSS, progress=False
        )

    def plan(self, criterion: str, seed: int, target: float) -> Plan:
        """What a criterion keeps at a fraction of the multiply-adds."""
        scores = CRITERIA[criterion](self.statistics, seed)(self.network, self.coupling)
        orders = {name: ordered(score) for name, score in scores.items()}
        return gp.allocate(orders, gp.Target(macs=target), self.coupling)

    def pruned(self, plan: Plan) -> tuple[nn.Module, gp.Verification]:
        """The smaller network, proved."""
        rewritten, verification = emit_verified(self.network, self.inputs, self.coupling, plan)
        assert verification is not None, "it verifies unless told not to"
        return rewritten.model.eval(), verification

    def kept(self, plan: Plan) -> dict[str, float]:
        """Fractions of the costs."""
        sizes = widths(plan)
        return {c.name: c.at(sizes) / c.at({}) for c in (macs(self.coupling), params(self.coupling))}

    def repaired(self, small: nn.Module, plan: Plan, how: str) -> tuple[nn.Module, int]:
        """A repaired copy of the smaller network, and how many samples it was repaired with."""
        small, samples = copy.deepcopy(small), sum(len(y) for _, y in self.batches)
        if how == "batchnorm":
            write(small, reestimated(small, self._read()))
        elif how == "bias":
            found = changed(self.network, self.coupling, plan, self.statistics.moments, means_only=True)
            write(small, {name: sliced(tensor, plan.kept.get(name, {})) for name, tensor in found.state.items()})
        elif how == "least_squares":
            inputs, samples = merged(self.network, self.coupling, self._read(), 0)
            write(small, refit(self.network, small, self.coupling, plan, inputs).state)
        return small, samples

    def _read(self) -> Iterator[Any]:
        return read(self.batches, 1, torch.device("cpu"))


def write(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write values into the tensors that `model` holds under these names."""
    with torch.no_grad():
        for name, tensor in held(model):
            if name in state:
                tensor.copy_(state[name])


def digest(plan: Plan) -> str:
    """The same for the same choice of channels."""
    text = repr(sorted((name, [int(k) for k in kept]) for name, kept in plan.groups.items()))
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def key(cell: Record) -> tuple[Any, ...]:
    """What tells cells apart."""
    return tuple(cell[name] for name in ("network", "groups", "seed", "criterion", "target"))


def measured(cell: Record, subject: Subject, repairs: Sequence[str], test: Test, known: Sequence[Record]) -> Record:
    """The cell with the accuracies that it lacks.

    A choice of channels that another criterion made too, with the same calibration images, is not measured twice; and
    what is not repaired does not depend on them.
    """
    plan = subject.plan(cell["criterion"], cell["seed"], cell["target"])
    cell |= {"kept": subject.kept(plan), "plan": digest(plan), "widths": sorted(widths(plan).values())}
    same = [k for k in known if k.get("plan") == cell["plan"]]
    twins = [k for k in same if (k["network"], k["groups"]) == (cell["network"], cell["groups"])]
    small = None
    for how in repairs:
        if how in cell["accuracy"]:
            continue
        alike = [k for k in twins if how in k["accuracy"] and (how == "none" or k["seed"] == cell["seed"])]
        if alike:
            cell["accuracy"][how] = alike[0]["accuracy"][how]
            continue
        if small is None:
            small, verification = subject.pruned(plan)
            cell["error"] = verification.error
        start = time.perf_counter()
        network, samples = subject.repaired(small, plan, how)
        seconds = time.perf_counter() - start
        cell["accuracy"][how] = asdict(test.accuracy(network)) | {"repair_s": round(seconds, 2), "fitted_on": samples}
    return cell


def base(network: nn.Module, test: Test) -> Found:
    """Of the network itself."""
    return test.accuracy(network, screen=False)

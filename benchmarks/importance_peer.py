"""torch-pruning's criteria on the same networks, at the same multiply-adds as counted by graphprune."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from importance_data import Test
from torch import nn

import graphprune as gp
from graphprune.cost import macs, params

if TYPE_CHECKING:
    from importance_accuracy import Subject

Record = dict[str, Any]
PEERS: Mapping[str, type] = {
    "torch-pruning magnitude": tp.importance.GroupMagnitudeImportance,
    "torch-pruning BN scale": tp.importance.BNScaleImportance,
    "torch-pruning FPGM": tp.importance.FPGMImportance,
    "torch-pruning Taylor": tp.importance.GroupTaylorImportance,
    "torch-pruning Hessian": tp.importance.GroupHessianImportance,
}
GRADIENTS: Mapping[str, str] = {"torch-pruning Taylor": "gradients", "torch-pruning Hessian": "squares"}
"""What a criterion reads from `.grad`, by the attribute of `Peer` that collects it as the documentation says."""
STEPS = 12
"""Bisections of the fraction that is pruned."""


class Peer:
    """torch-pruning on one subject.

    Args:
        subject: whose network, groups and calibration images are used.
        options: of torch-pruning's pruner.
    """

    def __init__(self, subject: Subject, options: Mapping[str, Any] | None = None) -> None:
        self.subject, self.options = subject, options or {}

    def measured(self, cell: Record, test: Test) -> Record:
        """The cell with the accuracy of what torch-pruning leaves: of its networks within the target the largest."""
        coupling = self.subject.coupling
        whole = {cost.name: cost.at({}) for cost in (macs(coupling), params(coupling))}
        low, high, best = 0.0, 1.0, None
        for _ in range(STEPS):
            middle = (low + high) / 2
            small = self.pruned(cell["criterion"], middle)
            left = gp.couple(gp.trace(small, self.subject.inputs))
            kept = {cost.name: cost.at({}) / whole[cost.name] for cost in (macs(left), params(left))}
            if kept["macs"] <= cell["target"]:
                best, high = (small, kept, middle), middle
            else:
                low = middle
        assert best is not None, "pruning everything is not within the target"
        cell |= {"kept": best[1], "plan": "", "pruning_ratio": best[2]}
        cell["accuracy"]["none"] = asdict(test.accuracy(best[0]))
        return cell

    def pruned(self, criterion: str, ratio: float) -> nn.Module:
        """A copy of the network after torch-pruning's pruner took this fraction of every group."""
        network = copy.deepcopy(self.subject.network).requires_grad_(True)
        gradients = getattr(self, GRADIENTS[criterion]) if criterion in GRADIENTS else {}
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        tp.pruner.BasePruner(
            network,
            self.subject.batches[0][0][:1],
            importance=PEERS[criterion](),
            pruning_ratio=ratio,
            ignored_layers=self.ignored(network),
            **self.options,
        ).step()
        return network.eval()

    def ignored(self, network: nn.Module) -> list[nn.Module]:
        """The classifier, and the layers that write the residual stream where that is kept."""
        writers = [m for n, m in network.named_modules() if n == "conv1" or n.endswith(".conv2")]
        return [network.linear, *(writers if self.subject.keep_names else [])]

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the loss over all calibration images."""
        network = copy.deepcopy(self.subject.network).requires_grad_(True)
        for x, y in self.subject.batches:
            nn.functional.cross_entropy(network(x), y, reduction="sum").backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    @cached_property
    def squares(self) -> dict[str, torch.Tensor]:
        """What `accumulate_grad` makes of the gradients of one image after the other."""
        network = copy.deepcopy(self.subject.network).requires_grad_(True)
        scorer = tp.importance.GroupHessianImportance()
        for x, y in self.subject.batches:
            for one, label in zip(x.split(1), y.split(1), strict=True):
                network.zero_grad()
                nn.functional.cross_entropy(network(one), label).backward()
                scorer.accumulate_grad(network)
        found = scorer._accu_grad
        return {name: found[p] / scorer._counter[p] for name, p in network.named_parameters() if p in found}

"""Collaborative channel pruning with auxiliary classifiers: losses in the middle of the network say what matters there.

    python examples/ccp_auxiliary.py --data DIR --weights resnet56-4bfd9763.th --macs 0.5 --epochs 5

Peng et al., Collaborative Channel Pruning (ICML 2019), its CCP-AC. A classifier reads the output of each stage but the
last. They are trained alone at first; then channels are chosen together by the sum of all losses, and the smaller
network is fine-tuned on it. In the end the classifiers are dropped. The pruner needs to be told nothing: a module that
holds the network and its classifiers is a model like any other, and the network inside it stays of its class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cifar_training import begin, parser, told, tuned
from torch import nn
from torch.nn import functional
from zoo_cifar import macs

import graphprune as gp


class WithClassifiers(nn.Module):
    """A network, and a classifier on the pooled output of each of some modules: all logits, the network's first.

    Args:
        network: any module that returns logits.
        widths: per path of a module, how many channels its output has.
        classes: how many there are.
    """

    def __init__(self, network: nn.Module, widths: dict[str, int], classes: int = 10) -> None:
        super().__init__()
        self.network, self.paths = network, tuple(widths)
        self.classifiers = nn.ModuleList(nn.Linear(width, classes) for width in widths.values())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        held: dict[str, torch.Tensor] = {}

        def note(path: str) -> object:
            return lambda module, given, output: held.update({path: output})

        handles = [self.network.get_submodule(path).register_forward_hook(note(path)) for path in self.paths]
        try:
            logits = [self.network(images)]
        finally:
            for handle in handles:
                handle.remove()
        pairs = zip(self.paths, self.classifiers, strict=True)
        return logits + [classifier(held[path].mean((2, 3))) for path, classifier in pairs]


class Loss:
    """Cross entropy of the network, and of the classifiers with a weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        first, *others = (functional.cross_entropy(each, labels) for each in logits)
        return first + self.weight * sum(others)


def main(given: Sequence[str] | None = None) -> nn.Module:
    found = parser(__doc__)
    found.add_argument("--macs", type=float, default=0.5, help="fraction that stays")
    found.add_argument("--weight", type=float, default=0.3, help="of each auxiliary loss")
    options = found.parse_args(given)
    network, data = begin(options)
    whole, example = macs(network), data.test.images[:2]
    told("original", network, data)
    loss = Loss(options.weight)
    both = WithClassifiers(network, {"layer1": 16, "layer2": 32}).eval()
    network.requires_grad_(False)
    tuned(both, data, loss=loss, epochs=1, lr=0.1, progress=False)
    network.requires_grad_(True)
    calibration = data.train.batches(options.calibration)
    importance = gp.importance.Collaborative(calibration, loss, progress=False)
    result = gp.prune(both, example, target=gp.Target(macs=options.macs), importance=importance, allocation="greedy")
    told("pruned", result.model.network, data, whole)
    tuned(result.model, data, loss=loss, epochs=options.epochs, lr=options.lr)
    told("fine-tuned", result.model.network, data, whole)
    return result.model.network


if __name__ == "__main__":
    main()

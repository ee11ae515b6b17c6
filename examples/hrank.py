"""HRank's schedule: ranks are counted once; then layer after layer is pruned and the whole network trained in between.

    python examples/hrank.py --data DIR --weights resnet56-4bfd9763.th --keep 0.5 --epochs 5

Lin et al., HRank (CVPR 2020). The score of a channel is the mean rank of its feature maps over a few batches of the
*original*; it is not taken anew when earlier layers are small. `--variant` makes the ablation's other orders: "edge"
cuts the lowest and the highest ranks, "reverse" the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

from cifar_training import begin, inner, parser, told, tuned
from torch import nn
from zoo_cifar import macs

import graphprune as gp


class Fixed:
    """An importance that was computed before, for one group; the others stay whole."""

    def __init__(self, group: str, score: object) -> None:
        self.group, self.score = group, score

    def __call__(self, model: nn.Module, coupling: gp.Coupling) -> dict[str, object]:
        return {self.group: self.score}


def main(given: Sequence[str] | None = None) -> nn.Module:
    found = parser(__doc__)
    found.add_argument("--keep", type=float, default=0.5, help="fraction of the channels of each layer that stays")
    found.add_argument("--variant", choices=["rank", "edge", "reverse"], default="rank")
    options = found.parse_args(given)
    network, data = begin(options)
    whole, example = macs(network), data.test.images[:2]
    told("original", network, data)
    coupling = gp.couple(gp.trace(network, example))
    batches = [images for images, _ in data.train.batches(options.calibration)]
    scores = gp.importance.Rank(batches, variant=options.variant, progress=False)(network, coupling)
    model = network
    for layer in inner(coupling):
        target = gp.Target(channels={layer: options.keep})
        model = gp.prune(model, example, target=target, importance=Fixed(layer, scores[layer])).model.eval()
        told(f"{layer} pruned", model, data, whole)
        if options.epochs:
            tuned(model, data, epochs=options.epochs, lr=options.lr, progress=False)
            told(f"{layer} tuned", model, data, whole)
    return model


if __name__ == "__main__":
    main()

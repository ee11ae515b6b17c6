"""ThiNet, layer by layer: prune one layer, repair, train for a short while, go on to the next.

    python examples/thinet.py --data DIR --weights resnet20-12fca82f.th --keep 0.5

Luo et al., ThiNet (ICCV 2017). Channels go greedily, so that the next layer's output is changed least; least squares
then puts what they did into the weights that are left. The layers inside blocks are pruned in order, each of a model
whose earlier layers are small already, so that errors do not add up unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

from cifar_training import begin, inner, parser, told, tuned
from torch import nn
from zoo_cifar import macs

import graphprune as gp


def main(given: Sequence[str] | None = None) -> nn.Module:
    found = parser(__doc__)
    found.add_argument("--keep", type=float, default=0.5, help="fraction of the channels of each layer that stays")
    found.add_argument("--last-epochs", type=int, default=2, help="of fine-tuning in the end")
    options = found.parse_args(given)
    network, data = begin(options)
    whole, example = macs(network), data.test.images[:2]
    told("original", network, data)
    calibration = data.train.batches(options.calibration)
    model = network
    for layer in inner(gp.couple(gp.trace(network, example))):
        result = gp.prune(
            model,
            example,
            target=gp.Target(channels={layer: options.keep}),
            importance=gp.importance.Reconstruction(calibration, progress=False),
            repair="least_squares",
            loss=nn.functional.cross_entropy,
        )
        model = result.model.eval()
        told(f"{layer} pruned and repaired", model, data, whole)
        if options.epochs:
            tuned(model, data, epochs=options.epochs, lr=options.lr / 10, progress=False)
            told(f"{layer} tuned", model, data, whole)
    if options.last_epochs:
        tuned(model, data, epochs=options.last_epochs, lr=options.lr)
        told("after the last fine-tuning", model, data, whole)
    return model


if __name__ == "__main__":
    main()

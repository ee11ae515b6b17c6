"""Prune a detector of torchvision and get a detector back: same class, its own boxes, thresholds and suppression.

    python examples/detector.py fasterrcnn_resnet50_fpn --macs 0.5

A detector's forward depends on values (how many boxes there are), so it cannot be traced as a whole. All its weights
are in the part between the image batch and the tensors that boxes are decoded from. `TensorPart` is that part, over
the detector itself: what is pruned inside it is the detector's own modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import graphprune as gp


class TensorPart(nn.Module):
    """From images to the outputs of all heads, for any detector in torchvision.models.detection."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> list[Any]:
        features = self.detector.backbone(images)
        if not isinstance(features, dict):
            features = {"0": features}
        maps = list(features.values())
        if not hasattr(self.detector, "rpn"):
            return [self.detector.head(maps)]
        found, heads = [self.detector.rpn.head(maps)], self.detector.roi_heads
        for kind in ("box", "mask", "keypoint"):
            pool = getattr(heads, f"{kind}_roi_pool")
            if pool is not None:
                head, predictor = getattr(heads, f"{kind}_head"), getattr(heads, f"{kind}_predictor")
                found.append(predictor(head(self.regions(features, pool))))
        return found

    @staticmethod
    def regions(features: dict[str, torch.Tensor], pool: nn.Module) -> torch.Tensor:
        """What RoI align gives the heads, with the whole image for a region.

        It treats each channel alone, as RoI align does, and reads all the levels that RoI align may read.
        """
        levels = [features[name] for name in pool.featmap_names if name in features]
        return sum(functional.adaptive_avg_pool2d(level, pool.output_size) for level in levels)


def prune_detector(detector: nn.Module, images: torch.Tensor, **options: Any) -> tuple[nn.Module, gp.Result]:
    """A smaller detector of the same class; `options` are those of `gp.prune`.

    Raises:
        graphprune.RewriteError: no detector of the same class can have the channels that the target leaves.
    """
    result = gp.prune(TensorPart(detector), images, **{"emit": "graft"} | options)
    return result.model.detector, result


def main(arguments: Sequence[str] | None = None) -> None:
    from torchvision import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=models.list_models(module=models.detection))
    parser.add_argument("--weights", help="'DEFAULT' downloads what torchvision has; random weights without it")
    parser.add_argument("--macs", type=float, default=0.5, help="the fraction kept")
    parser.add_argument("--size", type=int, default=320, help="height and width of the image that is traced")
    given = parser.parse_args(arguments)
    detector = models.get_model(given.name, weights=given.weights, weights_backbone=None).eval()
    target = gp.Target(macs=given.macs)
    small, result = prune_detector(detector, torch.rand(1, 3, given.size, given.size), target=target)
    print(result.report)
    with torch.no_grad():
        found = small([torch.rand(3, given.size, given.size)])[0]
    print(f"{type(small).__name__} gives", {name: tuple(tensor.shape) for name, tensor in found.items()})


if __name__ == "__main__":
    main()

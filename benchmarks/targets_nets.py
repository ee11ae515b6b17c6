"""The networks of the benchmark of targets, with random weights that differ between filters, and their scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shim
import torch
from torch import nn

import graphprune as gp
from graphprune.importance import Removal

shim.install()
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SPREAD = 0.5
"""Standard deviation of the logarithm of what the filters of a layer are multiplied with."""
Built = tuple[nn.Module, Any]


def torchvision(name: str, side: int = 224, **options: Any) -> Callable[[], Built]:
    """A network for images of that size."""

    def build() -> Built:
        import torchvision.models

        return torchvision.models.get_model(name, weights=None, **options), torch.rand(1, 3, side, side)

    return build


def bert() -> Built:
    """The encoder of BERT-base, at 128 tokens."""
    import transformers

    config = transformers.BertConfig()
    return transformers.BertModel(config), {"input_ids": torch.randint(config.vocab_size, (1, 128))}


def cifar() -> Built:
    """ResNet-56 for images of 32 x 32."""
    import cifar10_resnet

    return cifar10_resnet.ResNet(9), torch.rand(1, 3, 32, 32)


NETWORKS: Mapping[str, Callable[[], Built]] = {
    "ResNet-50": torchvision("resnet50"),
    "DenseNet-121": torchvision("densenet121"),
    "MobileNetV2": torchvision("mobilenet_v2"),
    "EfficientNet-B0": torchvision("efficientnet_b0"),
    "RegNetY-400MF": torchvision("regnet_y_400mf"),
    "Inception v3": torchvision("inception_v3", 299, init_weights=False),
    "Swin-T": torchvision("swin_t"),
    "ViT-B/16": torchvision("vit_b_16"),
    "BERT-base": bert,
    "ResNet-56": cifar,
}


def build(name: str) -> Built:
    """A network in eval mode and its example inputs. The filters of every layer differ in size, as trained ones do."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scales = torch.exp(SPREAD * torch.randn(len(parameter)))
                parameter *= scales.reshape(-1, *[1] * (parameter.dim() - 1))
    return model.eval(), inputs


SCORES = ("of mean 1", "as they are")
"""Squared magnitudes, which add up: divided by their mean in each group, or not."""


def scored(model: nn.Module, coupling: gp.Coupling, kind: str) -> dict[str, Removal]:
    """The order of removal of every group."""
    scores = {name: score.square() for name, score in gp.importance.Magnitude()(model, coupling).items()}
    scores = {name: score / score.mean() if kind == SCORES[0] else score for name, score in scores.items()}
    return {name: removal(score) for name, score in scores.items()}


def removal(scores: torch.Tensor) -> Removal:
    """The lowest goes first."""
    order = scores.argsort(stable=True)
    return Removal(order, scores[order])


def wide(layers: int = 400, width: int = 256) -> tuple[gp.Coupling, dict[str, Removal]]:
    """A chain of about 100 000 channels and random scores, without weights."""
    with torch.device("meta"):
        net = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())))
        coupling = gp.couple(gp.trace(net.eval(), torch.empty(1, width)))
    random = torch.Generator().manual_seed(0)
    return coupling, {g.name: removal(torch.rand(g.size, generator=random)) for g in coupling.groups}


def small(seed: int) -> tuple[gp.Coupling, dict[str, Removal]]:
    """A chain with a shortcut, of four groups of 3 to 7 channels, and random scores: every choice can be tried."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 8, (4,), generator=random).tolist()
    with torch.device("meta"):
        net = _Shortcut(*sizes)
        coupling = gp.couple(gp.trace(net.eval(), torch.empty(1, 3, 8, 8)))
    return coupling, {g.name: removal(torch.rand(g.size, generator=random).square()) for g in coupling.groups}


class _Shortcut(nn.Module):
    def __init__(self, a: int, b: int, c: int, d: int) -> None:
        super().__init__()
        self.stem, self.enter, self.leave = nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, a, 1)
        self.down, self.deep = nn.Conv2d(a, c, 3, 2), nn.Conv2d(c, d, 3, padding=1)
        self.classify = nn.Linear(d, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.leave(self.enter(x).relu())).relu()
        return self.classify(self.deep(self.down(x).relu()).relu().mean((2, 3)))

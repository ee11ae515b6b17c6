"""The reference networks of the pruning literature on CIFAR-10, and what they cost.

    python examples/zoo_cifar.py

prints one line for each: multiply-adds for one image, and the parameters of convolutions and linear layers, which is
how the papers count them. `NETWORKS[name]()` builds one with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from cifar10_resnet import WIDTHS, ResNet
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

STAGES = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions per stage of a VGG, by depth."""
INCEPTIONS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
"""Widths of an inception: 1 x 1; reduction and 3 x 3; reduction and 5 x 5; what follows the pooling."""


class VGG(nn.Module):
    """Simonyan and Zisserman (2015) with batch norms, for images of 32 x 32.

    Args:
        depth: 16 or 19.
        hidden: width of a layer before the classifier; 0 for none.
        bias: whether convolutions have one, though a norm follows them.
    """

    def __init__(self, depth: int, *, hidden: int = 0, bias: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, count in enumerate(STAGES[depth]):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(count):
                width = min(64 << stage, 512)
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            *((nn.Linear(512, hidden), nn.BatchNorm1d(hidden), nn.ReLU()) if hidden else ()),
        )
        self.classifier = nn.Linear(hidden or 512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(functional.avg_pool2d(self.features(x), 2).flatten(1)))


class Bottleneck(nn.Module):
    """He et al., Identity Mappings in Deep Residual Networks (2016): norm and ReLU come before each convolution."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, planes, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 4 * planes, 1, bias=False)
        fits = channels == 4 * planes
        self.shortcut = None if fits else nn.Conv2d(channels, 4 * planes, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(first))))
        out = self.conv3(functional.relu(self.bn3(out)))
        return out + (x if self.shortcut is None else self.shortcut(first))


class PreActivationResNet(nn.Module):
    """Depth 9n + 2 of bottlenecks."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        blocks, channels = [], WIDTHS[0]
        for planes in WIDTHS:
            for k in range(n):
                blocks.append(Bottleneck(channels, planes, 2 if k == 0 and planes != WIDTHS[0] else 1))
                channels = 4 * planes
        self.blocks, self.bn = nn.Sequential(*blocks), nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.relu(self.bn(self.blocks(self.conv1(x)))).mean(dim=(2, 3)))


class Dense(nn.Module):
    """One layer of a DenseNet: what it computes is put beside what it reads."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(functional.relu(self.bn(x)))], dim=1)


class DenseNet(nn.Module):
    """Huang et al. (2017): depth 3n + 4, no bottlenecks, and no compression between the three blocks."""

    def __init__(self, n: int, growth: int) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                narrow = nn.Conv2d(channels, channels, 1, bias=False)
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), narrow, nn.AvgPool2d(2)]
            for _ in range(n):
                layers.append(Dense(channels, growth))
                channels += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))


def convolved(channels: int, width: int, kernel: int) -> list[nn.Module]:
    """A convolution with its norm and ReLU."""
    return [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]


class Inception(nn.Module):
    """Four branches, concatenated; the 5 x 5 is two 3 x 3."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, narrow3, three, narrow5, five, pooled = widths
        self.branch1 = nn.Sequential(*convolved(channels, one, 1))
        self.branch3 = nn.Sequential(*convolved(channels, narrow3, 1), *convolved(narrow3, three, 3))
        first = [*convolved(channels, narrow5, 1), *convolved(narrow5, five, 3)]
        self.branch5 = nn.Sequential(*first, *convolved(five, five, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), *convolved(channels, pooled, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pooled(x)], dim=1)


class GoogLeNet(nn.Module):
    """Szegedy et al. (2015), for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = convolved(3, 192, 3), 192
        for name, widths in INCEPTIONS.items():
            layers += [nn.MaxPool2d(3, 2, padding=1)] if name in ("a4", "a5") else []
            layers.append(Inception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.features, self.linear = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "vgg16_bn": lambda: VGG(16, hidden=512),
    "vgg19_bn": lambda: VGG(19, bias=False),
    "resnet20": lambda: ResNet(3),
    "resnet56": lambda: ResNet(9),
    "resnet110": lambda: ResNet(18),
    "preresnet164": lambda: PreActivationResNet(18),
    "densenet40": lambda: DenseNet(12, growth=12),
    "googlenet": GoogLeNet,
}


def macs(network: nn.Module) -> int:
    """Multiply-adds of convolutions and linear layers for one image, counted by PyTorch as it runs."""
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops() // 2


def weights(network: nn.Module) -> int:
    """Parameters of convolutions and linear layers."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(p.numel() for layer in layers for p in layer.parameters())


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help=f"some of {', '.join(NETWORKS)}")
    for name in parser.parse_args(given).names:
        if name not in NETWORKS:
            parser.error(f"no network {name!r}; there are {', '.join(NETWORKS)}")
        network = NETWORKS[name]()
        print(f"{name:<13} {macs(network) / 1e6:9.2f} M MACs {weights(network) / 1e6:7.2f} M parameters", flush=True)


if __name__ == "__main__":
    main()

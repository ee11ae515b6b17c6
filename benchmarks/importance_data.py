"""What the benchmark of importance runs on: trained CIFAR-10 networks, calibration and test images, and accuracy."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar10_resnet as cifar

CHOSEN_FROM = 20_000
"""Calibration images are chosen among the first training images, in the official order."""
BATCH = 125
"""Calibration images per batch."""
PART = 50
"""Test images per forward."""
SCREEN = 2000
HOPELESS = 0.6
"""A network that classifies fewer of the first `SCREEN` test images correctly is not measured on the others."""

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Found:
    """An accuracy, and how many test images it is of."""

    accuracy: float
    images: int


def depth(network: cifar.ResNet) -> str:
    """Its usual name."""
    return f"resnet{6 * len(network.layer1) + 2}"


def training(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The first training images, normalised, and their classes.

    `directory` holds `train20k.npz` or `train.npz` (x uint8 [n, 32, 32, 3], y), or the official `cifar-10-batches-py`.
    """
    files = [directory / name for name in ("train20k.npz", "train.npz") if (directory / name).exists()]
    if files:
        with np.load(files[0]) as arrays:
            x, y = arrays["x"][:CHOSEN_FROM].transpose(0, 3, 1, 2), arrays["y"][:CHOSEN_FROM]
    else:
        found = [d for d in (directory, directory / "cifar-10-batches-py") if (d / "data_batch_1").exists()]
        if not found:
            raise SystemExit(f"{directory} holds neither train20k.npz, train.npz nor cifar-10-batches-py/data_batch_1")
        parts = []
        for k in (1, 2):
            with (found[0] / f"data_batch_{k}").open("rb") as file:
                parts.append(pickle.load(file, encoding="bytes"))
        x = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        y = np.concatenate([part[b"labels"] for part in parts])
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def calibration(images: torch.Tensor, labels: torch.Tensor, seed: int, count: int) -> Batches:
    """So many of the training images, the same for the same seed, in batches."""
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))[:count])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cifar.MEAN, cifar.STD))
    x = (images[chosen].float() / 255 - mean) / std
    return list(zip(x.split(BATCH), labels[chosen].split(BATCH), strict=True))


class Test:
    """The test set, in the layout that convolutions are fastest in.

    Args:
        images, labels: all of it.
    """

    __test__ = False

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.x = [x.contiguous(memory_format=torch.channels_last) for x in images.split(PART)]
        self.labels = labels

    def accuracy(self, network: nn.Module, *, screen: bool = True) -> Found:
        """Fraction of the test images that `network` classifies correctly, in float32.

        Batch norms are put into the convolutions before them, which changes nothing but the time: that the outputs are
        the same is checked on the first images.
        """
        fast = fused(network).to(memory_format=torch.channels_last)
        right, seen = 0, 0
        with torch.inference_mode():
            want, got = network(self.x[0]), fast(self.x[0])
            if not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
                raise AssertionError(f"fusing changed outputs by {float((got - want).abs().max()):.1e}")
            for x in self.x:
                right += int((fast(x).argmax(1) == self.labels[seen : seen + len(x)]).sum())
                seen += len(x)
                if screen and seen == SCREEN and right < HOPELESS * seen:
                    break
        return Found(right / seen, seen)


def fused(network: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them, but for grafts, which read both."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        for k in ("1", "2") if type(module) in (cifar.ResNet, cifar.BasicBlock) else ():
            conv, norm = getattr(module, f"conv{k}", None), getattr(module, f"bn{k}", None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, f"conv{k}", fuse_conv_bn_eval(conv, norm))
                setattr(module, f"bn{k}", nn.Identity())
    return network


def networks(files: Sequence[Path]) -> dict[str, cifar.ResNet]:
    """The trained networks by name."""
    loaded = [cifar.load_network(file) for file in files]
    return {depth(network): network for network in loaded}

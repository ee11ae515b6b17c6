"""What the training examples share: images, batches with augmentation, a network to begin with, and accuracy.

With `--data DIR` the images are CIFAR-10's: `train.npz` or `train20k.npz`, and `test.npz` (x uint8 [n, 32, 32, 3], y),
or the official `cifar-10-batches-py`. Without, a small set is made up, of ten patterns seen through noise: enough to
see every step work in seconds, and for nothing else.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cifar10_resnet import MEAN, STD, ResNet, accuracy, load_network, load_test
from torch import nn
from torch.nn import functional
from zoo_cifar import macs

import graphprune as gp

BATCH = 64
VALIDATION = 0.1
"""Fraction of the training images that is kept back to choose epochs by."""


@dataclass(frozen=True, eq=False)
class Split:
    """Normalised images of shape (n, 3, 32, 32), and their classes."""

    images: torch.Tensor
    labels: torch.Tensor

    def batches(self, count: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first so many images as they are, in batches."""
        return list(zip(self.images[:count].split(BATCH), self.labels[:count].split(BATCH), strict=True))

    def accuracy(self, model: nn.Module) -> float:
        """Fraction classified correctly in eval mode; the model is in eval mode afterwards."""
        return accuracy(model.eval(), self.images, self.labels)


class Augmented:
    """Batches in another order in every pass, each image shifted by up to 4 pixels and mirrored or not.

    Draws from torch's global generator, so that seeding it fixes a run, and a run that was stopped can go on.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels) // BATCH or 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.split.labels))
        for part in order.split(BATCH)[: len(self)]:
            images = functional.pad(self.split.images[part], (4, 4, 4, 4))
            rows, columns = torch.randint(9, (2, len(part), 1)) + torch.arange(32)
            columns = torch.where(torch.rand(len(part), 1) < 0.5, columns, columns.flip(1))
            which = torch.arange(len(part))[:, None, None]
            yield images.movedim(1, 3)[which, rows[:, :, None], columns[:, None]].movedim(3, 1), self.split.labels[part]


@dataclass(frozen=True, eq=False)
class Data:
    """Images in three splits; the test images are for the last figure alone."""

    train: Split
    validation: Split
    test: Split


def load(directory: Path | None, limit: int | None = None) -> Data:
    """The images; at most `limit` for training and validation together."""
    if directory is None:
        images, labels = made_up(limit or 320, seed=0)
        test = Split(*made_up(200, seed=1))
    else:
        images, labels = load_training(directory, limit)
        test = Split(*load_test(directory, None))
    kept_back = round(VALIDATION * len(labels))
    train, validation = Split(images[kept_back:], labels[kept_back:]), Split(images[:kept_back], labels[:kept_back])
    return Data(train, validation, test)


def made_up(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ten patterns, each shifted and seen through noise."""
    coarse = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(1234))
    patterns = functional.interpolate(coarse, size=32, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return patterns[labels] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator), labels


def load_training(directory: Path, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised training images in the official order, and their classes."""
    files = [directory / name for name in ("train.npz", "train20k.npz") if (directory / name).exists()]
    if files:
        with np.load(files[0]) as arrays:
            x, y = arrays["x"][:limit].transpose(0, 3, 1, 2), arrays["y"][:limit]
    else:
        places = [directory, directory / "cifar-10-batches-py"]
        parts = [p / f"data_batch_{k}" for p in places for k in range(1, 6) if (p / f"data_batch_{k}").exists()]
        if not parts:
            raise SystemExit(f"{directory} holds neither train.npz, train20k.npz nor cifar-10-batches-py/data_batch_1")
        held = [pickle.loads(part.read_bytes(), encoding="bytes") for part in parts]
        x = np.concatenate([h[b"data"] for h in held])[:limit].reshape(-1, 3, 32, 32)
        y = np.concatenate([h[b"labels"] for h in held])[:limit]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    images = torch.from_numpy(np.ascontiguousarray(x)).float() / 255
    return (images - mean) / std, torch.from_numpy(y.astype(np.int64))


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options that all examples have."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, help="directory of CIFAR-10; made-up images without it")
    found.add_argument("--weights", type=Path, help="a trained ResNet-20 or ResNet-56; trained here without it")
    found.add_argument("--images", type=int, help="use only the first training images")
    found.add_argument("--calibration", type=int, default=256, help="training images that criteria look at")
    found.add_argument("--train-epochs", type=int, default=4, help="of the network to begin with, without --weights")
    found.add_argument("--epochs", type=int, default=1, help="of fine-tuning after each step")
    found.add_argument("--lr", type=float, default=0.01)
    found.add_argument("--seed", type=int, default=0)
    return found


def begin(options: argparse.Namespace) -> tuple[nn.Module, Data]:
    """A trained network in eval mode, and the images."""
    torch.manual_seed(options.seed)
    data = load(options.data, options.images)
    if options.weights:
        return load_network(options.weights), data
    network = ResNet(3 if options.data else 1)
    tuned(network, data, epochs=options.train_epochs, lr=0.1)
    return network.eval(), data


def tuned(model: nn.Module, data: Data, **options: object) -> nn.Module:
    """The model after fine-tuning, with the weights of its best epoch on the validation images, in eval mode."""
    loader, validation = Augmented(data.train), data.validation.batches()
    return gp.recover.finetune(model, loader, validation=validation, **options).model.eval()


def inner(coupling: gp.Coupling) -> list[str]:
    """Groups inside blocks: all but the residual stream, which many layers share."""
    stream = {"conv1", "layer2.0.conv2", "layer3.0.conv2"}
    return [g.name for g in coupling.groups if not any(g.name == s or g.name.startswith(f"{s}[") for s in stream)]


def told(what: str, model: nn.Module, data: Data, whole: int = 0) -> None:
    """Print a line about a model; `whole` are the multiply-adds of the original."""
    kept = f", {macs(model) / whole:.3f} of the MACs" if whole else ""
    print(f"{what}: accuracy {data.test.accuracy(model):.4f}{kept}", flush=True)

"""Prune a trained CIFAR-10 ResNet-20 or ResNet-56 and measure what is left of its accuracy before any fine-tuning.

    python examples/cifar10_resnet.py --data DIR --weights resnet56-4bfd9763.th --targets 0.9 0.7 0.5

The weights are those of https://github.com/akamaster/pytorch_resnet_cifar10. DIR holds `test.npz` (x uint8
[n, 32, 32, 3], y) or the official `cifar-10-batches-py`. Accuracies are fractions of the test images.

Every target is met twice: once by pruning everything, once by pruning only the channels inside the blocks and keeping
the residual stream. The shortcuts have no weights (a strided slice and zero padding), so the streams of the three
stages are one set of channels, of which each stage adds some: nothing here tells the pruner so.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp

WIDTHS = (16, 32, 64)
STREAM = ("bn1", "layer2.0.bn2", "layer3.0.bn2")
"""Modules whose only channels are those of the residual stream, one per stage."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; where the width grows, the shortcut is subsampled and padded with zero channels."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.added = planes // 4 if channels != planes else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """He et al., Deep Residual Learning for Image Recognition (2016), section 4.2: depth 6n + 2, option A."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], n, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], n, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], n, stride=2)
        self.linear = nn.Linear(WIDTHS[2], 10)

    @staticmethod
    def _stage(channels: int, planes: int, n: int, *, stride: int) -> nn.Sequential:
        first = BasicBlock(channels, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(n - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def load_network(file: Path) -> ResNet:
    """The network whose depth the checkpoint shows, with its weights, in eval mode."""
    state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    blocks = {int(found[1]) for name in state if (found := re.match(r"layer1\.(\d+)\.", name))}
    network = ResNet(len(blocks))
    network.load_state_dict(state, strict=True)
    return network.eval()


def load_test(directory: Path, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised test images of shape (n, 3, 32, 32), and their classes."""
    if (directory / "test.npz").exists():
        with np.load(directory / "test.npz") as arrays:
            x, y = arrays["x"].transpose(0, 3, 1, 2), arrays["y"]
    else:
        found = [d for d in (directory, directory / "cifar-10-batches-py") if (d / "test_batch").exists()]
        if not found:
            raise SystemExit(f"{directory} holds neither test.npz nor cifar-10-batches-py/test_batch")
        with (found[0] / "test_batch").open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        x, y = batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    images = torch.from_numpy(np.ascontiguousarray(x[:limit])).float() / 255
    return (images - mean) / std, torch.from_numpy(y[:limit].astype(np.int64))


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of the images that `model` classifies correctly."""
    with torch.inference_mode():
        parts = zip(images.split(250), labels.split(250), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return right / len(labels)


@dataclass(frozen=True)
class Row:
    """One pruned network.

    Attributes:
        target: fraction of the MACs asked for.
        pruned: "all" or "inner", the channels inside the blocks alone.
        accuracy: fraction of the test images, before any fine-tuning.
        macs_kept, params_kept: fractions of the original.
        error: of the pruned network against the original with the same channels zeroed, relative.
        effect: of zeroing those channels, in the same measure.
        precision: dtype the two were compared in.
        emitter: what kind of module was made.
        channels: kept channels per group.
    """

    target: float
    pruned: str
    accuracy: float
    macs_kept: float
    params_kept: float
    error: float
    effect: float
    precision: str
    emitter: str
    channels: Mapping[str, int]

    def __str__(self) -> str:
        kept = f"{self.macs_kept:>9.4f}  {self.params_kept:>11.4f}"
        return f"{self.target:>6}  {self.pruned:<6}  {self.accuracy:>8.4f}  {kept}  {self.error:>8.1e}  {self.emitter}"


HEAD = "target  pruned  accuracy  macs_kept  params_kept     error  emitter"


def row(pruned: str, result: gp.Result, found: float) -> Row:
    """The figures of one result."""
    report = result.report
    assert report.verification is not None, "prune verifies unless it is told not to"
    return Row(
        target=report.requested.budgets["macs"],
        pruned=pruned,
        accuracy=found,
        macs_kept=report.costs["macs"].kept,
        params_kept=report.costs["params"].kept,
        error=report.verification.error,
        effect=report.verification.effect,
        precision=report.verification.precision,
        emitter=report.emitter,
        channels={w.name: w.after for w in report.groups},
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write the file in one step."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the CIFAR-10 test set")
    parser.add_argument("--weights", type=Path, required=True, help="resnet20-*.th or resnet56-*.th")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.7, 0.5], help="fractions of MACs to keep")
    parser.add_argument("--importance", choices=["magnitude", "random"], default="magnitude")
    parser.add_argument("--seed", type=int, default=0, help="of the random importance")
    parser.add_argument("--limit", type=int, help="use only the first test images")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(given)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a directory")
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    importance = gp.importance.Random(options.seed) if options.importance == "random" else gp.importance.Magnitude()
    targets = [gp.Target(macs=value) for value in options.targets]
    network = load_network(options.weights)
    images, labels = load_test(options.data, options.limit)
    original = accuracy(network, images, labels)
    print(f"{options.weights.name}: accuracy {original:.4f} on {len(labels)} test images; importance {importance}")
    rows: list[Row] = []
    for target in targets:
        for pruned, keep_names in (("all", ()), ("inner", STREAM)):
            result = gp.prune(network, images[:2], target=target, importance=importance, keep_names=keep_names)
            if not rows:
                costs = {name: change.before for name, change in result.report.costs.items()}
                sizes = {width.name: width.before for width in result.report.groups}
                print(result.coupling.explain("layer1.0.conv2.weight", "layer1.1.conv2.weight"), HEAD, sep="\n\n")
            rows.append(row(pruned, result, accuracy(result.model.eval(), images, labels)))
            print(rows[-1], flush=True)
    if options.json:
        content = {
            "example": Path(__file__).name,
            "weights": options.weights.name,
            "test_images": len(labels),
            "importance": options.importance,
            "seed": options.seed,
            "device": str(images.device),
            "threads": torch.get_num_threads(),
            "versions": {"graphprune": gp.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "original": {"accuracy": original, **costs, "channels": sizes},
            "rows": [asdict(r) for r in rows],
        }
        write_json(options.json, content)


if __name__ == "__main__":
    main()

"""The work behind `graphprune demo`: train a small network on digits, prune it, fine-tune it, measure all three.

Needs the packages of `graphprune[demo]`. Nothing is printed here; `graphprune.cli` does that.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from graphprune.allocate import Target, allocate
from graphprune.couple import couple
from graphprune.importance import Magnitude
from graphprune.pruning import Result, prune
from graphprune.trace import trace

EPOCHS = 12
"""Passes over the training images before pruning; fine-tuning takes a third of that."""
BATCH = 64
WARM_UP = 3
"""Forward passes of each model that are not timed."""
WEIGHTS, PLAN = "digits-pruned.safetensors", "digits-plan.json"
"""File names of what `save_to` writes."""

Advance = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it are done, and of how many."""


class Block(nn.Module):
    """Two convolutions and a residual add."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images of the same shape."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(out)))


class DigitsNet(nn.Module):
    """A classifier of 8 x 8 digits whose two branches are concatenated and then added to.

    The add ties the channels of both branches to the block after them, the flatten ties each channel to 16 columns of
    the classifier: what a pruner that goes layer by layer gets wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block1 = Block(16, 24)
        self.narrow = nn.Conv2d(16, 12, 1)
        self.wide = nn.Conv2d(16, 20, 3, padding=1)
        self.block2 = Block(32, 40)
        self.classifier = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (b, 10) for images of shape (b, 1, 8, 8)."""
        x = self.block1(functional.relu(self.stem(x)))
        x = functional.relu(torch.cat([self.narrow(x), self.wide(x)], dim=1))
        x = self.block2(functional.max_pool2d(x, 2))
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Split:
    """Images of shape (n, 1, 8, 8) in [0, 1], and their digits of shape (n,)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's 1,797 digits, each in one split only."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Stage:
    """The figures of one model.

    Attributes:
        name: "before", "pruned" or "fine-tuned".
        accuracy: fraction of the test images classified correctly.
        macs: multiply-adds for one image.
        params: number of parameter elements.
        latency: median seconds for one forward pass over the test images.
    """

    name: str
    accuracy: float
    macs: int | float
    params: int | float
    latency: float


@dataclass(frozen=True, eq=False)
class Demo:
    """Everything `run_demo` found.

    Attributes:
        stages: before, after pruning and after fine-tuning, in that order.
        result: what `prune` returned.
        model: the pruned model after fine-tuning, in eval mode.
        test_images: how many images accuracy and latency were measured on.
        repeats: how many timings each median is of.
        threads: how many CPU threads torch used.
    """

    stages: tuple[Stage, ...]
    result: Result
    model: nn.Module
    test_images: int
    repeats: int
    threads: int


def run_demo(
    target: Target, *, seed: int = 0, epochs: int = EPOCHS, repeats: int = 51, advance: Advance = lambda *_: None
) -> Demo:
    """Train, prune, fine-tune and measure; the global random state is left alone.

    Args:
        target: what fraction to keep.
        seed: of the first weights and of the order of the training images; the splits are always the same.
        epochs: passes over the training images, at least 1.
        repeats: timings per model.
        advance: told about every step of training.
    Raises:
        TargetError: the target cannot be reached; raised before training.
    """
    data = load_data()
    example = data.test.images[:1]
    network = new_network(seed)
    allocate(Magnitude()(network, coupling := couple(trace(network, example))), target, coupling)
    generator = torch.Generator().manual_seed(seed)
    dense = trained(network, data, epochs=epochs, lr=3e-3, generator=generator, advance=_named(advance, "training"))
    result = prune(dense, example, target=target, importance=Magnitude())
    tune = _named(advance, "fine-tuning")
    tuned = trained(result.model, data, epochs=-(-epochs // 3), lr=1e-3, generator=generator, advance=tune)
    models = {"before": dense, "pruned": result.model, "fine-tuned": tuned}
    seconds = latencies(list(models.values()), data.test.images, repeats=repeats)
    stages = tuple(
        _stage(name, model, result, data.test, time_taken)
        for (name, model), time_taken in zip(models.items(), seconds, strict=True)
    )
    return Demo(stages, result, tuned, len(data.test.labels), repeats, torch.get_num_threads())


def _stage(name: str, model: nn.Module, result: Result, test: Split, latency: float) -> Stage:
    costs = {key: change.before if name == "before" else change.after for key, change in result.report.costs.items()}
    return Stage(name, accuracy(model, test), costs["macs"], costs["params"], latency)


def _named(advance: Advance, name: str) -> Callable[[int, int], None]:
    return lambda done, total: advance(name, done, total)


def new_network(seed: int) -> DigitsNet:
    """The untrained network; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNet().eval()


def load_data() -> Digits:
    """The digits in three splits: 500 images for the test, 200 for validation, the rest for training."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, validation, train = (Split(images[part], labels[part]) for part in order.tensor_split([500, 700]))
    return Digits(train, validation, test)


def trained(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    lr: float,
    generator: torch.Generator,
    advance: Callable[[int, int], None],
) -> nn.Module:
    """A copy of `model` after training, in eval mode, with the weights of its best epoch on the validation images."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * -(-len(data.train.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    best, state, done = -1.0, model.state_dict(), 0
    for _ in range(epochs):
        model.train()
        for batch in torch.split(torch.randperm(len(data.train.labels), generator=generator), BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data.train.images[batch]), data.train.labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            advance(done := done + 1, steps)
        found = accuracy(model, data.validation)
        if found >= best:
            best, state = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return model.eval()


def accuracy(model: nn.Module, split: Split) -> float:
    """Fraction of the images that `model`, put in eval mode, classifies correctly."""
    with torch.inference_mode():
        right: int = (model.eval()(split.images).argmax(1) == split.labels).sum().item()
    return right / len(split.labels)


def latencies(models: Sequence[nn.Module], images: torch.Tensor, *, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each model, after a few that do not count.

    The models take turns, each time from another one on, so whatever else slows the machine down meets all of them.
    """
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for repeat in range(-WARM_UP, repeats):
            for turn in range(len(models)):
                k = (repeat + turn) % len(models)
                start = time.perf_counter()
                models[k](images)
                if repeat >= 0:
                    times[k].append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def save_to(out: Path, demo: Demo) -> tuple[Path, Path]:
    """Write the fine-tuned weights and the plan into the directory `out`.

    Returns:
        The two files, weights first. Each is complete or what it was before.
    """
    tensors = {name: tensor.contiguous() for name, tensor in demo.model.state_dict().items()}
    weights = _write(out / WEIGHTS, save(tensors))
    return weights, _write(out / PLAN, demo.result.plan.to_json().encode())


def _write(path: Path, content: bytes) -> Path:
    """`path`, holding `content`; the file appears in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

"""How a network is fine-tuned, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from graphprune.errors import InputError

Name = Literal["sgd", "adamw"]
DEFAULTS: Mapping[str, tuple[float, float]] = {"sgd": (0.01, 5e-4), "adamw": (5e-4, 0.05)}
"""Per optimizer, its largest learning rate and its weight decay."""


@dataclass(frozen=True)
class Options:
    """Numbers of a run, as `finetune` takes them; all of them must be the same for a run to go on.

    Raises:
        InputError: one is out of its range.
    """

    epochs: int
    lr: float | None
    weight_decay: float | None
    warm_up: float
    label_smoothing: float
    clip: float | None
    ema: float
    patience: int | None
    amp: bool | None

    def __post_init__(self) -> None:
        ranges: Mapping[str, tuple[bool, str]] = {
            "epochs": (isinstance(self.epochs, int) and self.epochs > 0, "a number of passes, at least 1"),
            "lr": (self.lr is None or self.lr > 0, "more than 0"),
            "weight_decay": (self.weight_decay is None or self.weight_decay >= 0, "0 or more"),
            "warm_up": (0 <= self.warm_up < 1, "a fraction of all steps, in [0, 1)"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "clip": (self.clip is None or self.clip > 0, "the largest norm of the gradient, more than 0"),
            "ema": (0 <= self.ema < 1, "a decay in [0, 1), such as 0.999; 0 for no average"),
            "patience": (self.patience is None or self.patience > 0, "a number of epochs, at least 1"),
        }
        for name, (right, meaning) in ranges.items():
            if not right:
                raise InputError(f"finetune({name}={getattr(self, name)!r}): it is {meaning}")

    def optimizer(self, model: nn.Module, given: Name | Optimizer) -> Optimizer:
        """The optimizer over the parameters that ask for gradients.

        Raises:
            InputError: there are none, the name is unknown, or an optimizer is given and options for another one.
        """
        wanted = [p for p in model.parameters() if p.requires_grad]
        if not wanted:
            raise InputError(f"{type(model).__name__} has no parameter that asks for a gradient; nothing can be tuned")
        if isinstance(given, Optimizer):
            if self.lr is not None or self.weight_decay is not None:
                raise InputError("finetune: lr and weight_decay are those of the optimizer given; set them there")
            held = {id(p) for group in given.param_groups for p in group["params"]}
            if not any(id(p) in held for p in wanted):
                raise InputError(
                    "finetune: the optimizer holds no parameter of this model; after pruning, pass "
                    "gp.migrate(optimizer, result)"
                )
            return given
        if given not in DEFAULTS:
            raise InputError(f"finetune(optimizer={given!r}): it is one of {', '.join(DEFAULTS)}, or an optimizer")
        lr, decay = DEFAULTS[given]
        lr, decay = lr if self.lr is None else self.lr, decay if self.weight_decay is None else self.weight_decay
        groups = [  # biases and scales do not decay
            {"params": [p for p in wanted if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in wanted if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if given == "sgd":
            return SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        return AdamW(groups, lr=lr)

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with: it rises evenly, then falls along half a cosine."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2


@dataclass(frozen=True)
class Epoch:
    """One pass over the training batches.

    Attributes:
        number: from 1.
        loss: mean per sample while training.
        accuracy: fraction of the training samples classified correctly; None where there are no classes.
        validation_loss, validation_accuracy: the same of the validation batches after it; None without those.
        lr: the last learning rate.
        seconds: how long it took, validation too.
    """

    number: int
    loss: float
    accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    lr: float
    seconds: float

    def better(self, other: Epoch) -> bool:
        """Whether it did better on the validation batches: in accuracy if that is known, then in loss."""
        return self._rank > other._rank

    @property
    def _rank(self) -> tuple[float, float]:
        loss = self.validation_loss
        return self.validation_accuracy or 0.0, -math.inf if loss is None else -loss

    def __str__(self) -> str:
        known = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "validation loss": self.validation_loss,
            "validation accuracy": self.validation_accuracy,
        }
        told = ", ".join(f"{name} {value:.4f}" for name, value in known.items() if value is not None)
        return f"epoch {self.number}: {told}, lr {self.lr:.2e}, {self.seconds:.1f} s"

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning gave; `print` it for a line per epoch.

    Attributes:
        model: the model that was given, with the weights of the best epoch on the validation batches, or of the last.
        epochs: what each pass gave.
        best: number of the epoch whose weights the model has.
        stopped: why it ended before all epochs were done; empty if it did not.
        optimizer: as it is after the last epoch.
    """

    model: nn.Module = field(repr=False)
    epochs: tuple[Epoch, ...]
    best: int
    stopped: str
    optimizer: Optimizer = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(
            [*map(str, self.epochs), *filter(None, [self.stopped]), f"the model is that of epoch {self.best}"]
        )


@dataclass
class Tally:
    """Sums over samples."""

    loss: float = 0.0
    samples: int = 0
    right: int = 0
    places: int = 0

    def add(self, loss: float, samples: int, output: Any, target: Any) -> None:
        """Add one batch."""
        self.loss, self.samples = self.loss + loss * samples, self.samples + samples
        if is_classes(output, target):
            same = output.detach().argmax(1) == target
            self.right, self.places = self.right + int(same.sum()), self.places + same.numel()

    @property
    def mean(self) -> float:
        """Mean loss per sample."""
        return self.loss / max(1, self.samples)

    @property
    def accuracy(self) -> float | None:
        """Fraction right; None where there are no classes."""
        return self.right / self.places if self.places else None


def is_classes(output: Any, target: Any) -> bool:
    """Whether an output has one number per class, in dim 1, and the target names one of them."""
    if not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)) or output.dim() < 2:
        return False
    return not target.is_floating_point() and target.shape == (output.shape[0], *output.shape[2:])

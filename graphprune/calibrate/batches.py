"""What users pass to calibrate on: batches of any form, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune.errors import CalibrationError, InputError, counted
from graphprune.trace import Inputs, register

Loss = Callable[..., torch.Tensor]
"""`loss(output, target)`: see `calibrate`."""
ADDITIVE = 1e-3
"""How far the loss of a batch may be from the sum or mean over its halves, relative to it."""


@dataclass(frozen=True)
class Batch:
    """One batch: what goes into the model, and what its output is held against (None if there is nothing)."""

    inputs: Inputs
    target: Any


def require(batches: object, *, again: bool = False) -> None:
    """Refuse what is easily passed in place of batches; with `again`, also what can be gone through only once.

    Raises:
        InputError: it is such a thing.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, Mapping, Inputs, str)):
        raise InputError(
            f"batches={type(batches).__name__} is no iterable of batches; pass a DataLoader or a list, such as [x] or "
            "[(x, y)] for a single batch"
        )
    if again and isinstance(batches, Iterator):
        raise InputError("the batches are an iterator, which is used up after one pass; pass a list or a DataLoader")


def read(batches: Iterable[Any], arguments: int, device: torch.device) -> Iterator[Batch]:
    """Batches in any form that `calibrate` takes, on the device of the model.

    Raises:
        InputError: `batches` is one batch, or nothing that holds batches.
        CalibrationError: there are none, or one has too few parts.
    """
    require(batches)
    number = -1
    for number, given in enumerate(batches):
        yield _batch(_moved(given, device), arguments, number)
    if number < 0:
        raise CalibrationError(
            "there are no batches to calibrate on: the loader is empty, or a generator that was already used up; "
            "pass a list or a DataLoader"
        )


def _batch(given: Any, arguments: int, number: int) -> Batch:
    if isinstance(given, Inputs):
        return Batch(given, None)
    if isinstance(given, Mapping):
        return Batch(Inputs.of(given), given)
    if isinstance(given, (tuple, list)):
        if len(given) == 2 and isinstance(given[0], (Inputs, Mapping)):
            return Batch(Inputs.of(given[0]), given[1])
        if len(given) < arguments:
            raise CalibrationError(
                f"batch {number} has {counted(len(given), 'part')}, but the model was traced with "
                f"{counted(arguments, 'input')}; a batch is the model's inputs in order, then the targets"
            )
        rest = given[arguments:]
        return Batch(Inputs(tuple(given[:arguments])), rest[0] if len(rest) == 1 else tuple(rest) or None)
    return Batch(Inputs.of(given), None)


def _moved(tree: Any, device: torch.device) -> Any:
    def moved(t: torch.Tensor) -> torch.Tensor:
        t = t.to(device)
        return t.clone() if t.is_inference() else t  # autograd takes no others

    if isinstance(tree, Inputs):
        return tree.map(moved)
    register(tree)
    return pytree.tree_map_only(torch.Tensor, moved, tree)


class Criterion:
    """A user's loss, read as a sum over samples.

    Args:
        loss: `loss(output, target)`, or `loss(output)` for batches without targets.
        sample_dim: which dim tells samples apart.
    """

    def __init__(self, loss: Loss, sample_dim: int) -> None:
        self.loss, self.sample_dim = loss, sample_dim
        self.mean: bool | None = None

    def total(self, output: Any, target: Any, samples: int) -> torch.Tensor:
        """The sum of the losses of the samples; whether the loss is a mean or a sum is found out on the first batch.

        Raises:
            CalibrationError: it is no number, not finite, or no sum or mean over samples.
        """
        value = self._call(output, target)
        apart = value.shape == (samples,)
        if apart:
            value = value.sum()
        elif value.numel() != 1:
            raise CalibrationError(
                f"the loss has shape {tuple(value.shape)}; return one number, the mean or sum over the batch, "
                f"or one per sample, shape ({samples},)"
            )
        if not value.isfinite():
            raise CalibrationError(
                f"the loss is {value.item()} though the model's output is finite; check the loss and the targets"
            )
        if torch.is_grad_enabled() and not value.requires_grad:
            raise CalibrationError("the loss does not depend on the model's output: it has no gradient")
        if self.mean is None and samples > 1 and not apart:
            self.mean = self._is_mean(output, target, samples, float(value.detach()))
        return value.reshape(()) * (samples if self.mean and not apart else 1)

    def _call(self, output: Any, target: Any) -> torch.Tensor:
        try:
            value = self.loss(output) if target is None else self.loss(output, target)
        except TypeError as error:
            missing = "; the batches have no targets: pass (inputs, targets)" if target is None else ""
            raise CalibrationError(f"the loss cannot be called: {error}{missing}") from error
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(f"the loss returns {type(value).__name__}; return a tensor with a gradient")
        return value

    def _is_mean(self, output: Any, target: Any, samples: int, whole: float) -> bool:
        """Whether the loss is a mean over samples, from its values on the two parts of a batch.

        Raises:
            CalibrationError: it is neither a mean nor a sum.
        """
        first = samples // 2
        try:
            a, b = (self._of_part(output, target, samples, part) for part in (slice(0, first), slice(first, samples)))
        except Exception as error:
            raise CalibrationError(
                f"the loss fails on a part of a batch, {type(error).__name__}: {error}\nso nothing tells whether it "
                "is a mean or a sum over samples: return the loss of each sample (reduction='none')"
            ) from error
        mean, total = (a * first + b * (samples - first)) / samples, a + b
        scale = max(abs(whole), abs(a), abs(b), 1e-12)
        if abs(whole - mean) <= ADDITIVE * scale:
            return True
        if abs(whole - total) <= ADDITIVE * scale:
            return False
        raise CalibrationError(
            f"the loss is no sum or mean of one loss per sample: a batch of {samples} gives {whole:.6g}, its parts of "
            f"{first} and {samples - first} give {a:.6g} and {b:.6g}; use one that is, such as cross entropy without "
            "weights, or return the loss of each sample (reduction='none')"
        )

    def _of_part(self, output: Any, target: Any, samples: int, part: slice) -> float:
        with torch.no_grad():
            return float(self._call(*(_rows(tree, self.sample_dim, samples, part) for tree in (output, target))))


def _rows(tree: Any, dim: int, samples: int, part: slice) -> Any:
    """The samples of one part of a batch, in everything that has as many: along `dim`, or else along the first dim."""

    def rows(t: torch.Tensor) -> torch.Tensor:
        at = next((d for d in (dim, 0) if t.dim() > d and t.shape[d] == samples), None)
        return t if at is None else t.narrow(at, part.start, part.stop - part.start)

    register(tree)
    return pytree.tree_map_only(torch.Tensor, rows, tree)

"""Repair without training: what the removed channels did is put into the weights that are left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from graphprune.calibrate import Batch, Calibration, Criterion, Loss, calibrate, read
from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.plan import Plan, sliced
from graphprune.recover.batchnorm import reestimated
from graphprune.recover.consumers import changed
from graphprune.recover.quality import Quality, qualities
from graphprune.rewrite.state import held

__all__ = ["METHODS", "Method", "Quality", "Repair", "repair"]

Method: TypeAlias = Literal["none", "bias", "least_squares"]
METHODS: tuple[Method, ...] = ("none", "bias", "least_squares")


@dataclass(frozen=True)
class Repair:
    """What was repaired, and what it was worth, all on the batches given.

    Attributes:
        method: "none", "bias" or "least_squares".
        original, pruned, repaired: the model before pruning, after it, and in the end.
        batchnorm: whether statistics of batch norms were taken anew; they are where that helps.
        ridges: per weight, what least squares added to the diagonal, relative to the mean of the diagonal.
        left: consumers that lost inputs and could not be repaired, with the reason.
    """

    method: Method
    original: Quality
    pruned: Quality
    repaired: Quality
    batchnorm: bool
    ridges: Mapping[str, float]
    left: Mapping[str, str]


def repair(
    model: nn.Module,
    small: nn.Module,
    coupling: Coupling,
    plan: Plan,
    batches: Iterable[Any],
    *,
    method: Method = "least_squares",
    batchnorm: bool = True,
    loss: Loss | None = None,
    calibration: Calibration | None = None,
    sample_dim: int = 0,
    progress: bool | None = None,
) -> Repair:
    """Change the weights of `small`, in place, so that it computes more of what `model` does.

    Args:
        model: the original; left as it was.
        small: what `rewrite` made of it.
        coupling, plan: what was removed.
        batches: as for `calibrate`; they are gone through several times, so a generator will not do.
        method: "least_squares" refits every layer that lost inputs, "bias" gives it back the mean of what it lost,
            "none" changes no weights.
        batchnorm: take the statistics of batch norms anew, and keep them if loss (or, without one, output) is nearer to
            the original's.
        loss: as for `calibrate`, for the figures.
        calibration: moments of the original that are at hand; collected otherwise.
        sample_dim, progress: as for `calibrate`.
    Raises:
        InputError: an unknown method, or batches that can be gone through only once.
        CalibrationError: the batches cannot be used.
    """
    if method not in METHODS:
        raise InputError(f"repair={method!r}: it is one of {', '.join(METHODS)}")
    if iter(batches) is batches:
        raise InputError("the batches are an iterator, which is used up after one pass; pass a list or a DataLoader")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = [len(coupling.program.inputs), device]
    criterion = None if loss is None else Criterion(loss, sample_dim)

    def each() -> Iterable[Batch]:
        return read(batches, *given)

    original, pruned = qualities([model, small], each(), criterion, sample_dim)
    ridges: Mapping[str, float] = {}
    left: Mapping[str, str] = {}
    if method != "none":
        need = "moments" if method == "least_squares" else "means"
        if calibration is None or not calibration.moments:
            calibration = calibrate(
                model, coupling, batches, statistics=[need], sample_dim=sample_dim, progress=progress
            )
        found = changed(model, coupling, plan, calibration.moments, means_only=method == "bias")
        _write(small, {n: sliced(t, plan.kept.get(n, {})) for n, t in found.state.items()})
        ridges, left = found.ridges, found.left
    (repaired,) = qualities([model, small], each(), criterion, sample_dim)[1:] if method != "none" else [pruned]
    statistics = reestimated(small, each()) if batchnorm else {}
    if statistics:
        before = {name: tensor.clone() for name, tensor in held(small) if name in statistics}
        _write(small, statistics)
        (again,) = qualities([model, small], each(), criterion, sample_dim)[1:]
        if again.better_than(repaired):
            repaired = again
        else:
            _write(small, before)
            statistics = {}
    return Repair(method, original, pruned, repaired, bool(statistics), ridges, left)


def _write(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write values into the tensors that `model` holds under these names."""
    with torch.no_grad():
        for name, tensor in held(model):
            if name in state:
                tensor.copy_(state[name])

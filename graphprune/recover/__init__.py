"""Repair without training: what the removed channels did is put into the weights that are left.

`consumers` repairs each layer from moments of the original, `sequential` one after the other from what the repaired
layers before it give, `batchnorm` takes statistics anew, `quality` measures. And with training: `finetune`, with a
teacher if wanted, `Distillation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from graphprune.calibrate import Batch, Criterion, Loss, calibrate, read, require
from graphprune.coupling import Coupling
from graphprune.errors import InputError
from graphprune.plan import Plan, sliced
from graphprune.recover.batchnorm import reestimated
from graphprune.recover.consumers import Change, changed, unfit
from graphprune.recover.distill import Distillation
from graphprune.recover.options import Epoch, Tuned
from graphprune.recover.quality import Quality, qualities
from graphprune.recover.sequential import merged, refit
from graphprune.recover.tuning import finetune
from graphprune.trace import held

__all__ = ["METHODS", "Distillation", "Epoch", "Method", "Quality", "Repair", "Tuned", "finetune", "repair"]

Method: TypeAlias = Literal["none", "bias", "least_squares"]
METHODS: tuple[Method, ...] = ("none", "bias", "least_squares")


@dataclass(frozen=True)
class Repair:
    """What was repaired, and what it was worth, all on the batches given.

    Attributes:
        method: "none", "bias" or "least_squares".
        original, pruned, repaired: the model before pruning, after it, and in the end.
        samples: how many samples weights were fitted on.
        given: how many samples there were; some do not fit into memory, or do not go with the first batch.
        ridges: per fitted weight, what was added to the diagonal of its second moments, relative to their mean.
        left: weights of layers that lost inputs and could not be repaired, with the reason.
        kept: whether the new weights were kept; they are where that helps.
        batchnorm: whether new statistics of batch norms were kept; they are where that helps.
    """

    method: Method
    original: Quality
    pruned: Quality
    repaired: Quality
    samples: int
    given: int
    ridges: Mapping[str, float]
    left: Mapping[str, str]
    kept: bool
    batchnorm: bool


def repair(
    model: nn.Module,
    small: nn.Module,
    coupling: Coupling,
    plan: Plan,
    batches: Iterable[Any],
    *,
    method: Method = "least_squares",
    sequential: bool = True,
    batchnorm: bool = True,
    loss: Loss | None = None,
    sample_dim: int = 0,
    progress: bool | None = None,
) -> Repair:
    """Change the weights of `small`, in place, so that it computes more of what `model` does.

    A change stays where it brings the loss on the batches (or, without a loss, the outputs) nearer to the original's.

    Args:
        model: the original; left as it was.
        small: what `rewrite` made of it.
        coupling, plan: what was removed.
        batches: as for `calibrate`; they are gone through several times, so a generator will not do.
        method: "least_squares" refits layers to the outputs of the original's, "bias" gives each layer that lost inputs
            the mean of what it lost, "none" changes no weights.
        sequential: least squares fits every layer to what the repaired layers before it give, in one pass over as many
            samples as fit into memory; otherwise only those that lost inputs, each from second moments of what the
            original's reads, over all samples.
        batchnorm: take the statistics of batch norms anew.
        loss: as for `calibrate`, for the figures.
        sample_dim, progress: as for `calibrate`.
    Raises:
        InputError: an unknown method, no iterable of batches, or one that can be gone through only once.
        CalibrationError: the batches cannot be used.
    """
    if method not in METHODS:
        raise InputError(f"repair={method!r}: it is one of {', '.join(METHODS)}")
    require(batches, again=True)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    criterion = None if loss is None else Criterion(loss, sample_dim)

    def each() -> Iterator[Batch]:
        return read(batches, len(coupling.program.inputs), device)

    def measured() -> list[Quality]:
        return qualities(model, small, each(), criterion, sample_dim)

    def tried(state: Mapping[str, torch.Tensor], now: Quality) -> tuple[Quality, bool]:
        """Write new values, and take them back if they do not help."""
        before = {name: tensor.clone() for name, tensor in held(small) if name in state}
        _write(small, state)
        again = measured()[1] if before else now
        if again.nearer(now, original):
            return again, True
        _write(small, before)
        return now, False

    original, pruned = measured()
    change, samples = Change({}, {}, {}), 0
    if method == "least_squares" and sequential:
        inputs, samples = merged(model, coupling, each(), sample_dim)
        change = refit(model, small, coupling, plan, inputs)
    elif method != "none":
        statistic: Any = "moments" if method == "least_squares" else "means"
        found = calibrate(model, coupling, batches, statistics=[statistic], sample_dim=sample_dim, progress=progress)
        change, samples = changed(model, coupling, plan, found.moments, means_only=method == "bias"), found.samples
        change = replace(change, state={n: sliced(t, plan.kept.get(n, {})) for n, t in change.state.items()})
    repaired, kept = tried(change.state, pruned)
    repaired, anew = tried(reestimated(small, each()) if batchnorm else {}, repaired)
    left = {**change.left, **unfit(coupling, plan)} if method != "none" else {}
    return Repair(method, original, pruned, repaired, samples, original.samples, change.ridges, left, kept, anew)


def _write(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write values into the tensors that `model` holds under these names."""
    with torch.no_grad():
        for name, tensor in held(model):
            if name in state:
                tensor.copy_(state[name])
    torch.clear_autocast_cache()  # it holds the tensors as they were

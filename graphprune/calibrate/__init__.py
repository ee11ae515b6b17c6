"""One pass over the user's batches, and the sums that criteria and repair read.

The user's own module runs, in eval mode, and each op call is matched with the node it was recorded as. Where the
channels of a group end, at the inputs of the layers that consume them, the pass reads what it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from graphprune.calibrate.batches import Batch, Criterion, Loss, read, require
from graphprune.calibrate.run import Pass, Sums, View, tap, view
from graphprune.calibrate.sites import CONSUMERS, Consumer, batched, consumers, layers, shared
from graphprune.calibrate.statistics import (
    CHUNK,
    UNFOLDED_LIMIT,
    Activations,
    Gradients,
    Moments,
    Ranks,
    columns,
    summed,
)
from graphprune.coupling import Coupling
from graphprune.errors import InputError

__all__ = [
    "CHUNK",
    "CONSUMERS",
    "UNFOLDED_LIMIT",
    "Activations",
    "Batch",
    "Calibration",
    "Consumer",
    "Criterion",
    "Gradients",
    "Loss",
    "Moments",
    "Ranks",
    "Statistic",
    "View",
    "batched",
    "calibrate",
    "columns",
    "consumers",
    "layers",
    "read",
    "require",
    "shared",
    "summed",
    "tap",
    "view",
]

Statistic: TypeAlias = Literal["gradients", "products", "activations", "ranks", "means", "moments"]
STATISTICS: tuple[Statistic, ...] = ("gradients", "products", "activations", "ranks", "means", "moments")
_INCLUDED: Mapping[Statistic, Statistic] = {"products": "gradients", "moments": "means"}


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one pass collected; what was not asked for is empty.

    Attributes:
        statistics: what was collected, and what that includes.
        sizes: channels per group.
        samples: how many samples were seen.
        loss: mean loss per sample; None unless gradients were collected.
        gradients: per group.
        activations: per group.
        ranks: per group.
        moments: per fully qualified name of the weight of a consumer.
    """

    statistics: frozenset[Statistic]
    sizes: Mapping[str, int] = field(repr=False)
    samples: int
    loss: float | None
    gradients: dict[str, Gradients] = field(repr=False)
    activations: dict[str, Activations] = field(repr=False)
    ranks: dict[str, Ranks] = field(repr=False)
    moments: dict[str, Moments] = field(repr=False)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    *,
    statistics: Collection[Statistic],
    loss: Loss | None = None,
    sample_dim: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Run `model` over `batches` and collect statistics.

    Sums are kept, so memory does not grow with the number of samples. Where `torch.distributed` is initialised, every
    process passes its own batches, and all get the statistics of all. Runs under the caller's `torch.autocast`.

    Args:
        model: any module; it is run in eval mode and left as it was.
        coupling: its groups.
        batches: any iterable of batches, such as a DataLoader. A batch is a tensor; a tuple of the model's inputs
            in order, then the targets; a dict of keyword arguments; or a pair of one of these mappings and the targets.
            They are moved to the device of the model.
        statistics: which of "gradients" (needs a loss), "products" (gradients and their products), "activations",
            "ranks", "means" of what consumers read and of its squares, and second "moments", to collect.
        loss: `loss(output, targets)`, the mean or sum of one loss per sample, or one loss per sample; for dicts without
            targets the dict takes their place, for tensors the loss gets the output alone.
        sample_dim: which dim of inputs and outputs tells samples apart.
        progress: show a progress bar; by default where the output is a terminal.
    Raises:
        InputError: an unknown statistic, gradients without a loss, or something that is no iterable of batches.
        CalibrationError: no batches, values that are not finite, or a loss that is no sum over samples.
        TraceError: the model cannot be traced with these batches.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise InputError(f"statistics={unknown}: they are {', '.join(STATISTICS)}")
    if loss is None and {"gradients", "products"} & set(statistics):
        raise InputError("gradients need a loss, such as loss=torch.nn.functional.cross_entropy")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise InputError("the model is on the meta device and has no values; load weights first")
    criterion = None if loss is None else Criterion(loss, sample_dim)
    sums = _empty(model, coupling, set(statistics))
    work = Pass(model, coupling, sums, criterion, sample_dim)
    given = read(batches, len(coupling.program.inputs), device)
    with _frozen(model):
        for batch in tqdm(given, desc="calibrating", unit="batch", disable=_hidden(progress)):
            work.run(batch)
    return _reduced(work, sums, coupling, statistics)


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _empty(model: nn.Module, coupling: Coupling, wanted: set[str]) -> Sums:
    sizes = {g.name: g.size for g in coupling.groups}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    gradients, products = bool(wanted & {"gradients", "products"}), "products" in wanted
    return Sums(
        gradients={n: Gradients.empty(s, products=products) for n, s in sizes.items()} if gradients else {},
        activations={n: Activations.empty(s) for n, s in sizes.items()} if "activations" in wanted else {},
        ranks={n: Ranks.empty(s) for n, s in sizes.items()} if "ranks" in wanted else {},
        moments={
            c.weight: Moments.empty(c, shapes[c.weight], products="moments" in wanted)
            for c in consumers(coupling)
            if wanted & {"means", "moments"}
        },
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: only activations need theirs."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _reduced(work: Pass, sums: Sums, coupling: Coupling, statistics: Collection[Statistic]) -> Calibration:
    """The sums of all processes."""
    counted = torch.tensor([work.samples, work.loss], dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        for tensor in (counted, *work.tensors()):
            moved = tensor.to(device)
            dist.all_reduce(moved)
            tensor.copy_(moved)
    samples = int(counted[0])
    return Calibration(
        statistics=frozenset(statistics) | {_INCLUDED[s] for s in statistics if s in _INCLUDED},
        sizes={g.name: g.size for g in coupling.groups},
        samples=samples,
        loss=float(counted[1]) / samples if sums.gradients else None,
        gradients=dict(sums.gradients),
        activations=dict(sums.activations),
        ranks=dict(sums.ranks),
        moments=dict(sums.moments),
    )

"""Least squares layer by layer: each layer is fitted to the original's output from what the repaired layers before it
give (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.2).

The original runs once, on all samples together, and what its layers read is kept. Then the small model runs: at each
layer its weights are fitted and written before the layer is called, so one pass repairs the whole network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphprune.calibrate import CHUNK, UNFOLDED_LIMIT, Batch, Consumer, batched, columns, layers, shared, summed
from graphprune.coupling import Coupling
from graphprune.errors import CalibrationError
from graphprune.interpret import Replay
from graphprune.plan import Plan
from graphprune.program import Node, Program, Value
from graphprune.recover.consumers import NOISE, SHARED, Change
from graphprune.recover.shifts import shifts
from graphprune.recover.streams import Branch, branches
from graphprune.solvers import factorise
from graphprune.trace import Inputs, held, signature

RIDGE = 1e-3
"""Added to the diagonal of second moments, relative to their mean: how much a weight is held where it is."""
MEMORY = 2 << 30
"""Bytes of what the original's layers read that are kept at once."""
FAINT = 1e-2
"""Channels that a batch norm scales by less than this, relative to the largest, make up for nothing."""
ROWS = 64
"""Positions of feature maps that a fit uses, per column of the weight; more are thinned out evenly."""


def merged(model: nn.Module, coupling: Coupling, batches: Iterable[Batch], sample_dim: int) -> tuple[Inputs, int]:
    """As many samples as `MEMORY` allows, together, from batches that are alike but for their samples; and how many."""
    taken: list[Inputs] = []
    samples, room = 0, 0
    for batch in batches:
        tensors = batch.inputs.tensors()
        if not taken:
            program = Replay(model).program(batch.inputs)
            found = batched(coupling.again(program), sample_dim)
            many = [value in found for value in program.inputs]
        count = next((t.shape[sample_dim] for t, held in zip(tensors, many, strict=False) if held), 1)
        if not taken:
            room = max(count, MEMORY // max(1, _bytes(program) // count))
        elif samples + count > room or not _joins(taken[0].tensors(), tensors, many, sample_dim):
            continue
        taken.append(batch.inputs)
        samples += count
    pieces = zip(*(t.tensors() for t in taken), many, strict=True)
    joined = iter([torch.cat(same, sample_dim) if held else same[0] for *same, held in pieces])
    return taken[0].map(lambda _: next(joined)), samples


def _joins(first: list[torch.Tensor], other: list[torch.Tensor], many: list[bool], dim: int) -> bool:
    """Whether two batches differ in nothing but their samples along `dim`, which the tensors marked in `many` hold."""

    def shape(t: torch.Tensor) -> Any:
        return t.dtype, *t.shape[:dim], *t.shape[dim + 1 :]

    return len(first) == len(other) and all(
        shape(a) == shape(b) if held else torch.equal(a, b) for a, b, held in zip(first, other, many, strict=True)
    )


def _bytes(program: Program) -> int:
    return sum(math.prod(layer.value.shape) * layer.value.dtype.itemsize for layer in layers(program))


def refit(model: nn.Module, small: nn.Module, coupling: Coupling, plan: Plan, inputs: Inputs) -> Change:
    """Fit the layers of `small` one after the other.

    Args:
        model: the original.
        small: the smaller model; in the end it is as before.
        coupling, plan: what was removed.
        inputs: all samples.
    Returns:
        New values at the shapes of `small`.
    Raises:
        CalibrationError: a layer reads values that are not finite.
    """
    work = _Refit(model, small, coupling, plan)
    with torch.no_grad():
        work.run(Replay(model), inputs, work.keep, restart=work.inputs.clear)
        work.run(Replay(small), inputs, work.fit, restart=work.undo)
    return Change(work.written, work.ridges, {**work.unread(), **work.left})


class _Refit:
    def __init__(self, model: nn.Module, small: nn.Module, coupling: Coupling, plan: Plan) -> None:
        self.dense, self.small = dict(held(model)), dict(held(small))
        self.plan, self.shifts, self.tied = plan, shifts(coupling.program), shared(coupling.program)
        self.inputs: dict[str, tuple[torch.Tensor, Consumer]] = {}
        self.original: dict[str, torch.Tensor] = {}
        self.branches: dict[str, Branch] = {}
        self.streams: dict[Value, torch.Tensor] = {}
        self.written: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.ridges: dict[str, float] = {}
        self.left: dict[str, str] = {}

    def run(
        self,
        replay: Replay,
        inputs: Inputs,
        each: Callable[[Consumer, torch.Tensor], None],
        *,
        restart: Callable[[], None],
    ) -> None:
        """Run a model, with `each` called for the layers that can be fitted and what they read."""
        found: dict[str, Consumer] = {}
        wanted: set[Value] = set()
        writing = False

        def look() -> None:
            nonlocal found, wanted, writing
            program = replay.program(inputs)
            found, self.branches, self.streams = self._fit_for(program), branches(program), {}
            wanted = {branch.stream for branch in self.branches.values()}
            writing = any(node.in_place for node in program.nodes)  # possibly to what a layer read before

        def again() -> None:
            restart()
            look()

        def stand_in(node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            layer, shown = found.get(node.name), [v for v in node.values() if v in wanted and v not in self.streams]
            if layer is None and not shown:
                return
            given = dict(zip(signature(func)[1], args, strict=False)) | dict(kwargs)
            for value in shown:
                held = next((given[name] for name, v in node.arguments.items() if v is value), None)
                if isinstance(held, torch.Tensor):
                    self.streams[value] = held.clone() if writing else held
            if layer is not None:
                x = given[layer.argument].detach()
                with torch.autocast(x.device.type, enabled=False):
                    each(layer, x.clone() if writing else x)

        look()
        replay.run(inputs, stand_in, restart=again)

    def _fit_for(self, program: Program) -> dict[str, Consumer]:
        """The layers that are fitted, by the name of their node; the others are noted if they lost inputs."""
        calls = Counter(layer.weight for layer in layers(program))
        found = {}
        for layer in layers(program):
            reason = self._unfit(layer, calls[layer.weight])
            if not reason:
                found[layer.node.name] = layer
            elif (0 if layer.transposed else 1) in self.plan.kept.get(layer.weight, {}):
                self.left[layer.weight] = reason
        return found

    def _unfit(self, layer: Consumer, calls: int) -> str:
        """Why a layer is not fitted; empty if it is."""
        shape = self.dense[layer.weight].shape
        if layer.weight in self.tied:
            return SHARED
        if calls > 1:
            return f"it is called {calls} times"
        if len(shape) > 4:
            return "convolutions over volumes are not unfolded"
        many = shape[1:].numel() > UNFOLDED_LIMIT
        return f"each output has {shape[1:].numel()} weights, more than {UNFOLDED_LIMIT}" if many else ""

    def unread(self) -> dict[str, str]:
        """Layers of the original that lost weights and that the small model does not call as such, with the reason."""
        lost = (name for name in self.inputs if name not in self.written and name in self.plan.kept)
        return dict.fromkeys(lost, "the smaller model does not call it as such a layer")

    def keep(self, layer: Consumer, x: torch.Tensor) -> None:
        """Keep what a layer of the original reads, and the stream that its output is added to, if that is there yet."""
        self.inputs[layer.weight] = x, layer
        branch = self.branches.get(layer.weight)
        if branch is not None and branch.stream in self.streams:
            self.original[layer.weight] = self.streams[branch.stream]

    def fit(self, layer: Consumer, x: torch.Tensor) -> None:
        """Fit the weight of a layer of the small model, and write it."""
        name = layer.weight
        if name not in self.inputs:
            return
        dense, now = (tensors[name].detach().double().cpu() for tensors in (self.dense, self.small))
        dense, now = (dense.T, now.T) if layer.transposed else (dense, now)
        out = self.plan.kept.get(name, {}).get(1 if layer.transposed else 0)
        dense = dense if out is None else dense.index_select(0, out)
        shift, shape = self.shifts.get(name), now.shape
        d, w = (t.reshape(layer.groups, shape[0] // layer.groups, -1) for t in (dense, now))
        got, want, second, cross = self._moments(layer, x, d, out)
        if shift is not None:
            second = second - got[:, :, None] * got[:, None, :] + torch.diag_embed(NOISE * got.square())
            cross = cross - want[:, :, None] * got[:, None, :]
        factor, self.ridges[name] = factorise(second, RIDGE, RIDGE)
        w = w + torch.cholesky_solve((cross - w @ second).mT, factor).mT
        made = w.reshape(shape)
        self._write(name, made.T if layer.transposed else made)
        if shift is not None:
            delta = want - torch.einsum("goc,gc->go", w, got)
            base = self.dense[shift.name].detach().double().cpu()
            base = base if out is None else base.index_select(0, out)
            self._write(shift.name, base + shift.sign * delta.reshape(-1))

    def _moments(
        self, layer: Consumer, x: torch.Tensor, dense: torch.Tensor, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Means of the small layer's input and of the output it should have, second moments of the input, and cross
        moments of output and input, per group of the convolution.

        Raises:
            CalibrationError: an input is not finite.
        """
        shape = self.dense[layer.weight].shape
        kernel, taps = tuple(shape[2:]), shape[2:].numel()
        original, theirs = self.inputs[layer.weight]
        samples = max(1, CHUNK // max(1, original[0].numel() * taps))
        most = max(1, ROWS * shape[1:].numel() // len(original))
        pieces = [
            columns(which, t, kernel, taps, samples=samples, most=most) for which, t in ((theirs, original), (layer, x))
        ]
        lacking = self._lacking(layer, out)
        if lacking is not None:
            pieces.append(_rows(lacking, samples, most, channels_last=not layer.node.op.startswith("conv")))
        rows, sums = 0, [torch.zeros(()).double() for _ in range(4)]
        for want, got, *more in zip(*pieces, strict=True):
            if want.shape[0] > got.shape[0]:  # whole groups of the convolution are gone
                want = want[(self.plan.kept[layer.weight][0] // (shape[0] // want.shape[0])).unique()]
            output = want @ dense.to(want).mT
            if more:
                output = output + more[0].unflatten(1, (layer.groups, -1)).movedim(1, 0)
            rows += got.shape[1]
            (total, aim, cross), second = summed(got, output), summed(got)[2]
            sums = [a + b for a, b in zip(sums, (total, aim, second, cross.mT), strict=True)]
        if not all(s.isfinite().all() for s in sums):
            raise CalibrationError(f"what {layer.node} reads is not finite; look for NaN in the batches and weights")
        return tuple(s / rows for s in sums)

    def _lacking(self, layer: Consumer, out: torch.Tensor | None) -> torch.Tensor | None:
        """What the stream that the layer's output is added to lacks, in units of that output; None if there is none."""
        branch = self.branches.get(layer.weight)
        stream = self.original.get(layer.weight)
        if branch is None or stream is None or branch.stream not in self.streams:
            return None
        dim = 1 if layer.node.op.startswith("conv") else -1
        stream = stream if out is None else stream.index_select(dim, out.to(stream.device))
        wide = torch.promote_types(stream.dtype, torch.float32)
        lacking = stream.to(wide) - self.streams[branch.stream].to(wide)
        if branch.scale:
            factor = self.small[branch.scale] / (self.small[branch.variance] + branch.eps).sqrt()
            usable = factor.abs() > FAINT * factor.abs().max()
            inverse = torch.where(usable, 1 / factor, 0).to(lacking)
            lacking = lacking * (inverse.view(-1, *[1] * (lacking.dim() - 2)) if dim == 1 else inverse)
        return lacking

    def _write(self, name: str, value: torch.Tensor) -> None:
        self.written[name] = value
        self.before.setdefault(name, self.small[name].clone())
        self.small[name].copy_(value)
        torch.clear_autocast_cache()  # it holds the weight as it was

    def undo(self) -> None:
        """Give the small model the weights it had."""
        for name, value in self.before.items():
            self.small[name].copy_(value)
        torch.clear_autocast_cache()


def _rows(x: torch.Tensor, samples: int, most: int, *, channels_last: bool) -> Iterator[torch.Tensor]:
    """An output by position, (rows, channels), in the pieces and order of `columns`."""
    if channels_last:
        x = x.reshape(len(x), -1, x.shape[-1]).mT if x.dim() > 2 else x[..., None]
    for piece in torch.split(x.flatten(2), samples):
        yield piece[:, :, :: math.ceil(piece.shape[2] / most)].mT.flatten(0, 1)

"""The pass: runs the user's own module batch by batch, and reads what goes into the ends of each group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graphprune.calibrate.batches import Batch, Criterion
from graphprune.calibrate.sites import Consumer, End, batched, consumers, ends, maps
from graphprune.calibrate.statistics import Activations, Gradients, Moments, Ranks
from graphprune.coupling import Coupling
from graphprune.errors import CalibrationError
from graphprune.interpret import Replay
from graphprune.program import Node, Program
from graphprune.trace import output_tensors, signature


@dataclass(frozen=True)
class View:
    """A model at the shapes of one kind of batch.

    Attributes:
        coupling: of a program recorded at these shapes.
        ends: per node name, the ends at its operands.
        maps: per node name, the operands at which channels are last seen as maps; empty if nobody looks at maps.
        pooled: those of them that are pooled away, of groups that no layer reads as maps.
        consumers: per node name, the layer it is.
        samples: how many samples a batch has.
        written: values that are written to in place.
    """

    coupling: Coupling
    ends: Mapping[str, Sequence[End]]
    maps: Mapping[str, Sequence[End]]
    pooled: Mapping[str, Sequence[End]]
    consumers: Mapping[str, Consumer]
    samples: int
    written: frozenset[Any]


def view(coupling: Coupling, program: Program, sample_dim: int, *, with_maps: bool) -> View:
    """What to read where in `program`, of the model that `coupling` is of.

    Raises:
        CalibrationError: at these shapes the model has other groups.
    """
    again = coupling.again(program)
    if not again.alike(coupling):
        raise CalibrationError(
            f"with inputs of shapes {[list(v.shape) for v in program.inputs]} the groups of {program.model_class} are "
            "others than with the example inputs; use example inputs like the batches"
        )
    given = [v.shape[sample_dim] for v in batched(again, sample_dim)]
    written = frozenset(v for node in program.nodes if node.in_place for v in list(node.values())[:1])
    found, shown = ends(again, sample_dim), maps(again, sample_dim) if with_maps else ()
    layers = {c.node.name: c for c in consumers(again)}
    at_ends, at_maps, pooled = map(_by_node, (found, shown, _pooled(shown, found)))
    return View(again, at_ends, at_maps, pooled, layers, (given or [1])[0], written)


def _pooled(shown: Sequence[End], found: Sequence[End]) -> Iterator[End]:
    """Maps of groups of which no maps are ends, each value and group once."""
    ended = {(end.value, name) for end in found for name in end.readers}
    as_maps = {name for end in shown for name in end.readers if (end.value, name) in ended}
    met: set[Any] = set()
    for end in shown:
        readers = {n: reader for n, reader in end.readers.items() if n not in as_maps and (end.value, n) not in met}
        met |= {(end.value, name) for name in readers}
        if readers:
            yield replace(end, readers=readers)


def _by_node(found: Iterable[End]) -> dict[str, list[End]]:
    nodes: dict[str, list[End]] = {}
    for end in found:
        nodes.setdefault(end.node.name, []).append(end)
    return nodes


@dataclass(frozen=True)
class Sums:
    """What is collected: empty mappings for what is not asked for."""

    gradients: Mapping[str, Gradients]
    activations: Mapping[str, Activations]
    ranks: Mapping[str, Ranks]
    moments: Mapping[str, Moments]


class Pass:
    """Runs batches and adds to sums.

    Args:
        model: in eval mode, its parameters without gradients.
        sums: what to add to.
        coupling: of the model.
        criterion: the loss; needed for gradients.
        sample_dim: which dim of the inputs tells samples apart.
    """

    def __init__(
        self, model: nn.Module, coupling: Coupling, sums: Sums, criterion: Criterion | None, sample_dim: int
    ) -> None:
        self.coupling, self.sums, self.criterion, self.sample_dim = coupling, sums, criterion, sample_dim
        self.replay = Replay(model)
        self.views: dict[Program, View] = {}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.loss, self.samples, self.batches = 0.0, 0, 0

    def tensors(self) -> Iterator[torch.Tensor]:
        """All sums, in the same order in every process."""
        kinds = (self.sums.gradients, self.sums.activations, self.sums.ranks, self.sums.moments)
        yield from (tensor for kind in kinds for held in kind.values() for tensor in held.tensors())

    def reset(self) -> None:
        """Back to no samples."""
        self.loss, self.samples = 0.0, 0
        for tensor in self.tensors():
            tensor.zero_()

    def run(self, batch: Batch) -> None:
        """Run one batch.

        Raises:
            CalibrationError: something is not finite, the loss cannot be used, or the groups are others at its shapes.
            TraceError: the model cannot be traced with it.
        """
        try:
            self._start(batch)
            with torch.set_grad_enabled(self.criterion is not None and bool(self.sums.gradients)):
                self.replay.run(
                    batch.inputs,
                    self._stand_in,
                    then=lambda output: self._finish(output, batch),
                    restart=lambda: self._restart(batch),
                )
        except CalibrationError as error:
            cause = self._cause(batch) if isinstance(error, _NotFinite) else ""
            raise CalibrationError(f"batch {self.batches}: {error}{cause}") from error
        self.batches += 1

    def _start(self, batch: Batch) -> None:
        program = self.replay.program(batch.inputs)
        if program not in self.views:
            wanted = bool(self.sums.ranks or self.sums.activations)
            self.views[program] = view(self.coupling, program, self.sample_dim, with_maps=wanted)
        self.view = self.views[program]
        self.q = {name: torch.zeros(self.view.samples, g.total.numel()) for name, g in self.sums.gradients.items()}
        self.token = torch.zeros((), requires_grad=True)
        self.met: set[Any] = set()

    def _restart(self, batch: Batch) -> None:
        self.reset()
        self._start(batch)

    def _finish(self, output: Any, batch: Batch) -> None:
        """What is to be done while the model is still as it ran.

        Raises:
            _NotFinite: the output is not.
            CalibrationError: the loss cannot be used.
        """
        self.samples += self.view.samples
        if not all(map(_finite, output_tensors(output))):
            raise _NotFinite("the model's output is not finite")
        if torch.is_grad_enabled() and self.criterion is not None:
            self._backward(self.criterion.total(output, batch.target, self.view.samples))

    def _backward(self, loss: torch.Tensor) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise CalibrationError(
                f"a layer's input is overwritten in place after the layer read it: {str(error).splitlines()[0]}; "
                "use the operation that does not write in place"
            ) from error
        self.loss += float(loss.detach())
        for name, q in self.q.items():
            self.sums.gradients[name].add(q)

    def _cause(self, batch: Batch) -> str:
        """Where values stop being finite. Infinities that no weight makes are left out: masks are full of them."""
        if not all(map(_finite, batch.inputs.tensors())):
            return ": the batch is not"
        found: list[Node] = []

        def watch(node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            result = func(*args, **kwargs)
            weighted = any(value.kind == "parameter" for value in node.values())
            spoilt = [t for t in output_tensors(result) if not _finite(t) and (weighted or t.isnan().any())]
            if spoilt and not found:
                found.append(node)
            return result

        with torch.no_grad():
            self.replay.run(batch.inputs, watch)
        return f": the first such values come out of {found[0]}" if found else ""

    # -- at a node

    def _stand_in(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Read the operands of a node in which channels end; None leaves the node alone."""
        name, consumer = node.name, self.view.consumers.get(node.name)
        found, shown, pooled = (held.get(name, ()) for held in (self.view.ends, self.view.maps, self.view.pooled))
        if not found and not shown and consumer is None:
            return None
        names, given, keywords = signature(func)[1], list(args), dict(kwargs)
        held = dict(zip(names, given, strict=False)) | keywords
        for end in shown if self.sums.ranks else ():
            self._rank(end, _operand(end, held))
        for end in pooled if self.sums.activations else ():
            for group, reader in end.readers.items():
                self.sums.activations[group].add_maps(reader, _operand(end, held).detach())
        if consumer is not None and consumer.weight in self.sums.moments:
            self._consume(consumer, held[consumer.argument])
        for end in found:
            read = self._end(end, _operand(end, held))
            if end.index is not None:
                several = held[end.argument]
                read = type(several)([*several[: end.index], read, *several[end.index + 1 :]])
            held[end.argument] = read
        return func(*(held[name] for name in names[: len(given)]), **{name: held[name] for name in keywords})

    def _consume(self, consumer: Consumer, x: torch.Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            held = self.sums.moments[consumer.weight]
            held.add(consumer, x, self.shapes[consumer.weight][2:])
            _require_finite(held.total, consumer.node)

    def _rank(self, end: End, x: torch.Tensor) -> None:
        """Read the maps of an operand, once for each value that has them."""
        if (end.value, "maps") in self.met:
            return
        self.met.add((end.value, "maps"))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for name, reader in end.readers.items():
                if (found := reader.maps(x.detach())) is not None:
                    _require_finite(found, end.node)
                    self.sums.ranks[name].add(found)

    def _end(self, end: End, x: torch.Tensor) -> torch.Tensor:
        """Read what an operand holds; returns what the node is to be called with."""
        first = end.value not in self.met
        self.met.add(end.value)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for name, reader in end.readers.items() if first else ():
                if name in self.sums.activations:
                    self.sums.activations[name].add(reader, x.detach())
                    _require_finite(self.sums.activations[name].total, end.node)
        if not torch.is_grad_enabled() or not x.is_floating_point():
            return x
        held = x.clone() if end.value in self.view.written else x
        return tap(held, self.token, self._reading(end))

    def _reading(self, end: End) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def read(x: torch.Tensor, gradient: torch.Tensor) -> None:
            product = x.float() * gradient.float() if x.dtype != torch.float64 else x * gradient
            for name, reader in end.readers.items():
                q = reader.sum(product)
                if not q.isfinite().all():
                    what = "activation" if not x.isfinite().all() else "gradient"
                    raise _NotFinite(f"the {what} at {end} is not finite; with float16, use bfloat16")
                self.q[name] = self.q[name].to(q) + q

        return read


def _operand(end: End, held: Mapping[str, Any]) -> Any:
    found = held[end.argument]
    return found if end.index is None else found[end.index]


class _NotFinite(CalibrationError):
    """To be completed with where the values come from."""


def _finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())


def _require_finite(tensor: torch.Tensor, node: Node) -> None:
    """Refuse statistics of values that are not finite.

    Raises:
        _NotFinite: they are of such values.
    """
    if not _finite(tensor):
        raise _NotFinite(f"what {node} reads is not finite")


def tap(x: torch.Tensor, token: torch.Tensor, read: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
    """`x` itself; a backward pass calls `read` with it and its gradient. It comes by where `token` asks for one."""
    tapped: torch.Tensor = _Tap.apply(x, token, read)  # type: ignore[no-untyped-call]
    return tapped


class _Tap(torch.autograd.Function):
    """The identity; in backward its operand and the gradient are read."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, read: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.read = read
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.read(x, gradient)
        return gradient, None, None

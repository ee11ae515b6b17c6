"""The proof: the pruned model computes what the original computes with the same channels zeroed.

The reference needs nothing but the plan: every removed slice of every parameter and buffer set to 0, nothing else
changed. It runs on the example inputs and on fresh ones like them, in float64 where the model allows that, and every
output is compared. Where a renormalised group loses channels, the reference is the traced graph in which those
normalisations see only the kept positions.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graphprune.axes import Axis, Mask
from graphprune.coupling import Coupling
from graphprune.errors import GraphpruneError, VerificationError
from graphprune.interpret import interpret
from graphprune.plan import Plan
from graphprune.program import Node
from graphprune.rewrite.graph import raised
from graphprune.rewrite.state import held
from graphprune.rules import Applied
from graphprune.trace import Inputs, output_tensors, run, trace, untouched

TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float64 with parts in float32": 1e-5, "float32": 1e-4}
"""Largest relative error accepted, by the precision compared in. Models run in float64 where they can."""
RAISED_LIMIT = 200_000_000
"""Models with more parameters than this are compared in the precision they have."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        error: largest difference of any output, relative to that output's largest value.
        effect: how far the zeroed original is from the dense one, in the same measure; 0 means that the channels
            removed had no effect on these inputs, so the comparison could not have failed.
        tolerance: what `error` had to stay below.
        precision: what the comparison ran in, a key of `TOLERANCE`.
        inputs: how many sets of inputs were compared.
    """

    error: float
    effect: float
    tolerance: float
    precision: str
    inputs: int


def verify(
    model: nn.Module, pruned: nn.Module, example_inputs: Any, coupling: Coupling, plan: Plan, *, fresh: int = 1
) -> Verification:
    """Compare `pruned` with the zeroed original.

    Args:
        model: the original.
        pruned: the smaller module.
        example_inputs: as for `trace`.
        coupling, plan: what was removed.
        fresh: how many further sets of random inputs like the example are compared.
    Raises:
        VerificationError: an output differs by more than the tolerance, the message naming the first op at which the
            two runs part; or the original returns NaN, so there is nothing to compare with.
    """
    return Bench(model, Inputs.of(example_inputs), coupling, plan).compare(pruned, fresh=fresh)


class Bench:
    """One zeroed original, to hold any number of candidates against.

    Args:
        model: the original; a copy is raised to float64 if it is small enough and runs there.
        inputs: example inputs.
        coupling, plan: what is removed.
        limit: models with more parameters than this are compared in the precision they have.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, *, limit: int = RAISED_LIMIT
    ) -> None:
        self.raised, self.model, self.inputs = _raised(model, inputs, limit)
        self._original, self._given, self._coupling, self.plan = model, inputs, coupling, plan
        renormalised = bool(_Masked(coupling, plan).nodes)
        self._reference = _reference(self.model, self.coupling if renormalised else coupling, plan)
        self._wanted: dict[int, list[torch.Tensor]] = {}

    @functools.cached_property
    def coupling(self) -> Coupling:
        """The coupling of the model that is run: its trace states dtypes, so a raised copy needs one of its own."""
        if self.model is self._original:
            return self._coupling
        return self._coupling.again(trace(self.model, self.inputs))

    def problem(self, candidate: nn.Module) -> str:
        """What is wrong with a candidate's outputs on the example inputs; empty if nothing."""
        try:
            error = difference(run(self._like(candidate), self.inputs), self._want(0))
        except Exception as failure:
            return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        return "" if error <= self._tolerance(error)[1] else f"its output is off by {error:.1e}"

    def compare(self, pruned: nn.Module, *, fresh: int = 1) -> Verification:
        """Hold `pruned` against the zeroed original on the example inputs and on fresh ones; see `verify`.

        Raises:
            VerificationError: they differ, or there is nothing to compare with.
        """
        try:
            run(self._like(pruned), self.inputs)
        except Exception as failure:
            if self.raised:  # what it states in float32 does not go with float64
                lower = Bench(self._original, self._given, self._coupling, self.plan, limit=-1)
                return lower.compare(pruned, fresh=fresh)
            raise VerificationError(f"the pruned model fails: {type(failure).__name__}: {failure}") from failure
        pruned = self._like(pruned)
        error = effect = 0.0
        for k in range(1 + fresh):
            given, want = self._inputs(k), self._want(k)
            dense = run(self.model, given)
            _check_not_nan(dense)
            error = max(error, difference(run(pruned, given), want))
            effect = max(effect, difference(want, dense))
            precision, tolerance = self._tolerance(error)
            if not error <= tolerance:
                where = first_divergence(self.model, pruned, given, self.coupling, self.plan, tolerance)
                raise VerificationError(
                    f"the pruned model differs from the zeroed original by {error:.2e} (tolerance {tolerance:.0e})\n"
                    f"  {where}\n"
                    "this is a defect of graphprune or of a rule that was added; please report it with the model. "
                    "keep_names=[...] keeps the part concerned whole; verify=False skips the check"
                )
        return Verification(error, effect, tolerance, precision, 1 + fresh)

    def _inputs(self, k: int) -> Inputs:
        return like(self.inputs, k) if k else self.inputs

    def _want(self, k: int) -> list[torch.Tensor]:
        if k not in self._wanted:
            self._wanted[k] = self._reference(self._inputs(k))
        return self._wanted[k]

    def _like(self, candidate: nn.Module) -> nn.Module:
        """The candidate in the precision compared in."""
        if not self.raised:
            return in_full_precision(candidate)
        return raised(candidate) if isinstance(candidate, GraphModule) else _copy(candidate).double()

    def _tolerance(self, error: float) -> tuple[str, float]:
        """The precision compared in, and what it allows; only an error that needs it has the model looked into."""
        precision = "float64" if self.raised or _is_double(self.model) else "float32"
        if self.raised and error > TOLERANCE[precision] and self._rough:
            precision = "float64 with parts in float32"
        return precision, TOLERANCE[precision]

    @functools.cached_property
    def _rough(self) -> bool:
        """Whether the raised model still rounds to float32 somewhere.

        Its weights are scaled by 1, 1 + s and 1 + 2s with s = 1e-9. In float64 the outputs follow in a straight line,
        up to s squared; rounding to float32 leaves steps a thousand times larger.
        """
        parameters = {n: t for n, t in held(self.model) if t.is_floating_point()}

        def scaled(by: float) -> list[torch.Tensor]:
            state = {name: tensor.detach() * by for name, tensor in parameters.items()}
            with untouched(self.model), torch.no_grad():
                args, kwargs = self.inputs.args, dict(self.inputs.kwargs)
                outputs = output_tensors(torch.func.functional_call(self.model, state, args, kwargs))
            return [o.to(torch.complex128 if o.is_complex() else torch.float64) for o in outputs]

        once, twice, thrice = (scaled(1 + k * 1e-9) for k in range(3))
        return difference([a + c for a, c in zip(once, thrice, strict=True)], [2 * b for b in twice]) > 1e-12


# -- the reference -----------------------------------------------------------------------------------------------


def zeroed(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The state of `model` with everything that `plan` removes set to 0.

    Returns:
        Copies of the tensors that the plan shrinks, by fully qualified name, at their original shapes.
    """
    state: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for name, tensor in held(model):
        if name not in plan.kept:
            continue
        if id(tensor) not in made:
            made[id(tensor)] = _zero_removed(tensor.detach(), plan.kept[name])
        state[name] = made[id(tensor)]
    return state


def _zero_removed(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    out = tensor.clone()
    for dim, positions in kept.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        gone[positions.to(tensor.device)] = False
        out.index_fill_(dim, gone.nonzero().flatten(), 0)
    return out


def run_zeroed(model: nn.Module, plan: Plan, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs of `model` in eval mode with everything that `plan` removes zeroed; the model is left untouched."""
    with untouched(model), torch.no_grad():
        state = zeroed(model, plan)
        return output_tensors(torch.func.functional_call(model, state, inputs.args, dict(inputs.kwargs)))


def _reference(model: nn.Module, coupling: Coupling, plan: Plan) -> Callable[[Inputs], list[torch.Tensor]]:
    """What the pruned model must compute."""
    masked = _Masked(coupling, plan)
    if not masked.nodes:
        return lambda inputs: run_zeroed(model, plan, inputs)
    state = {**dict(held(model)), **zeroed(model, plan)}
    return lambda inputs: interpret(coupling.program, state, inputs, stand_in=masked.stand_in)


class _Masked:
    """Normalisations over renormalised groups, computed over the kept positions and put back among zeros."""

    def __init__(self, coupling: Coupling, plan: Plan) -> None:
        self.coupling = coupling
        self.keep = coupling.keep({n: k for n, k in plan.groups.items() if len(k) < plan.sizes[n]})
        self.memo: dict[Axis, Mask] = {}
        self.nodes: dict[str, Applied] = {
            name: applied
            for name, applied in coupling.applied.items()
            if any(not self.mask(axis).all() for axis in applied.renormalised)
        }

    def mask(self, axis: Axis) -> Mask:
        return self.coupling.axes.mask(axis, self.keep, self.memo)

    def gather(self, tensor: torch.Tensor, dims: tuple[Axis, ...]) -> torch.Tensor:
        """The kept positions of every dim."""
        for d, axis in enumerate(dims):
            kept = torch.from_numpy(self.mask(axis)).nonzero().flatten()
            tensor = tensor.index_select(d, kept.to(tensor.device)) if len(kept) < axis.size else tensor
        return tensor

    def scatter(self, tensor: torch.Tensor, dims: tuple[Axis, ...]) -> torch.Tensor:
        """The same positions back in a tensor of zeros."""
        for d, axis in enumerate(dims):
            kept = torch.from_numpy(self.mask(axis)).nonzero().flatten().to(tensor.device)
            if len(kept) < axis.size:
                shape = [*tensor.shape[:d], axis.size, *tensor.shape[d + 1 :]]
                tensor = tensor.new_zeros(shape).index_copy(d, kept, tensor)
        return tensor

    def stand_in(self, node: Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The op over the kept positions; None for an op that is not concerned."""
        applied = self.nodes.get(node.name)
        if applied is None:
            return None
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = self.gather(value, self.coupling.dims[node.arguments[name]])
        for literal in applied.literals:
            name, *index = literal.path
            size = int(self.mask(literal.axis).sum())
            if literal.path[0] not in given:
                continue
            if index:
                items = list(given[str(name)])
                items[int(index[0])] = size
                given[str(name)] = items
            else:
                given[str(name)] = size
        result = target(**given)
        if isinstance(result, torch.Tensor):
            return self.scatter(result, applied.outputs[0])
        return tuple(self.scatter(r, dims) for r, dims in zip(result, applied.outputs, strict=True))


# -- measuring ---------------------------------------------------------------------------------------------------


def difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference of any output, relative to the largest value of that output; infinite if shapes differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if b.numel() == 0:
            continue
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        gap = torch.where(a == b, 0.0, (a - b).abs()).max().item()
        finite = b[b.abs() < float("inf")].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        if gap != gap:
            return float("inf")
        worst = max(worst, gap / scale if scale > 0 else gap)
    return worst


def _check_not_nan(outputs: list[torch.Tensor]) -> None:
    for k, output in enumerate(outputs):
        if (output.is_floating_point() or output.is_complex()) and output.isnan().any():
            raise VerificationError(
                f"output {k} of the original model holds NaN on these inputs, so there is nothing to compare with; "
                "pass example inputs on which the model works, or verify=False to prune it unchecked"
            )


def like(inputs: Inputs, seed: int) -> Inputs:
    """Random inputs like the example: noise of the same mean and spread for floats, ints in another order."""
    generator = torch.Generator().manual_seed(seed)

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            known = tensor.double().cpu()
            return (noise * known.std() + known.mean()).to(tensor)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].reshape(tensor.shape)

    return inputs.map(new)


# -- precision ---------------------------------------------------------------------------------------------------

_HALF = (torch.bfloat16, torch.float16)


def _raised(model: nn.Module, inputs: Inputs, limit: int) -> tuple[bool, nn.Module, Inputs]:
    """Model and inputs to compare with, and whether they were raised to float64."""
    if not _is_double(model) and sum(p.numel() for p in model.parameters()) <= limit:
        try:
            wider = raised(model) if isinstance(model, GraphModule) else _copy(model).double()
            doubled = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
            run(wider, doubled)
            return True, wider, doubled
        except Exception:  # some models fix float32 in their code; they are compared as they are
            pass
    return False, in_full_precision(model), full_precision(inputs)


def _is_double(model: nn.Module) -> bool:
    return {t.dtype for _, t in held(model) if t.is_floating_point()} == {torch.float64}


def _copy(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on copying the signature of a graph module
        return copy.deepcopy(model)


def in_full_precision(model: nn.Module) -> nn.Module:
    """`model` itself, or a float32 copy of a half-precision one, so that rounding cannot hide an error."""
    if not any(t.dtype in _HALF for _, t in held(model)):
        return model
    return _copy(model).float()


def full_precision(inputs: Inputs) -> Inputs:
    """The inputs with half-precision tensors in float32."""
    return inputs.map(lambda t: t.float() if t.dtype in _HALF else t)


# -- where two runs part -----------------------------------------------------------------------------------------


def first_divergence(
    model: nn.Module, pruned: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, tolerance: float
) -> str:
    """A sentence naming the first op whose values differ between the zeroed original and the pruned model."""
    try:
        other = trace(pruned, inputs)
    except GraphpruneError as error:
        return f"the pruned model cannot be traced to say where: {error}"
    masked = _Masked(coupling, plan)
    ours: list[tuple[Node, Any]] = []
    theirs: list[tuple[Node, Any]] = []
    state = {**dict(held(model)), **zeroed(model, plan)}
    stand_in = masked.stand_in if masked.nodes else None
    interpret(coupling.program, state, inputs, watch=_recorder(ours), stand_in=stand_in)
    interpret(other, dict(held(pruned)), inputs, watch=_recorder(theirs))
    for (node, want), (peer, got) in zip(ours, theirs, strict=False):
        if _plain(node.op) != _plain(peer.op):
            return f"they run different ops from {node} on: {node.op} and {peer.op}"
        results = want if isinstance(want, (tuple, list)) else [want]
        wanted = [masked.gather(w, coupling.dims[v]) for w, v in zip(results, node.outputs, strict=False)]
        given = list(got) if isinstance(got, (tuple, list)) else [got]
        gap = difference(given, wanted)
        if not gap <= tolerance:
            code = f": `{node.code}`" if node.code else ""
            shapes = [list(t.shape) for t in given], [list(t.shape) for t in wanted]
            apart = (
                f"relative difference {gap:.2e}" if shapes[0] == shapes[1] else f"shapes {shapes[0]} and {shapes[1]}"
            )
            return f"they part at {node}{code} ({apart})"
    return "every op agrees on its own; they part in how the outputs are put together"


def _recorder(into: list[tuple[Node, Any]]) -> Callable[[Node, Any], None]:
    def watch(node: Node, result: Any) -> None:
        kept = [r.detach().clone() for r in result] if isinstance(result, (tuple, list)) else result.detach().clone()
        into.append((node, kept))

    return watch


def _plain(op: str) -> str:
    """The op without what graph emission replaces."""
    return {"chunk": "split_with_sizes", "split": "split_with_sizes"}.get(op, op)

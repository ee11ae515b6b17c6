"""The proof: the pruned model computes what the original computes with the same channels zeroed.

The reference needs nothing but the plan: every removed slice of every parameter and buffer set to 0, nothing else
changed. It runs on the example inputs and on fresh ones like them, in float64 where the model allows that, and every
output is compared. Where a renormalised group loses channels, the reference is the traced graph in which those
normalisations see only the kept positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graphprune.couple import exported
from graphprune.coupling import Coupling
from graphprune.errors import GraphpruneError, InputError, VerificationError
from graphprune.interpret import interpret
from graphprune.plan import Plan, sliced
from graphprune.program import Node
from graphprune.reference import Masked, like, lively, reference, shuffled, zeroed
from graphprune.rewrite import Emit, rewrite
from graphprune.rewrite.precision import apart, in_full_precision, is_double, is_traced, raised, to_compare
from graphprune.trace import Inputs, held, own_failure, run, trace

TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float64 with parts in float32": 1e-5, "float32": 1e-4}
"""Largest relative error accepted, by the precision compared in. Models run in float64 where they can."""
RAISED_LIMIT = 200_000_000
"""Models with more parameters than this are compared in the precision they have."""
NOISE = 1e-6
"""Outputs below this are rounding noise around zero, and are not measured against themselves."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        error: largest difference of any output, relative to that output's largest value.
        effect: how far the zeroed original is from the dense one, in the same measure; 0 means that the channels
            removed had no effect on these inputs, so the comparison could not have failed.
        tolerance: what `error` had to stay below.
        precision: what the comparison ran in, a key of `TOLERANCE`.
        inputs: how many different sets of inputs were compared; 1 where the original works on the example alone.
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
        self.raised, self.model, self.inputs = to_compare(model, inputs, limit)
        self._original, self._given, self._coupling, self.plan = model, inputs, coupling, plan
        self._masked = bool(Masked(coupling, plan).nodes)
        self._trials: dict[int, _Trial] = {}

    @functools.cached_property
    def coupling(self) -> Coupling:
        """The coupling of the model that is run: its trace states dtypes, so a raised copy needs one of its own."""
        return exported(self._coupling, self.model, self.inputs, anew=self.model is not self._original)

    def problem(self, candidate: nn.Module) -> str:
        """What is wrong with a candidate's outputs, in a word; empty if nothing."""
        trials = [self._trial(k) for k in range(2)]
        try:
            candidate = self._like(candidate)
            with apart(self._original):
                error = max(trial.error(candidate, self.plan) for trial in trials)
        except Exception as failure:
            return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        if error <= self._tolerance(error)[1]:
            return ""
        self._check_repeatable(trials[0])
        return f"its output is off by {error:.1e}"

    def runs(self, candidate: nn.Module) -> str:
        """As `problem`, on the example inputs alone, and content with NaN where the original has it."""
        trial = self._trial(0)
        try:
            candidate = self._like(candidate)
            with apart(self._original):
                got = run(candidate, trial.inputs)
        except Exception as failure:
            return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        known = [torch.where(w.isnan(), 0, w) for w in trial.want]
        if [g.shape for g in got] != [w.shape for w in trial.want]:
            return "its output has another shape"
        if any(t.is_meta for t in got):
            return ""
        error = difference([torch.where(w.isnan(), 0, g) for g, w in zip(got, trial.want, strict=True)], known)
        return "" if error <= self._tolerance(error)[1] else f"its output is off by {error:.1e}"

    def compare(self, pruned: nn.Module, *, fresh: int = 1) -> Verification:
        """Hold `pruned` against the zeroed original on the example inputs and on fresh ones; see `verify`.

        Raises:
            VerificationError: they differ, or there is nothing to compare with.
        """
        try:
            candidate = self._like(pruned)
            with apart(self._original):
                run(candidate, self.inputs)
        except Exception as failure:
            if self.raised:  # what it states in float32 does not go with float64
                lower = Bench(self._original, self._given, self._coupling, self.plan, limit=-1)
                return lower.compare(pruned, fresh=fresh)
            raise VerificationError(f"the pruned model fails: {type(failure).__name__}: {failure}") from failure
        if not any(t.is_floating_point() or t.is_complex() for t in self._trial(0).want):
            where = first_divergence(self.model, candidate, self._trial(0), self.coupling, self.plan, 1e-6)
            if where != _AGREE:  # rounded outputs, such as an argmax, hide what happened before them
                raise VerificationError(f"the pruned model differs from the zeroed original\n  {where}")
        error = effect = 0.0
        for trial in map(self._trial, range(1 + fresh)):
            _check_not_nan(trial.dense)
            error = max(error, trial.error(candidate, self.plan))
            effect = max(effect, difference(trial.want, trial.dense))
            precision, tolerance = self._tolerance(error)
            if not error <= tolerance and self._states_float32(pruned) and error <= TOLERANCE["float32"]:
                return self._by_twin(pruned, fresh)
            if not error <= tolerance:
                self._check_repeatable(trial)
                where = first_divergence(self.model, candidate, trial, self.coupling, self.plan, tolerance)
                raise VerificationError(
                    f"the pruned model differs from the zeroed original by {error:.2e} (tolerance {tolerance:.0e})\n"
                    f"  {where}\n"
                    "this is a defect of graphprune or of a rule that was added; please report it with the model. "
                    "keep_names=[...] keeps the part concerned whole; verify=False skips the check"
                )
        distinct = 1 + sum(not _same(self._trial(k).inputs, self.inputs) for k in range(1, 1 + fresh))
        return Verification(error, effect, tolerance, precision, distinct)

    def _check_repeatable(self, trial: _Trial) -> None:
        """Refuse to judge by an original that is not the same from run to run.

        Raises:
            VerificationError: it is not.
        """
        if any(t.isnan().any() for t in trial.dense):
            return
        apart_by = difference(self._shrunk(run(self.model, trial.inputs, trial.state)), trial.dense)
        if not apart_by <= TOLERANCE["float32"]:
            raise VerificationError(
                f"{type(self.model).__name__} itself gives another output on the same inputs from run to run (off by "
                f"{apart_by:.1e}), so there is nothing to compare with; what it draws from generators, clocks or "
                "counters of its own must be the same on each call, or verify=False prunes it unchecked"
            )

    def _states_float32(self, pruned: nn.Module) -> bool:
        """Whether a traced module may differ only because raising it also raised what the model's code rounds."""
        return self.raised and is_traced(pruned) and not is_double(pruned)

    def _by_twin(self, pruned: nn.Module, fresh: int) -> Verification:
        """Hold a traced module as it is against the original as it is, and its twin against the raised original.

        The twin is written anew from the raised original.

        Raises:
            VerificationError: one of them differs.
        """
        Bench(self._original, self._given, self._coupling, self.plan, limit=-1).compare(pruned, fresh=fresh)
        emit: Emit = "graph" if isinstance(pruned, GraphModule) else "graft"
        plan = Plan.of(self.coupling, self.plan.groups)
        bench = Bench(self.model, self.inputs, self.coupling, plan)
        twin = rewrite(self.model, self.inputs, self.coupling, plan, emit=emit, problem=bench.problem)
        return bench.compare(twin.model, fresh=fresh)

    def _trial(self, k: int) -> _Trial:
        """The example inputs with the weights as they are (k = 0), or fresh ones with no weight too faint to matter."""
        if k not in self._trials:
            state = lively(self.model, k) if k else {}
            inputs, dense = self._accepted(k, state)
            want = reference(self.model, self.coupling if self._masked else self._coupling, self.plan, inputs, state)
            self._trials[k] = _Trial(inputs, state, self._shrunk(want), self._shrunk(dense))
        return self._trials[k]

    def _shrunk(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of the original with what shrinks along with the model (a cache) at its kept positions only."""
        program, masked = self._coupling.program, Masked(self._coupling, self.plan)
        return [
            masked.gather(t, self._coupling.dims[program.outputs[k]]) if k in program.carried else t
            for k, t in enumerate(outputs)
        ]

    def _accepted(self, k: int, state: Mapping[str, torch.Tensor]) -> tuple[Inputs, list[torch.Tensor]]:
        """Inputs on which the original works, and what it gives: fresh noise, else shuffled rows, else the example.

        Raises:
            InputError: it does not work on the example.
        """
        for inputs in (like(self.inputs, k), shuffled(self.inputs, k)) if k else ():
            try:
                dense = run(self.model, inputs, state)
            except Exception:  # an index out of range, say: these inputs are outside its domain
                continue
            if not any(t.isnan().any() for t in dense):
                return inputs, dense
        try:
            return self.inputs, run(self.model, self.inputs, state)
        except Exception as cause:
            raise InputError(own_failure(self.model, self.inputs, cause)) from cause

    def _like(self, candidate: nn.Module) -> nn.Module:
        """The candidate in the precision compared in."""
        if not self.raised:
            return in_full_precision(candidate)
        return raised(candidate)

    def _tolerance(self, error: float) -> tuple[str, float]:
        """The precision compared in, and what it allows; only an error that needs it has the model looked into."""
        precision = "float64" if self.raised or is_double(self.model) else "float32"
        if self.raised and error > TOLERANCE[precision] and self._rough:
            precision = "float64 with parts in float32"
        return precision, TOLERANCE[precision]

    @functools.cached_property
    def _rough(self) -> bool:
        """Whether the raised model still rounds to float32 somewhere.

        Its weights are scaled by 1, 1 + s and 1 + 2s with s = 1e-8. In float64 the outputs follow in a straight line,
        up to s squared; rounding to float32 moves in steps of 6e-8.
        """
        once_each = {id(t): (n, t) for n, t in held(self.model) if t.is_floating_point()}
        parameters = dict(once_each.values())

        def scaled(by: float) -> list[torch.Tensor]:
            outputs = run(self.model, self.inputs, {n: t.detach() * by for n, t in parameters.items()})
            return [o.to(torch.complex128 if o.is_complex() else torch.float64) for o in outputs]

        once, twice, thrice = (scaled(1 + k * 1e-8) for k in range(3))
        return difference([a + c for a, c in zip(once, thrice, strict=True)], [2 * b for b in twice]) > 1e-11


@dataclass(frozen=True)
class _Trial:
    """One comparison.

    Attributes:
        inputs: of the forward.
        state: weights that differ from the model's own.
        want: what must come out.
        dense: what the original gives.
    """

    inputs: Inputs
    state: Mapping[str, torch.Tensor]
    want: list[torch.Tensor]
    dense: list[torch.Tensor]

    def error(self, candidate: nn.Module, plan: Plan) -> float:
        """How far a candidate is from what must come out."""
        return difference(run(candidate, self.inputs, self.for_candidate(candidate, plan)), self.want, self.dense)

    def for_candidate(self, candidate: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
        """The differing weights, sliced; tied ones once for all their names."""
        names = {name for name, _ in held(candidate)}
        made: dict[int, torch.Tensor] = {}
        for name, tensor in self.state.items():
            if id(tensor) not in made:
                made[id(tensor)] = sliced(tensor, plan.kept.get(name, {}))
        return {name: made[id(tensor)] for name, tensor in self.state.items() if name in names}


# -- measuring ---------------------------------------------------------------------------------------------------


def difference(got: list[torch.Tensor], want: list[torch.Tensor], dense: list[torch.Tensor] | None = None) -> float:
    """Largest difference of any output, relative to the largest value of that output; infinite if shapes differ.

    With `dense`, only values that pruning moves set the scale: a mask of -1e9 must not hide an error beside it.
    """
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b, whole in zip(got, want, dense or want, strict=True):
        if b.numel() == 0:
            continue
        moved = b != whole
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        gap = torch.where(a == b, 0.0, (a - b).abs()).max().item()
        finite = b[(b.abs() < float("inf")) & (moved if moved.any() else True)].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        if gap != gap:
            return float("inf")
        worst = max(worst, gap / max(scale, NOISE) if scale > 0 else gap)
    return worst


def _same(a: Inputs, b: Inputs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def _check_not_nan(outputs: list[torch.Tensor]) -> None:
    for k, output in enumerate(outputs):
        if (output.is_floating_point() or output.is_complex()) and output.isnan().any():
            raise VerificationError(
                f"output {k} of the original model holds NaN on these inputs, so there is nothing to compare with; "
                "pass example inputs on which the model works, or verify=False to prune it unchecked"
            )


# -- where two runs part -----------------------------------------------------------------------------------------


def first_divergence(
    model: nn.Module, pruned: nn.Module, trial: _Trial, coupling: Coupling, plan: Plan, tolerance: float
) -> str:
    """A sentence naming the first op whose values differ between the zeroed original and the pruned model."""
    inputs = trial.inputs
    try:
        other = trace(pruned, inputs, front_end="export")
    except GraphpruneError as error:
        return f"the pruned model cannot be traced to say where: {error}"
    masked = Masked(coupling, plan)
    ours: list[tuple[Node, Any]] = []
    theirs: list[tuple[Node, Any]] = []
    state = {**dict(held(model)), **trial.state, **zeroed(model, plan, trial.state)}
    theirs_state = {**dict(held(pruned)), **trial.for_candidate(pruned, plan)}
    stand_in = masked.stand_in if masked.nodes else None
    interpret(coupling.program, state, inputs, watch=_recorder(ours), stand_in=stand_in)
    interpret(other, theirs_state, inputs, watch=_recorder(theirs))
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
    return _AGREE


_AGREE = "every op agrees on its own; they part in how the outputs are put together"


def _recorder(into: list[tuple[Node, Any]]) -> Callable[[Node, Any], None]:
    def watch(node: Node, result: Any) -> None:
        kept = [r.detach().clone() for r in result] if isinstance(result, (tuple, list)) else result.detach().clone()
        into.append((node, kept))

    return watch


def _plain(op: str) -> str:
    """The op without what graph emission replaces."""
    return {"chunk": "split_with_sizes", "split": "split_with_sizes"}.get(op, op)

"""Scans: how much the loss rises when one group, or one class of alike groups, keeps a fraction of its channels.

Nothing is rewritten: the original runs with the channels zeroed, which is what a model without them computes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from graphprune.calibrate import Batch, Criterion, Loss, read, require
from graphprune.couple import couple
from graphprune.coupling import Coupling, Group
from graphprune.errors import CriterionError, InputError, UnknownName, counted, nearest
from graphprune.files import made, write_whole
from graphprune.importance import Importance, Magnitude, ordered
from graphprune.interpret import Replay
from graphprune.plan import Plan
from graphprune.reference import Masked, zeroed
from graphprune.sensitivity.curves import Curve, Sensitivity
from graphprune.trace import trace, untouched

__all__ = ["Curve", "Sensitivity", "sensitivity"]

SAME = 1e-5
"""How far the loss of the whole model may be from that of the run that is gone on with, relative to it."""


def sensitivity(
    model: nn.Module,
    given: Any,
    batches: Iterable[Any],
    loss: Loss,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    importance: Importance = Magnitude(),  # noqa: B008 - frozen
    groups: Iterable[str] | None = None,
    by: Literal["group", "class"] = "group",
    directory: str | os.PathLike[str] | None = None,
    sample_dim: int = 0,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how much the loss rises when each group alone keeps a fraction of its channels.

    Args:
        model: any module; it is run in eval mode and left as it was.
        given: its coupling, which with rules of your own is one made with them, or example inputs to make one from.
        batches, loss, sample_dim, progress: as for `calibrate`; the batches are gone through many times, so a generator
            will not do.
        fractions: of the channels that stay, each between 0 and 1.
        importance: says which channels stay.
        groups: names or patterns (`"layer1.*"`) of the groups to scan; by default all.
        by: "class" cuts groups together that are alike but for the number of their layer, such as those of
            `layer1.0.conv1` and `layer1.1.conv1`; "group" each alone.
        directory: where every loss measured is kept; called again with the same arguments, the scan goes on there.
    Raises:
        InputError: an argument cannot be used, or the directory holds a scan of something else.
        UnknownName: a pattern fits no group.
        CriterionError: the importance says nothing about a group.
        CalibrationError: the batches or the loss cannot be used.

    Example:
        >>> import torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> batch = torch.randn(4, 3), torch.randn(4, 5)
        >>> scan = gp.sensitivity(net, batch[:1], [batch], nn.functional.mse_loss)
        >>> scan.curves["0"].widths
        (2, 4, 6)
    """
    if by not in ("group", "class"):
        raise InputError(f"by={by!r}; it is 'group' or 'class'")
    if not fractions or not all(isinstance(f, float) and 0 < f < 1 for f in fractions):
        raise InputError(f"fractions={fractions!r}: fractions of the channels that stay, between 0 and 1")
    require(batches, again=True)
    if any(p.is_meta for p in model.parameters()):
        raise InputError("the model is on the meta device and has no values; load weights first")
    coupling = given if isinstance(given, Coupling) else couple(trace(model, given))
    subjects = _subjects(_chosen(coupling, groups), by)
    scores = importance(model, coupling)
    silent = [g for names in subjects.values() for g in names if g not in scores]
    if silent:
        raise CriterionError(
            f"{type(importance).__name__} has no scores for group {silent[0]!r}; leave it out of groups"
        )
    orders = {name: ordered(scores[name]) for names in subjects.values() for name in names}
    runs = _Runs(model, coupling, batches, Criterion(loss, sample_dim), sample_dim)
    record = _Record(directory, runs.loss(Plan.of(coupling, {})), runs.samples)
    whole: float = record.found["loss"]
    points = [
        (label, width)
        for label, names in subjects.items()
        for width in sorted({max(1, round(f * orders[names[0]].size)) for f in fractions})
    ]
    increases: dict[str, dict[int, float]] = {label: {} for label in subjects}
    hidden = None if progress is None else not progress
    for label, width in tqdm(points, desc="scanning", unit="run", disable=hidden):
        keep = {name: orders[name].keep(width) for name in subjects[label]}
        found = record.get(keep)
        if found is None:
            found = record.put(keep, runs.loss(Plan.of(coupling, keep)))
        increases[label][width] = found - whole
    curves = {
        label: Curve(names, orders[names[0]].size, tuple(increases[label]), tuple(increases[label].values()))
        for label, names in subjects.items()
    }
    return Sensitivity(whole, runs.samples, curves)


def _chosen(coupling: Coupling, patterns: Iterable[str] | None) -> list[Group]:
    """The groups that any pattern fits.

    Raises:
        InputError: a string in place of a list of them, or nothing to scan.
        UnknownName: a pattern fits none.
    """
    if isinstance(patterns, str):
        raise InputError(f"groups={patterns!r}: pass a list, even of one")
    wanted = ["*"] if patterns is None else list(patterns)
    fits = {p: [g for g in coupling.groups if g.name == p or fnmatch.fnmatchcase(g.name, p)] for p in wanted}
    for pattern, found in fits.items():
        if not found and patterns is not None:
            raise UnknownName(f"no group fits {pattern!r}{nearest(pattern, [g.name for g in coupling.groups])}")
    chosen = {g.name for found in fits.values() for g in found}
    if not chosen:
        raise InputError("there are no groups to scan; print(coupling) says what is pinned and why")
    return [g for g in coupling.groups if g.name in chosen]


def _subjects(groups: Iterable[Group], by: str) -> dict[str, tuple[str, ...]]:
    """Per curve, the groups that are cut together."""
    if by == "group":
        return {g.name: (g.name,) for g in groups}
    classes: dict[tuple[str, int], list[str]] = {}
    for group in groups:
        label = re.sub(r"(^|\.)\d+(?=$|[.:\[])", r"\1*", group.name)
        classes.setdefault((label, group.size), []).append(group.name)
    labels = [label for label, _ in classes]
    return {
        label if labels.count(label) == 1 else f"{label} ({size})": tuple(names)
        for (label, size), names in classes.items()
    }


class _Runs:
    """Losses of the original with channels zeroed.

    Attributes:
        samples: how many samples the last run had.
    """

    def __init__(
        self, model: nn.Module, coupling: Coupling, batches: Iterable[Any], criterion: Criterion, sample_dim: int
    ) -> None:
        self.model, self.coupling, self.batches = model, coupling, batches
        self.criterion, self.sample_dim = criterion, sample_dim
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.replay, self.couplings, self.samples = Replay(model), dict[Any, Coupling](), 0

    def loss(self, plan: Plan) -> float:
        """Mean loss per sample of the original with everything zeroed that the plan removes."""
        total, self.samples, state = 0.0, 0, zeroed(self.model, plan)
        masked = bool(Masked(self.coupling, plan).nodes)
        for batch in read(self.batches, len(self.coupling.program.inputs), self.device):
            count = next((t.shape[self.sample_dim] for t in batch.inputs.tensors() if t.dim() > self.sample_dim), 1)
            with untouched(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                output = self._masked(batch, plan, state) if masked else self._zeroed(batch, state)
                total += float(self.criterion.total(output, batch.target, count))
            self.samples += count
        return total / self.samples

    def _zeroed(self, batch: Batch, state: Mapping[str, torch.Tensor]) -> Any:
        inputs = batch.inputs.map(torch.clone)
        return torch.func.functional_call(self.model, dict(state), inputs.args, dict(inputs.kwargs))

    def _masked(self, batch: Batch, plan: Plan, state: Mapping[str, torch.Tensor]) -> Any:
        """The output where normalisations over a group that loses channels see only the kept ones."""

        def start() -> None:
            program = self.replay.program(batch.inputs)
            if program not in self.couplings:
                self.couplings[program] = self.coupling.again(program)
            self.at = Masked(self.couplings[program], plan)

        start()
        return self.replay.run(batch.inputs, lambda *call: self.at.stand_in(*call), restart=start, state=state)


class _Record:
    """The losses measured so far, in a file.

    Args:
        directory: with None nothing is kept.
        loss, samples: of the whole model.
    Raises:
        InputError: the file is of a scan of something else, or cut off.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, loss: float, samples: int) -> None:
        self.path: Path | None = None if directory is None else made(directory) / "sensitivity.json"
        self.found: dict[str, Any] = {"format": 1, "loss": loss, "samples": samples, "losses": {}}
        if self.path is None or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text())
            same = found["samples"] == samples and abs(found["loss"] - loss) <= SAME * max(abs(loss), 1e-12)
            self.found = {**found, "losses": dict(found["losses"])}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} cannot be read ({error!r}); delete it to scan anew") from error
        if not same:
            raise InputError(
                f"{self.path} is of another model, loss or batches: {found['loss']:.6g} on "
                f"{counted(found['samples'], 'sample')}, here {loss:.6g} on {samples}; pass another directory"
            )

    def get(self, keep: Mapping[str, Sequence[int]]) -> float | None:
        """The loss where these positions of these groups stay; None if it was not measured."""
        loss: float | None = self.found["losses"].get(_key(keep))
        return loss

    def put(self, keep: Mapping[str, Sequence[int]], loss: float) -> float:
        """Keep a loss."""
        self.found["losses"][_key(keep)] = loss
        if self.path is not None:
            text = json.dumps(self.found, indent=1).encode()
            write_whole(self.path, lambda file: file.write(text))
        return loss


def _key(keep: Mapping[str, Sequence[int]]) -> str:
    first, positions = next(iter(keep.items()))
    digest = hashlib.sha256(json.dumps({n: list(k) for n, k in keep.items()}).encode()).hexdigest()[:16]
    return f"{first}, {len(positions)} kept, {digest}"

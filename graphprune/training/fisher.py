"""Pruning while training (Liu et al., Group Fisher Pruning, ICML 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from graphprune.allocate import Target
from graphprune.allocate.problem import Unit, pose
from graphprune.calibrate import Gradients
from graphprune.cost import Cost, activations, macs, params
from graphprune.couple import couple
from graphprune.errors import CalibrationError, InputError, counted
from graphprune.importance import Removal, ordered
from graphprune.plan import Plan
from graphprune.pruning import Result, check_target, emit_verified, names_of, require_groups
from graphprune.report import Choice, report
from graphprune.rewrite import Emit
from graphprune.rules import RULES, Rule
from graphprune.trace import Inputs, held, trace
from graphprune.training.masks import Masks
from graphprune.training.watch import Reading, Watch

COSTS: Mapping[str | None, Any] = {"memory": activations, "macs": macs, "params": params, None: None}


@dataclass(frozen=True)
class Removed:
    """One decision.

    Attributes:
        step: of the optimizer, from 1, after which it was taken.
        channels: per group, the positions that went.
        importance: what they were worth, over what they cost.
    """

    step: int
    channels: Mapping[str, tuple[int, ...]]
    importance: float


class Attached:
    """Ends an attachment with `remove()`."""

    def __init__(self, handles: Iterable[Any]) -> None:
        self.handles = list(handles)

    def remove(self) -> None:
        """Take all hooks away; once is enough."""
        while self.handles:
            self.handles.pop().remove()


class GroupFisher:
    """Removes the channel that matters least for what it costs, every few steps of anybody's training loop.

    Ordinary steps are listened to: q, the derivative of each sample's loss by a mask on a channel, is summed over all
    layers that are coupled, squared, and averaged over the samples of `every` steps. The channel with the least
    1/2 mean q^2 over what it costs at the widths of the moment goes: its weights are zero from there on. When the
    target is met, `finish` writes the smaller module, which computes what the masked one does, and proves that.
    Scores in its report are 1/2 mean q^2 as it was when a channel went, or, where it stays, at the last removal. They
    are of different times of the training: a cut is drawn only where all that went are below all that stay.

    Under `torch.distributed` all processes add up what they saw, and take the decision of the first one. A batch may be
    spread over several backward passes. Gradient checkpointing of the whole model and compiled models are not seen.

    Args:
        model: what is trained, in place; of a `DistributedDataParallel` its `module`.
        example_inputs: as for `prune`.
        target: where to stop: fractions of costs, and limits. With `multiple_of` so many channels go at once.
        every: steps of the optimizer between removals; the paper takes 25 for classifiers, 10 for detectors.
        count: how many removals there are each time.
        normalize: what a channel costs: "memory", the elements of the outputs of layers that go with it (the paper's
            choice for speed), "macs", "params", or None for nothing.
        reduction: whether the loss is the "mean" or the "sum" of one loss per sample.
        keep_names, on_unknown, rules: as for `prune`.
        sample_dim: which dim of the inputs tells samples apart.
    Raises:
        GraphpruneError: as `prune`, for a model or a target that will not do.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> pruner = GroupFisher(net, x, target=gp.Target(channels=0.5), every=2)
        >>> handle = pruner.attach(sgd)
        >>> while not pruner.done:
        ...     sgd.zero_grad()
        ...     nn.functional.cross_entropy(net(x), y).backward()
        ...     sgd.step()
        >>> result = pruner.finish()
        >>> result.model[0], len(pruner.removed)
        (Linear(in_features=3, out_features=4, bias=True), 4)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        target: Target,
        every: int = 25,
        count: int = 1,
        normalize: Literal["memory", "macs", "params"] | None = "memory",
        reduction: Literal["mean", "sum"] = "mean",
        keep_names: Iterable[str] = (),
        on_unknown: Literal["pin", "error"] = "pin",
        rules: Mapping[str, Rule] = RULES,
        sample_dim: int = 0,
    ) -> None:
        check_target(target)
        if every < 1 or count < 1 or normalize not in COSTS or reduction not in ("mean", "sum"):
            raise InputError(
                f"GroupFisher(every={every}, count={count}, normalize={normalize!r}, reduction={reduction!r}): every "
                "and count are at least 1, normalize is 'memory', 'macs', 'params' or None, reduction 'mean' or 'sum'"
            )
        if isinstance(target.channels, Mapping):
            raise InputError("GroupFisher: fractions by group leave nothing to choose; give a fraction of a cost")
        self.model, self.inputs, self.target = model, Inputs.of(example_inputs), target
        self.every, self.count, self.normalize, self.reduction = every, count, normalize, reduction
        program = trace(model, self.inputs)
        self.coupling = couple(program, on_unknown=on_unknown, keep_names=keep_names, rules=rules)
        require_groups(self.coupling)
        sizes = {group.name: group.size for group in self.coupling.groups}
        self.problem = pose(
            {name: ordered(torch.zeros(size)) for name, size in sizes.items()}, target, self.coupling, each=False
        )
        self.choice = self.problem.most
        self.cost: Cost | None = None if COSTS[normalize] is None else COSTS[normalize](self.coupling)
        self.keep = {name: list(range(size)) for name, size in sizes.items()}
        self.scores = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.sums = {name: Gradients.empty(size, products=False) for name, size in sizes.items()}
        self.step, self.removed = 0, list[Removed]()
        self._start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in held(model)}
        self._masks, self._heard = Masks(model), list[Reading]()
        self._watch = Watch(model, self.coupling, self._heard.append, sample_dim)
        self._attached = Attached([])

    @property
    def done(self) -> bool:
        """Whether the target is met."""
        return self.problem.fits(self.choice)

    @property
    def plan(self) -> Plan:
        """What is left."""
        return Plan.of(self.coupling, self.keep)

    def attach(self, optimizer: Optimizer, scaler: Any = None) -> Attached:
        """Listen to the model's passes in train mode, and remove channels after steps of this optimizer.

        Args:
            optimizer: over the model.
            scaler: the `GradScaler` that losses are scaled with, if there is one.
        Returns:
            A handle; `handle.remove()` ends it, and so does `finish`.
        Raises:
            InputError: the optimizer has none of the model's parameters.
        """
        own = {id(p) for p in self.model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise InputError("GroupFisher: the optimizer holds no parameter of the model; pass the one that trains it")
        self._attached.remove()

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._after(optimizer, None if scaler is None else float(scaler.get_scale()))

        self._attached = Attached([*self._watch.attach(), optimizer.register_step_post_hook(after)])
        return self._attached

    def _after(self, optimizer: Optimizer, scale: float | None) -> None:
        """What follows a step: the sums grow, masks are held, and now and then a channel goes.

        Raises:
            CalibrationError: gradients are not finite, and no scaler skips such steps.
        """
        heard, self._heard[:] = list(self._heard), []
        for reading in heard:
            factor = (reading.view.samples if self.reduction == "mean" else 1) / (scale or 1.0)
            wrong = [name for name, q in reading.q.items() if not q.isfinite().all()]
            if wrong and scale is None:
                raise CalibrationError(
                    f"GroupFisher: gradients of group {wrong[0]!r} are NaN or infinite in step {self.step + 1}; lower "
                    "the learning rate, or pass attach(optimizer, scaler) the GradScaler that skips such steps"
                )
            for name, q in reading.q.items() if reading.heard and not wrong else ():
                self.sums[name].add(q * factor)
        self.step += 1
        self._masks.apply()
        if not self.done and self.step % self.every == 0:
            self._remove()
            self._masks.set(self.plan)
            self._masks.forget(optimizer)

    def _remove(self) -> None:
        """Take a decision, the same in all processes.

        Raises:
            CalibrationError: nothing was heard since the last one.
        """
        together = dist.is_available() and dist.is_initialized()
        device = torch.device("cuda") if together and dist.get_backend() == "nccl" else torch.device("cpu")
        for tensor in self._tensors() if together else ():
            moved = tensor.to(device)
            dist.all_reduce(moved)
            tensor.copy_(moved)
        if not all(sums.count for sums in self.sums.values()):
            raise CalibrationError(
                f"GroupFisher: no sample was heard in {counted(self.every, 'step')}; call the model itself, in train "
                "mode, and its loss.backward(), before optimizer.step()"
            )
        scores = {name: sums.second / 2 for name, sums in self.sums.items()}
        for name, kept in self.keep.items():
            self.scores[name][kept] = scores[name][kept]
        for _ in range(self.count):
            if not self.done:
                best = torch.tensor([self._least(scores)])
                if together:
                    best = best.to(device)
                    dist.broadcast(best, 0)
                self._take(int(best), scores)
        for tensor in self._tensors():
            tensor.zero_()

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for sums in self.sums.values() for tensor in sums.tensors()]

    def _least(self, scores: Mapping[str, torch.Tensor]) -> int:
        """The unit whose next removal loses least for what it frees."""
        return int(np.argmin([self._worth(number, scores) for number in range(len(self.problem.units))]))

    def _worth(self, number: int, scores: Mapping[str, torch.Tensor]) -> float:
        """What the next removal of a unit loses, over what it frees at the widths of the moment."""
        if self.choice[number] == 0:
            return float("inf")
        lost = sum(float(scores[name][gone].sum()) for name, gone in self._next(number, scores).items())
        if self.cost is None:
            return lost
        after = self.choice.copy()
        after[number] -= 1
        freed = self.cost.of(self.problem.widths(self.choice)) - self.cost.of(self.problem.widths(after))
        return lost / max(1.0, freed)

    def _next(self, number: int, scores: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
        """Per group of a unit, the channels that go next: of those left the least, of equal ones the last."""
        unit: Unit = self.problem.units[number]
        fewer = int(unit.widths[self.choice[number]] - unit.widths[self.choice[number] - 1])
        names = [self.coupling.groups[k].name for k in unit.groups]
        return {
            name: sorted(self.keep[name], key=lambda i, name=name: (float(scores[name][i]), -i))[:fewer]  # type: ignore[misc]
            for name in names
        }

    def _take(self, number: int, scores: Mapping[str, torch.Tensor]) -> None:
        worth, gone = self._worth(number, scores), self._next(number, scores)
        self.choice[number] -= 1
        for name, channels in gone.items():
            self.keep[name] = [i for i in self.keep[name] if i not in channels]
        self.removed.append(Removed(self.step, {name: tuple(c) for name, c in gone.items()}, worth))

    def finish(self, *, emit: Emit = "auto") -> Result:
        """End it, and write the smaller module, verified; the model stays as it is, masked.

        The proof runs on the model with the values that removed channels had when the pruner was made, so that it
        could fail.

        Args:
            emit: as for `prune`.
        Raises:
            InputError: the target is not met yet.
            RewriteError, VerificationError: no smaller module computes what it must.
        """
        if not self.done:
            raise InputError(f"GroupFisher: the target is not met: {self}; train on until pruner.done")
        self._attached.remove()
        plan = self.plan
        with self._masks.filled(self._start):
            rewritten, verification = emit_verified(self.model, self.inputs, self.coupling, plan, emit=emit)
        reported = report(self.coupling, plan, self.target, rewritten, verification, choice=self._told())
        return Result(
            rewritten.model, plan, self.coupling, reported, names_of(self.model), self.inputs, rewritten.changes
        )

    def _told(self) -> Choice | None:
        """What to report of how channels were chosen; None where none was."""
        if not self.removed:
            return None
        said = f"Fisher of the {self.every} steps before a channel went, or before the last removal"
        scores = {}
        for name, kept in self.keep.items():
            gone = [channel for removed in self.removed for channel in removed.channels.get(name, ())]
            stay = sorted(kept, key=lambda channel, worth=self.scores[name]: float(worth[channel]))  # type: ignore[misc]
            order = torch.tensor([*gone, *stay])
            scores[name] = Removal(order, self.scores[name][order])
        return Choice(said, f"greedy per {self.normalize}" if self.normalize else "greedy", scores)

    def __str__(self) -> str:
        spent = self.problem.spent(self.choice)
        budgets = self.target.budgets
        left = ", ".join(f"{n} {s * budgets[n]:.3f} of {budgets[n]:g}" for n, s in zip(budgets, spent, strict=True))
        gone = sum(len(channels) for removed in self.removed for channels in removed.channels.values())
        removed = f"{counted(gone, 'channel')} {'is' if gone == 1 else 'are'} removed"
        return f"after {counted(self.step, 'step')} {removed}, {left}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model and its optimizer."""
        return {
            "step": self.step,
            "keep": {name: list(kept) for name, kept in self.keep.items()},
            "choice": self.choice.tolist(),
            "removed": [(r.step, dict(r.channels), r.importance) for r in self.removed],
            "scores": {name: scores.clone() for name, scores in self.scores.items()},
            "sums": [tensor.clone() for tensor in self._tensors()],
            "start": dict(self._start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's weights are zeroed where channels are gone.

        Raises:
            InputError: it is of another model.
        """
        if {n: t.shape for n, t in self._start.items()} != {n: t.shape for n, t in state["start"].items()}:
            raise InputError("GroupFisher: this state is of another model")
        self.step, self.choice = int(state["step"]), np.array(state["choice"], dtype=np.intp)
        self.keep = {name: list(kept) for name, kept in state["keep"].items()}
        self.removed = [Removed(*removed) for removed in state["removed"]]
        self._start = dict(state["start"])
        self.scores = {name: scores.clone() for name, scores in state["scores"].items()}
        for tensor, kept in zip(self._tensors(), state["sums"], strict=True):
            tensor.copy_(kept)
        self._masks.set(self.plan)

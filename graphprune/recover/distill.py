"""Distillation: the smaller network learns to say what the original says, and to hold what its kept channels hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling import Coupling
from graphprune.errors import InputError, UnknownName, nearest
from graphprune.plan import Plan
from graphprune.program import Node, Value
from graphprune.reference import Masked
from graphprune.trace import Inputs, modules, output_tensors, play, untouched


class Distillation:
    """What a loss becomes with a teacher; call it in the place of the loss alone.

    The soft part is T^2 times the divergence of the student's class probabilities from the teacher's, both at
    temperature T (Hinton et al. 2015). Of a module named in `features` the student's output is held against the
    teacher's at the channels that the plan keeps: squared distance over squared length, each module alike.

    Args:
        teacher: usually the original; it is run in eval mode without gradients, and left as it was.
        temperature: T; None compares raw outputs by their squared difference, for networks that are no classifiers.
        weight: of the soft part; the loss itself gets what is missing to 1.
        class_dim: dim of the output along which the classes are.
        features: paths of modules whose outputs are matched, such as ["layer2", "layer3"].
        feature_weight: of all of them together.
        coupling, plan: of the teacher; what was removed. Needed for features.
        example_inputs: as for `trace`. Needed for features.
    Raises:
        InputError: a number is out of range, something is missing for features, or a module has no single output.
        UnknownName: the teacher has no such module.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        >>> small = gp.prune(net, torch.randn(2, 3), target=gp.Target(channels=0.5)).model
        >>> distillation = Distillation(net, temperature=2.0, weight=0.5)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
        >>> output = small(x)
        >>> distillation(functional.cross_entropy(output, y), output, x).backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float | None = 4.0,
        weight: float = 0.9,
        class_dim: int = -1,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
        coupling: Coupling | None = None,
        plan: Plan | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not (0 <= weight <= 1 and feature_weight >= 0 and (temperature is None or temperature > 0)):
            raise InputError(
                f"Distillation: temperature={temperature}, weight={weight}, feature_weight={feature_weight}: the "
                "temperature is positive, the weight in [0, 1], the weight of features not negative"
            )
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self.class_dim, self.feature_weight = class_dim, feature_weight
        self._values: Mapping[str, Value] = {}
        self._held: dict[str, torch.Tensor] = {}
        if features:
            if coupling is None or plan is None or example_inputs is None:
                raise InputError("Distillation: features need coupling=, plan= and example_inputs= of the teacher")
            plan.check(coupling)
            plan.check_model(teacher)
            self._values = outputs_of(teacher, coupling, features, Inputs.of(example_inputs))
            self._masked, self._dims = Masked(coupling, plan), coupling.dims

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """Note what the modules named in `features` return in the student; only needed where there are features.

        Raises:
            InputError: the student is the teacher, or has no such modules, as a graph module has none.
        """
        if student is self.teacher:
            raise InputError("Distillation: the student is the teacher; distil from the original into result.model")
        of_student = dict(modules(student))
        missing = [path for path in self._values if path not in of_student]
        if missing:
            raise InputError(
                f"Distillation: the student, {type(student).__name__}, has no module {missing[0]!r}; prune with "
                "emit='graft', or distil outputs alone, without features"
            )
        handles = [of_student[path].register_forward_hook(_noting(path, self._held)) for path in self._values]
        try:
            yield
        finally:
            self._held.clear()
            for handle in handles:
                handle.remove()

    def __call__(self, loss: torch.Tensor, output: Any, inputs: Any) -> torch.Tensor:
        """The loss with what the teacher adds.

        Args:
            loss: of the student on this batch.
            output: what the student returned.
            inputs: what it was called with: a tensor, a tuple, a dict of keyword arguments, or an `Inputs`.
        Raises:
            InputError: the teacher returns something else than the student, or a module was not seen.
        """
        unseen = [path for path in self._values if path not in self._held]
        if unseen:
            raise InputError(
                f"Distillation: the student was not seen to run {unseen[0]!r}; run it inside "
                "`with distillation.watching(student):`, and leave out modules that a graft does not call"
            )
        want, held = self._taught(Inputs.of(inputs))
        total = (1 - self.weight) * loss
        if self.weight:
            total = total + self.weight * self._soft(logits(output), logits(want))
        for path in self._values:
            kept = self._masked.gather(held[path], self._dims[self._values[path]])
            share = self.feature_weight / len(self._values)
            total = total + share * _distance(path, self._held.pop(path), kept)
        return total

    def _taught(self, inputs: Inputs) -> tuple[Any, dict[str, torch.Tensor]]:
        """What the teacher returns in eval mode, and what the modules named in `features` do there."""
        held: dict[str, torch.Tensor] = {}
        of_teacher = dict(modules(self.teacher))
        with ExitStack() as stack:
            for path in self._values:
                stack.callback(of_teacher[path].register_forward_hook(_noting(path, held)).remove)
            stack.enter_context(evaluating(self.teacher))
            stack.enter_context(torch.no_grad())
            return inputs.call(self.teacher), held

    def _soft(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if student.shape != teacher.shape:
            raise InputError(
                f"Distillation: the teacher's output has shape {list(teacher.shape)}, the student's "
                f"{list(student.shape)}; a teacher has the same outputs, as the model that was pruned has"
            )
        if self.temperature is None:
            return functional.mse_loss(student.float(), teacher.float())
        says = functional.log_softmax(student.float() / self.temperature, self.class_dim)
        want = functional.log_softmax(teacher.float() / self.temperature, self.class_dim)
        divergence = functional.kl_div(says, want, reduction="none", log_target=True).sum(self.class_dim).mean()
        return divergence * self.temperature**2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards each module is in the mode it was in."""
    training = [module for _, module in modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logits(output: Any) -> torch.Tensor:
    """The first floating tensor of an output; what is called `logits` where there is such a thing.

    Raises:
        InputError: there is none.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = [t for t in output_tensors(output if named is None else named) if t.is_floating_point()]
    if not found:
        raise InputError(f"Distillation: {type(output).__name__} holds no floating tensor to compare")
    return found[0]


def outputs_of(model: nn.Module, coupling: Coupling, paths: Sequence[str], inputs: Inputs) -> dict[str, Value]:
    """Per path of a module, the value of the program that it returns.

    The model runs once as it was recorded: the tensor that a module returns is one that a recorded call made.

    Raises:
        InputError: a module does not run, or returns anything but one such tensor.
        UnknownName: the model has no such module.
    """
    of_model = dict(modules(model))
    for path in paths:
        if path not in of_model:
            raise UnknownName(f"no module {path!r} in {type(model).__name__}{nearest(path, of_model)}")
    made: dict[int, tuple[torch.Tensor, Value]] = {}  # tensors are kept alive, so that their ids stay unique
    found: dict[str, Value] = {}

    def note(node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made.update({id(t): (t, value) for t, value in zip(output_tensors(result), node.outputs, strict=False)})
        return result

    def returned(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if id(output) in made:
                found[path] = made[id(output)][1]

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(of_model[path].register_forward_hook(returned(path)).remove)
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        if coupling.program.source is None:  # an exported program does not call modules
            play(coupling.program, model, inputs.map(torch.clone), note)
    missing = [path for path in paths if path not in found]
    if missing:
        raise InputError(
            f"Distillation: what {missing[0]!r} returns cannot be followed; name modules that run in the trace and "
            "return one tensor, of a model that was recorded and not exported"
        )
    return found


def _noting(path: str, held: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        held[path] = output

    return hook


def _distance(path: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance from the teacher's feature, relative to its squared length.

    Raises:
        InputError: they have other shapes.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"Distillation: {path!r} gives {list(student.shape)} in the student, and the teacher's kept channels are "
            f"{list(teacher.shape)}; pass the plan and the coupling that the student was made with"
        )
    given, want = student.float(), teacher.float()
    return (given - want).square().sum() / want.square().sum().clamp(min=torch.finfo(torch.float32).tiny)

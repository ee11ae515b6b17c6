"""What all penalties share: each adds its gradient to those that a backward pass left, once per optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from graphprune.errors import InputError, counted
from graphprune.report import History, Track
from graphprune.training.distribution import NEAR, Distribution
from graphprune.training.pieces import Channels, distinct

Strength: TypeAlias = float | Callable[[int], float]
"""A number, or what gives one for the number of the step, from 0."""


def ramp(strength: float, steps: int) -> Callable[[int], float]:
    """A schedule that grows evenly from 0 to `strength` over so many steps and stays there.

    Example:
        >>> [ramp(1e-4, 4)(step) for step in (0, 2, 4, 9)]
        [0.0, 5e-05, 0.0001, 0.0001]
    """
    return lambda step: strength * min(1.0, step / steps)


class Penalty(ABC):
    """A term of the loss, by its gradient.

    Call it after `loss.backward()` and before `optimizer.step()`: once per step of the optimizer, however many
    backward passes add up to that, and inside the closure of an optimizer that takes one. Or `attach` it. Under
    `DistributedDataParallel` every process adds the same.

    Args:
        groups: what the penalty looks at.
        strength: how strong it is, or a schedule.
    """

    def __init__(self, groups: Mapping[str, Channels], strength: Strength) -> None:
        if not callable(strength) and not strength >= 0:
            raise InputError(f"strength={strength!r}: it is a number that is not negative, or a schedule of such")
        self.groups, self.strength, self.step = groups, strength, 0
        self._parameters = distinct(groups)
        self._start = {name: held.sizes() for name, held in groups.items()}
        self._every, self._points = 0, {0: self._point()}

    @abstractmethod
    def _add(self, strength: float) -> None:
        """Add the gradient to the `grad` of every parameter that has one."""

    @torch.no_grad()
    def __call__(self, *, scale: float = 1.0) -> None:
        """Add the gradient.

        Args:
            scale: what the gradients are multiplied with, `scaler.get_scale()` where a `GradScaler` has not yet
                unscaled them; 1 after `scaler.unscale_(optimizer)`.
        Raises:
            InputError: nothing has a gradient.
        """
        if all(p.grad is None for p in self._parameters.values()):
            raise InputError(
                f"{type(self).__name__}: none of {counted(len(self._parameters), 'parameter')} has a gradient, such as "
                f"{next(iter(self._parameters))}; call it after loss.backward() and before optimizer.step()"
            )
        if self._every and self.step % self._every == 0:
            self._points[self.step] = self._point()
        strength = self.strength(self.step) if callable(self.strength) else self.strength
        self._add(strength * scale)
        self.step += 1

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Add the gradient at the start of every `optimizer.step()`, and of none that a `GradScaler` skips.

        Returns:
            A handle; `handle.remove()` ends it.
        Raises:
            InputError: the optimizer has none of the parameters concerned.
        """
        of_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in of_optimizer for p in self._parameters.values()):
            raise InputError(
                f"{type(self).__name__}: the optimizer holds none of its parameters, such as "
                f"{next(iter(self._parameters))}; make the penalty from the model that the optimizer trains"
            )

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            held = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales gradients itself
            self(scale=1.0 if held is None else float(held))

        return optimizer.register_step_pre_hook(before)

    def distribution(self) -> Distribution:
        """What has become of the channels' sizes so far."""
        return Distribution(self.step, self._start, {name: held.sizes() for name, held in self.groups.items()})

    def record(self, every: int = 100) -> None:
        """Keep quantiles of the sizes before every so many steps from now on, for `history`.

        Args:
            every: how many steps; 0 ends it.
        Raises:
            InputError: it is no number of steps.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise InputError(f"record(every={every!r}): a whole number of steps, such as 100")
        self._every = every

    @property
    def history(self) -> History:
        """The sizes at the start, those that `record` kept, and those of now; `history.plot()` draws them."""
        points = {**self._points, self.step: self._point()}
        shares, quantiles = zip(*points.values(), strict=True)
        groups = {
            name: Track(NEAR * float(start.median()), tuple(each[name] for each in quantiles))
            for name, start in self._start.items()
        }
        return History(type(self).__name__, tuple(points), shares, groups)

    def _point(self) -> tuple[float, dict[str, tuple[float, ...]]]:
        """The fraction near zero, and quantiles per group."""
        now = self.distribution()
        return now.near_zero(), {name: now.quantiles(name) for name in now.now}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"step": self.step, "start": dict(self._start), "every": self._every, "points": dict(self._points)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self._start = int(state["step"]), dict(state["start"])
        self._every, self._points = int(state["every"]), dict(state["points"])


def shrink(groups: Mapping[str, Channels], strength: float) -> None:
    """Add the gradient of strength * sum over channels of sqrt(elements) * norm of its elements; 0 at norm 0."""
    for held in groups.values():
        norms = held.norms()
        each = strength * held.count.to(norms.device).sqrt() / norms
        each = torch.where(norms > 0, each, 0.0)
        for piece in held.pieces:
            if piece.parameter.grad is not None:
                rows = piece.held(piece.parameter)
                factor = each[piece.which.to(each.device)][:, None]
                piece.add(piece.parameter.grad, rows * factor.to(rows.device, rows.real.dtype))

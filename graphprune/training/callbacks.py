"""Callbacks, so that people keep the loops of transformers and Lightning: each attaches parts of this package."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from graphprune.errors import InputError


class Attachable(Protocol):
    """A penalty or a `GroupFisher`."""

    def attach(self, optimizer: Any) -> Any:
        """Act on the steps of this optimizer from now on, until `remove()` of what is returned."""


class _Held:
    """The parts of a callback, and whether they are attached."""

    def __init__(self, parts: tuple[Attachable, ...]) -> None:
        self.parts = parts
        self.handles: list[Any] = []

    def begin(self, optimizers: Iterable[Any]) -> None:
        """Attach every part to the optimizers, once however often training begins."""
        self.end()
        for optimizer in optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)  # wrappers skip steps, their hooks are not asked
            self.handles += [part.attach(inner) for part in self.parts]

    def end(self) -> None:
        """Detach them."""
        while self.handles:
            self.handles.pop().remove()

    @property
    def done(self) -> bool:
        """Whether there are parts with a target, and all have met theirs."""
        told = [part.done for part in self.parts if hasattr(part, "done")]
        return bool(told) and all(told)


def transformers_callback(*parts: Attachable) -> Any:
    """A `transformers.TrainerCallback` under which the Trainer trains with these parts.

    Training ends when parts that have a target, as `GroupFisher` has, have met it.

    Args:
        parts: penalties, or a `GroupFisher`, over the Trainer's model.
    Raises:
        InputError: transformers is not installed.
    """
    base: Any = _imported("transformers", ("transformers",)).TrainerCallback
    held = _Held(parts)

    class Callback(base):  # type: ignore[misc]
        """See `transformers_callback`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
            """Attach the parts."""
            held.begin([optimizer])

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """End when the target is met."""
            control.should_training_stop = control.should_training_stop or held.done

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Detach the parts."""
            held.end()

    return Callback()


def lightning_callback(*parts: Attachable) -> Any:
    """A Lightning `Callback` under which a Trainer trains with these parts; their state goes into its checkpoints.

    Training ends when parts that have a target, as `GroupFisher` has, have met it.

    Args:
        parts: penalties, or a `GroupFisher`, over the module that is trained or a module inside it.
    Raises:
        InputError: Lightning is not installed.
    """
    base: Any = _imported("lightning", ("lightning.pytorch", "pytorch_lightning")).Callback
    held = _Held(parts)

    class Callback(base):  # type: ignore[misc]
        """See `lightning_callback`."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Attach the parts."""
            held.begin(trainer.optimizers)

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            """End when the target is met."""
            trainer.should_stop = trainer.should_stop or held.done

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Detach the parts."""
            held.end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Detach the parts."""
            held.end()

        def state_dict(self) -> dict[str, Any]:
            """The state of each part."""
            return {str(number): part.state_dict() for number, part in enumerate(held.parts)}  # type: ignore[attr-defined]

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Go on where `state_dict` was taken."""
            for number, part in enumerate(held.parts):
                part.load_state_dict(state_dict[str(number)])  # type: ignore[attr-defined]

    return Callback()


def _imported(name: str, places: tuple[str, ...]) -> Any:
    """A package that is not among the requirements, by the first of its names that there is.

    Raises:
        InputError: it is not installed.
    """
    for place in places:
        try:
            return importlib.import_module(place)
        except ImportError:
            continue
    raise InputError(f"{name} is not installed: pip install {name}; or attach the parts in a loop of your own")

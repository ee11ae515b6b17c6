"""Mask gradients of ordinary training steps: the user's own module runs in train mode, and its op calls are seen.

In train mode a model makes other calls than in its trace: dropout draws, noise is added, auxiliary heads run. So a call
is known by the module that makes it, its op, and how many like it that module made before, and not by its place in
the whole run. Where channels end, operands are tapped; a backward pass then tells what each sample says about each
channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import enable_pre_dispatch, enable_python_dispatcher, no_python_dispatcher
from torch.utils.hooks import RemovableHandle

from graphprune.calibrate import View, tap, view
from graphprune.coupling import Coupling
from graphprune.errors import CalibrationError
from graphprune.interpret import Replay
from graphprune.program import Node
from graphprune.trace import Inputs, modules, signature
from graphprune.trace.predispatch import PreDispatch

Place = tuple[str, str, int]
"""A module's path, an op, and the number of the call among that module's calls of that op."""


class Reading:
    """What the samples of one forward pass say.

    Attributes:
        q: per group, (samples, channels): derivatives of the loss by masks on the channels; zeros before a backward.
        heard: whether a backward pass came by.
    """

    def __init__(self, view: View) -> None:
        self.view, self.heard = view, False
        sizes = {name: atom.size for name, atom in view.coupling.atoms.items()}
        self.q = {name: torch.zeros(view.samples, size) for name, size in sizes.items()}
        self._token = torch.zeros((), requires_grad=True)

    def tapped(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a call returns, its operands tapped where channels end."""
        names, given, keywords = signature(func)[1], list(args), dict(kwargs)
        held = dict(zip(names, given, strict=False)) | keywords
        for end in self.view.ends[node.name]:
            several = held[end.argument]
            operand = several if end.index is None else several[end.index]
            if not operand.is_floating_point():
                continue
            own = operand.clone() if end.value in self.view.written else operand
            read = tap(own, self._token, self._read(end.readers))
            if end.index is None:
                held[end.argument] = read
            else:
                held[end.argument] = type(several)([*several[: end.index], read, *several[end.index + 1 :]])
        return func(*(held[name] for name in names[: len(given)]), **{name: held[name] for name in keywords})

    def _read(self, readers: Mapping[str, Any]) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def read(x: torch.Tensor, gradient: torch.Tensor) -> None:
            self.heard = True
            product = x * gradient if x.dtype == torch.float64 else x.float() * gradient.float()
            for name, reader in readers.items():
                q = reader.sum(product)
                self.q[name] = self.q[name].to(q) + q

        return read


class Watch:
    """Sees every forward pass of a model in train mode, through hooks that it puts there.

    Args:
        model: what is trained.
        coupling: of it.
        found: called with the reading of each pass, before its backward.
        sample_dim: which dim of the inputs tells samples apart.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, found: Callable[[Reading], None], sample_dim: int) -> None:
        self.model, self.coupling, self.found, self.sample_dim = model, coupling, found, sample_dim
        self.replay = Replay(model)
        self.views: dict[Any, tuple[View, dict[Place, Node]]] = {}
        self.paths = {id(module): path for path, module in modules(model)}
        self.open: ExitStack | None = None
        self.busy = False

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks on the model."""
        return [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.busy or self.open is not None or not module.training or not torch.is_grad_enabled():
            return
        self.busy = True  # to trace the model is to call it
        try:
            view, places = self._view(Inputs(args, kwargs))
        finally:
            self.busy = False
        self.reading = Reading(view)
        self.caller = _Caller(self.paths, places, self.reading)
        with ExitStack() as stack:
            hooks = nn.modules.module
            stack.callback(hooks.register_module_forward_pre_hook(self.caller.enter).remove)
            stack.callback(hooks.register_module_forward_hook(self.caller.leave, always_call=True).remove)
            stack.enter_context(enable_pre_dispatch())
            stack.enter_context(enable_python_dispatcher())
            stack.enter_context(self.caller)
            self.open = stack.pop_all()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.busy or self.open is None:
            return
        opened, self.open = self.open, None
        opened.close()
        if output is not None:  # None where the forward raised
            missing = next(self.caller.missing(), None)
            if missing is not None:
                raise CalibrationError(
                    f"{type(module).__name__} in train mode does not run {missing}, where channels end in its trace, "
                    "so nothing can be said about them; write the forward so that it makes the same calls in both "
                    "modes, or take the group out with keep_names"
                )
            self.found(self.reading)

    def _view(self, inputs: Inputs) -> tuple[View, dict[Place, Node]]:
        """How to read a batch of this shape, and the nodes of interest by their place."""
        program = self.replay.program(inputs)
        if program not in self.views:
            seen = view(self.coupling, program, self.sample_dim, with_maps=False)
            counts: Counter[tuple[str, str]] = Counter()
            places = {}
            for node in program.nodes:
                if node.name in seen.ends:
                    places[node.module, node.op, counts[node.module, node.op]] = node
                counts[node.module, node.op] += 1
            self.views[program] = seen, places
        return self.views[program]


class _Caller(PreDispatch):  # type: ignore[no-untyped-call]
    """Taps the calls of one forward pass."""

    def __init__(self, paths: Mapping[int, str], places: Mapping[Place, Node], reading: Reading) -> None:
        super().__init__()
        self.paths, self.places, self.reading = paths, places, reading
        self.path = [""]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.met: set[str] = set()

    def enter(self, module: nn.Module, _: Any) -> None:
        """A module begins."""
        self.path.append(self.paths.get(id(module), self.path[-1]))

    def leave(self, *_: Any) -> None:
        """A module ends."""
        self.path.pop()

    def missing(self) -> Iterator[Node]:
        """Nodes of interest that did not run."""
        return (node for node in self.places.values() if node.name not in self.met)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, tapped if channels end there."""
        at = self.path[-1], signature(func)[0]
        node = self.places.get((*at, self.counts[at]))
        self.counts[at] += 1
        with no_python_dispatcher():
            if node is None:
                return func(*args, **(kwargs or {}))
            self.met.add(node.name)
            return self.reading.tapped(node, func, args, kwargs or {})

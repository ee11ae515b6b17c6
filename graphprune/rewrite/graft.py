"""Grafting: the user's own class, in which the modules that state a size in their Python get a forward from the trace.

A grafted module keeps its class as base, its parameters, its attributes and its place; only `forward` is another one,
as readable source. It can be copied, pickled, moved and trained like any other.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from graphprune.couple import exported
from graphprune.coupling import Coupling
from graphprune.errors import RewriteError
from graphprune.plan import Plan
from graphprune.rewrite.forward import NAMESPACE, Forward, forward_of
from graphprune.rewrite.module import Readings
from graphprune.rewrite.parts import Parts, calls
from graphprune.rewrite.state import lookup
from graphprune.trace import Inputs, modules, run, trace

READINGS = 4
"""How many readings of ambiguous attributes are tried with grafts."""


def emit_grafted(
    model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, problem: Callable[[nn.Module], str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """A deep copy of `model`, same class, in which some modules have a forward from the trace.

    Args:
        model: the original; not modified.
        inputs: example inputs.
        coupling, plan: what to remove.
        problem: what is wrong with a candidate's outputs, empty if nothing.
    Returns:
        The copy, and the paths of the grafted modules.
    Raises:
        RewriteError: no choice of modules makes it compute what the zeroed original computes; the message says why.
    """
    readings = Readings(model, coupling, plan)
    search = _Search(model, inputs, coupling, plan, readings)
    first = ""
    for _ in readings.each(READINGS):
        found = search.graft_until(problem)
        if not found:
            grafted = search.fewest(problem)
            readings.take_back(problem, read=lambda path: not search.covered(path))
            return readings.small, grafted
        first = first or found
    raise RewriteError(first)


class _Search:
    """Which modules to graft: those in which a run of the copy stops, else all whose traced sizes change."""

    def __init__(self, model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, readings: Readings) -> None:
        self.model, self.inputs, self.coupling, self.plan = model, inputs, coupling, plan
        self.readings, self.small = readings, readings.small
        self.recorded = coupling.program.source is None
        self.parts = Parts(model, coupling.program)
        self.changing = [path for path in readings.changing if path]
        self.grafted: dict[str, Forward] = {}

    def graft_until(self, problem: Callable[[nn.Module], str]) -> str:
        """Graft module by module until there is no problem; what is left of it where nothing more can be grafted."""
        while True:
            stopped = _stopped_in(self.small, self.inputs, dry=self.recorded)
            found = f"it stops in {stopped or 'the forward of the model itself'}" if stopped is not None else ""
            if not found and not (found := problem(self.small)):
                return ""
            wanted = self._blamed(stopped)
            if not wanted and self.readings.reset(self.covered):
                continue  # a module around a graft may read an attribute that was taken for a size
            if not wanted:
                return found
            try:
                self._graft(wanted)
            except RewriteError as error:
                return f"{found}; {error}"

    def fewest(self, problem: Callable[[nn.Module], str]) -> tuple[str, ...]:
        """Take back the grafts that are not needed, class by class; the paths of those that stay."""
        kinds: dict[type, list[str]] = {}
        for path in self.grafted:
            kinds.setdefault(own_class(lookup(self.small, path)), []).append(path)
        for paths in kinds.values():
            if len(kinds) > 1:
                for path in paths:
                    ungraft(lookup(self.small, path), self.grafted[path])
                if problem(self.small):
                    self._install(paths)
                else:
                    self.grafted = {p: f for p, f in self.grafted.items() if p not in paths}
        return tuple(self.grafted)

    def _blamed(self, stopped: str | None) -> list[str]:
        """The modules to graft next: the one that a run stops in and those like it, or all that may be wrong."""
        rest = [p for p in self.changing if not self.covered(p)]
        if stopped is None:
            return rest
        inside = stopped
        while inside and inside not in rest:
            inside = inside.rpartition(".")[0]
        if not inside:  # where it stops no size changes, so what it was given may be wrong
            return rest if stopped else []
        kind = type(lookup(self.model, inside))
        return [p for p in rest if type(lookup(self.model, p)) is kind]

    def covered(self, path: str) -> bool:
        """Whether a module is grafted, or runs inside one that is."""
        return any(path == g or path.startswith(g + ".") for g in self.grafted)

    def _graft(self, paths: Iterable[str]) -> None:
        outermost = [p for p in paths if not any(p.startswith(q + ".") for q in paths)]
        called = calls(self.model, self.inputs, outermost, dry=self.recorded)
        try:
            made = {p: forward_of(self.parts, p, call, self.coupling, self.plan) for p, call in called.items()}
        except RewriteError:
            if self.coupling.program.source is not None:
                raise
            self.coupling = exported(self.coupling, self.model, self.inputs)  # a recording notes some ops otherwise
            made = {p: forward_of(self.parts, p, call, self.coupling, self.plan) for p, call in called.items()}
        self.grafted.update(made)
        self._install(made)

    def _install(self, paths: Iterable[str]) -> None:
        for path in paths:
            graft(lookup(self.small, path), self.grafted[path])


def _stopped_in(model: nn.Module, inputs: Inputs, *, dry: bool) -> str | None:
    """Path of the innermost module in which a run of `model` raises; None if it does not.

    Args:
        dry: run on the meta device, where the original is known to run.
    """
    names = {id(module): name for name, module in modules(model)}
    stack = [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(*_: Any) -> None:  # is not called where a forward raises
        stack.pop()

    hooks = nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        trace(model, inputs, front_end="record") if dry else run(model, inputs)
    except Exception:
        return stack[-1]
    finally:
        for handle in handles:
            handle.remove()
    return None


# -- the graft itself --------------------------------------------------------------------------------------------


def graft(module: nn.Module, forward: Forward) -> None:
    """Give `module` this forward, in place; its tensors of code become buffers that are not saved."""
    module.__class__ = _grafted(type(module), forward.source)
    for name, tensor in forward.constants.items():
        module.register_buffer(name, tensor, persistent=False)


def ungraft(module: nn.Module, forward: Forward) -> None:
    """Give `module` its own forward back."""
    for name in forward.constants:
        delattr(module, name)
    module.__class__ = own_class(module)


def retold(module: nn.Module, source: str) -> None:
    """Give a grafted module another source, in place."""
    module.__class__ = _grafted(own_class(module), source)


def source_of(module: nn.Module) -> str:
    """The source of a grafted module's forward; empty for any other."""
    return str(vars(type(module)).get("__graft__", ""))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without its graft."""
    kind = type(module)
    return kind.__mro__[1] if source_of(module) else kind


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _grafted(base: type[nn.Module], source: str) -> type[nn.Module]:
    """A subclass of `base` that differs in its forward only.

    Raises:
        RewriteError: the class does not let itself be subclassed.
    """
    if (base, source) in _classes:
        return _classes[base, source]
    file = f"<graft of {base.__qualname__} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # tracebacks show it
    names: dict[str, Any] = dict(NAMESPACE)
    exec(compile(source, file, "exec"), names)
    body: Mapping[str, Any] = {
        "forward": names["forward"],
        "__graft__": source,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduced,
    }
    try:
        made: type[nn.Module] = type(base.__name__, (base,), dict(body))
    except Exception as error:  # a hook of the class runs, which may refuse
        raise RewriteError(f"{base.__name__} cannot be subclassed: {type(error).__name__}: {error}") from error
    return _classes.setdefault((base, source), made)


def _reduced(module: nn.Module, _: Any) -> tuple[Any, ...]:
    """How a grafted module is copied and pickled: its class is made anew from its base and the source."""
    return _restored, (own_class(module), source_of(module)), module.__getstate__()  # type: ignore[no-untyped-call]


def _restored(base: type[nn.Module], source: str) -> nn.Module:
    kind = _grafted(base, source)
    return kind.__new__(kind)

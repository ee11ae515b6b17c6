"""Same-class emission: the user's own module with sliced weights, and its int attributes solved.

Every int argument in the traced graph is bound to an axis, so it is known that "12 became 8 in blocks.3.attn". The
attribute of that module that held 12 gets 8. Where several attributes could be meant, the one whose forward matches
the zeroed original is kept.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.collector import paused
from graphprune.coupling import Coupling
from graphprune.errors import RewriteError, TraceError
from graphprune.plan import Plan
from graphprune.rewrite.sizes import by_weights
from graphprune.rewrite.state import deepcopied, lookup, replacements, results
from graphprune.rules.call import Path
from graphprune.trace import Inputs, modules, trace, untouched

TRIES = 16
"""How many readings of ambiguous attributes are tried before giving up."""


@dataclass(frozen=True)
class Slot:
    """An int that a module keeps: an attribute, an element of a tuple attribute, or a field of its config."""

    module: str
    attribute: str
    index: int | None = None
    config: str | None = None

    def __str__(self) -> str:
        owner = ".".join(p for p in (self.module, self.config) if p)
        return f"{owner}.{self.attribute}" + ("" if self.index is None else f"[{self.index}]")


def emit_module(
    model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan, problem: Callable[[nn.Module], str]
) -> nn.Module:
    """A deep copy of `model`, same class, with the plan carried out.

    Args:
        model: the original; not modified.
        inputs: example inputs.
        coupling, plan: what to remove.
        problem: what is wrong with a candidate's outputs, empty if nothing.
    Raises:
        RewriteError: no reading of the attributes computes what the zeroed original computes; the message says why.
    """
    readings = Readings(model, coupling, plan)
    first = ""
    for small in readings.each(TRIES):
        if first and coupling.program.source is None and not _records(small, inputs):
            continue
        found = problem(small)
        if not found:
            readings.take_back(problem)
            return small
        first = first or found
    untried = f" (and {readings.count - TRIES} readings of its int attributes were not tried)"
    raise RewriteError(first + (untried if readings.count > TRIES else ""))


def _records(small: nn.Module, inputs: Inputs) -> bool:
    """Whether a copy of a model that was recorded can be, too: a quick look at its shapes."""
    try:
        trace(small, inputs, front_end="record")
    except TraceError:
        return False
    return True


class Readings:
    """A smaller copy of a model, and the values that the ints it keeps may have to take.

    Attributes:
        small: the copy; every reading is written into it.
        changing: paths of the modules in whose own code a size changes that is no attribute of a torch.nn module.
        count: how many readings there are.
    """

    @paused()
    def __init__(self, model: nn.Module, coupling: Coupling, plan: Plan) -> None:
        self.small = _copied(model, plan)
        refresh(self.small)
        options, sure, self.changing = _options(self.small, coupling, plan, _settled(self.small))
        self._alike = _alike(options, sure)
        _set_torch_attributes(self.small)
        self.count = math.prod(len(key.values) for key in self._alike)

    def each(self, limit: int) -> Iterator[nn.Module]:
        """Write one reading after the other, the likeliest first."""
        for choice in itertools.islice(itertools.product(*(key.values for key in self._alike)), limit):
            for key, value in zip(self._alike, choice, strict=True):
                _write_all(self.small, self._alike[key], value)
            self._choice = choice
            yield self.small

    def reset(self, covered: Callable[[str], bool]) -> bool:
        """Give the ints of modules whose forward is not their own their values back; False if they have them."""
        slots = [(s, key.own) for key, alike in self._alike.items() for s in alike if covered(s.module)]
        changed = [(slot, own) for slot, own in slots if _read(self.small, slot) != own]
        for slot, own in changed:
            write(self.small, slot, own)
        return bool(changed)

    def take_back(self, problem: Callable[[nn.Module], str], read: Callable[[str], bool] = lambda path: True) -> None:
        """Take back every change that the forward does not need: an attribute may equal a size by chance.

        Where only one attribute can be meant the change stays: with other arguments the forward may read it.

        Args:
            problem: what is wrong with a candidate's outputs, empty if nothing.
            read: whether the forward of the module at a path is its own; another one reads none of its attributes.
        """
        for key, value in zip(self._alike, self._choice, strict=True):
            if value != key.own and not key.sure and any(read(slot.module) for slot in self._alike[key]):
                _write_all(self.small, self._alike[key], key.own)
                if problem(self.small):
                    _write_all(self.small, self._alike[key], value)


def _copied(model: nn.Module, plan: Plan) -> nn.Module:
    """A deep copy with sliced tensors; results of earlier forwards that it keeps are copied without their graph."""
    return deepcopied(model, {**replacements(model, plan), **results(model)})


# -- attributes of torch.nn modules ------------------------------------------------------------------------------


def refresh(model: nn.Module) -> None:
    """Bring weights that hooks of torch.nn.utils compute before each forward in line with what they come from."""
    for _, module in modules(model):
        computing = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
        training = module.training
        for hook in computing:
            module.training = False
            with torch.no_grad():
                hook(module, ())
            module.training = training


def _settled(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Per path of a torch.nn module, its size attributes as its weights say; reading those may move buffers."""
    found = modules(model, remove_duplicate=False)
    computed = any("parametrizations" in module._modules for _, module in found)
    with untouched(model) if computed else nullcontext(), torch.no_grad():
        return {path: by_weights(module) for path, module in found}


def _set_torch_attributes(model: nn.Module) -> None:
    """Bring the size attributes of torch.nn modules in line with their weights."""
    settled = _settled(model)
    for path, module in modules(model):
        for name, value in settled[path].items():
            if hasattr(module, name) and getattr(module, name) != value:
                setattr(module, name, value)


# -- attributes of everything else -------------------------------------------------------------------------------


def _options(
    small: nn.Module, coupling: Coupling, plan: Plan, settled: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[Slot, list[int]], set[Slot], list[str]]:
    """What may have to change.

    Returns:
        Per int, the values it may take, its own last; the ints that are surely meant: the one attribute that holds the
        size in every module of a class in which the size changes; and paths of the modules whose code has a size.
    """
    keep = {coupling.atoms[name]: len(kept) for name, kept in plan.groups.items()}
    memo: dict[Any, int] = {}
    options: dict[Slot, list[int]] = {}
    holders: dict[tuple[type, int], list[list[Slot]]] = {}
    changing: dict[str, None] = {}
    for applied in coupling.applied.values():
        path, replacement = applied.node.module, applied.replacement
        others = [f.axis for f in applied.fixed] + list(replacement.axes if replacement else ())
        others += [axis for v in applied.node.values() if v.kind == "constant" for axis in coupling.dims[v]]
        if any(coupling.axes.width(axis, keep, memo) != axis.size for axis in others):
            changing[path] = None
        for literal in applied.literals:
            old, new = literal.axis.size, coupling.axes.width(literal.axis, keep, memo)
            if old != new and not _set_argument(lookup(small, path), literal.path, old, new):
                changing[path] = None
                found = _holding(small, path, old, settled)
                for slot in found:
                    options.setdefault(slot, []).append(new)
                own = [slot for slot in found if slot.module == path and slot.config is None]
                holders.setdefault((type(lookup(small, path)), old), []).append(own)
    sure: set[Slot] = set()
    for in_modules in holders.values():
        common = set.intersection(*({(s.attribute, s.index) for s in slots} for slots in in_modules))
        if len(common) == 1:
            sure.update(s for slots in in_modules for s in slots if (s.attribute, s.index) in common)
    return (
        {slot: list(dict.fromkeys([*values, _read(small, slot)])) for slot, values in options.items()},
        sure,
        [*changing],
    )


def _set_argument(module: Any, path: Path, old: int, new: int) -> bool:
    """Set the attribute of a torch.nn module that is called like the argument; False if that is not how it keeps it."""
    if not type(module).__module__.startswith("torch.nn.") or str(path[0]) not in vars(module):
        return False
    held = vars(module)[str(path[0])]
    if len(path) == 1 and held in (old, new):
        setattr(module, str(path[0]), new)
        return True
    if len(path) == 2 and isinstance(held, tuple) and held[int(path[1])] in (old, new):
        setattr(module, str(path[0]), (*held[: int(path[1])], new, *held[int(path[1]) + 1 :]))
        return True
    return False


def _holding(small: nn.Module, path: str, old: int, settled: Mapping[str, Mapping[str, Any]]) -> list[Slot]:
    """Where the module at `path` keeps the int `old`: its attributes, else its configs, else the modules around it."""
    while True:
        module = lookup(small, path)
        if isinstance(module, nn.Module):
            found = list(_ints(vars(module), old))
            own = [Slot(path, name, index) for name, index in found if name not in settled.get(path, ())]
            if len(own) < len(found) and (not own or type(module).__module__.startswith("torch.nn.")):
                return []
            if not own:
                own = [
                    Slot(path, name, index, config)
                    for config, held in vars(module).items()
                    if is_config(held)
                    for name, index in _ints(vars(held), old)
                ]
            if own:
                return own
        if not path:
            return []
        path = path.rpartition(".")[0]


def _ints(attributes: Mapping[str, Any], value: int) -> Iterator[tuple[str, int | None]]:
    for name, held in attributes.items():
        if type(held) is int and held == value:
            yield name, None
        elif isinstance(held, (tuple, list)) and not hasattr(held, "_fields"):
            for index, item in enumerate(held):
                if type(item) is int and item == value:
                    yield name, index


def is_config(held: Any) -> bool:
    """A plain object with fields, such as a Hugging Face config."""
    return hasattr(held, "__dict__") and not isinstance(held, (nn.Module, type)) and not callable(held)


@dataclass(frozen=True)
class _Key:
    """What slots that are decided together have in common: name, values, their own value, and whether it is they."""

    attribute: str
    index: int | None
    config: str | None
    values: tuple[int, ...]
    own: int
    sure: bool


def _alike(options: Mapping[Slot, Sequence[int]], sure: Collection[Slot]) -> dict[_Key, list[Slot]]:
    """Slots that are alike in name and options, over all layers."""
    alike: dict[_Key, list[Slot]] = {}
    for slot, values in options.items():
        key = _Key(slot.attribute, slot.index, slot.config, tuple(values), values[-1], slot in sure)
        alike.setdefault(key, []).append(slot)
    return alike


def _write_all(model: nn.Module, slots: Sequence[Slot], value: int) -> None:
    for slot in slots:
        write(model, slot, value)


def _owner(model: nn.Module, slot: Slot) -> Any:
    module = lookup(model, slot.module)
    return module if slot.config is None else vars(module)[slot.config]


def _read(model: nn.Module, slot: Slot) -> int:
    held = vars(_owner(model, slot))[slot.attribute]
    return int(held if slot.index is None else held[slot.index])


def write(model: nn.Module, slot: Slot, value: int) -> None:
    """Set the int; a config is copied first, since modules share it, and shared again where it ends up the same."""
    if _read(model, slot) == value:
        return
    owner = _owner(model, slot)
    if slot.config is not None:
        owner = copy.copy(owner)
    if slot.index is not None:
        held = vars(owner)[slot.attribute]
        items = list(held)
        items[slot.index] = value
        value = type(held)(items)
    vars(owner)[slot.attribute] = value
    if slot.config is not None:
        vars(lookup(model, slot.module))[slot.config] = _shared(model, slot, owner)


def _shared(model: nn.Module, slot: Slot, config: Any) -> Any:
    """The config of a module around this one that says the same; `config` itself if there is none."""
    path = slot.module
    while path:
        path = path.rpartition(".")[0]
        around = vars(lookup(model, path)).get(str(slot.config))
        if type(around) is type(config) and vars(around) == vars(config):
            return around
    return config

"""What a smaller model of the same class keeps as ints that the original kept otherwise: new sizes, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.rewrite.module import Slot, is_config, write
from graphprune.trace import modules


@dataclass(frozen=True)
class Change:
    """An int that a module keeps, before and after."""

    slot: Slot
    old: int
    new: int

    def __str__(self) -> str:
        return f"{self.slot}: {self.old} -> {self.new}"


def changes(model: nn.Module, small: nn.Module) -> tuple[Change, ...]:
    """The ints that modules of `small`, a copy of `model` with new sizes, keep and that differ, outer modules first."""
    now = dict(modules(small))
    found: list[Change] = []
    for path, module in modules(model):
        if path not in now or vars(module) is vars(now[path]):
            continue
        kept = vars(now[path])
        found += (Change(Slot(path, n, i), a, b) for n, i, a, b in _differing(vars(module), kept))
        for name, held in vars(module).items():
            if is_config(held) and kept.get(name) is not held and type(kept.get(name)) is type(held):
                inside = _differing(vars(held), vars(kept[name]))
                found += (Change(Slot(path, n, i, name), a, b) for n, i, a, b in inside)
    return tuple(found)


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, int | None, int, int]]:
    for name, held in before.items():
        kept = after.get(name)
        if type(held) is int:
            if type(kept) is int and kept != held:
                yield name, None, held, kept
        elif isinstance(held, (tuple, list)) and isinstance(kept, (tuple, list)) and len(kept) == len(held):
            for index, (a, b) in enumerate(zip(held, kept, strict=True)):
                if type(a) is int and type(b) is int and a != b:
                    yield name, index, a, b


def unmet(model: nn.Module, found: tuple[Change, ...]) -> Change | None:
    """The first change whose int `model` does not keep with the old value; None if all hold."""
    known = dict(modules(model))
    return next((change for change in found if not _holds(known, change)), None)


def _holds(known: Mapping[str, nn.Module], change: Change) -> bool:
    slot = change.slot
    held: Any = vars(known[slot.module]) if slot.module in known else {}
    if slot.config is not None:
        config = held.get(slot.config)
        held = vars(config) if is_config(config) else {}
    kept = held.get(slot.attribute)
    if slot.index is not None:
        sized = isinstance(kept, (tuple, list)) and 0 <= slot.index < len(kept)
        kept = kept[slot.index] if sized else None
    return type(kept) is int and kept == change.old


def carry_over(model: nn.Module, found: tuple[Change, ...]) -> None:
    """Write the new values, in place; configs that modules share are copied first and shared again."""
    for change in found:
        write(model, change.slot, change.new)

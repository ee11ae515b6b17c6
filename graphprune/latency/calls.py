"""Op calls as plain data: what is called, and the shape, type and layout of each tensor it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Plain = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Operand:
    """A tensor that a call gets.

    Attributes:
        shape: its sizes.
        dtype: element type.
        order: its dims from the one with the largest stride to the one with the smallest.
        expanded: dims along which every position is the same memory.
        weight: whether it belongs to the model's state; a run finds those out of the caches.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    expanded: tuple[int, ...] = ()
    weight: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, *, weight: bool) -> Operand:
        """The record of a tensor; of one that is no block of memory, the nearest that is."""
        strides = (
            tensor.stride() if tensor.layout is torch.strided else torch.empty(tensor.shape, device="meta").stride()
        )
        wide = [d for d, size in enumerate(tensor.shape) if size > 1]
        order = iter(sorted(wide, key=lambda d: -strides[d]))
        full = tuple(next(order) if size > 1 else d for d, size in enumerate(tensor.shape))
        expanded = tuple(d for d in wide if strides[d] == 0)
        return cls(tuple(tensor.shape), tensor.dtype, full, expanded, weight)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        order = "" if self.order == tuple(range(len(self.shape))) else f" order {list(self.order)}"
        expanded = f" expanded {list(self.expanded)}" if self.expanded else ""
        return f"{'weight ' if self.weight else ''}{kind}{list(self.shape)}{order}{expanded}"


@dataclass(frozen=True, eq=False)
class OpCall:
    """One call of an op.

    Attributes:
        op: the overload, such as `torch.ops.aten.conv2d.default`.
        arguments: by their schema names, in schema order; tensors are `Operand`s.
    """

    op: Any
    arguments: Mapping[str, Any]

    def operands(self) -> Iterator[Operand]:
        """Every tensor, those in lists too."""
        for argument in self.arguments.values():
            for leaf in argument if isinstance(argument, (tuple, list)) else (argument,):
                if isinstance(leaf, Operand):
                    yield leaf

    def with_operands(self, make: Callable[[Operand], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, with `make` of each tensor's record in its place."""

        def made(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return make(argument)
            return [made(a) for a in argument] if isinstance(argument, (tuple, list)) else argument

        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        named = {a.name for a in self.op._schema.arguments if a.kwarg_only}
        for name, argument in self.arguments.items():
            if name in named:
                kwargs[name] = made(argument)
            else:
                args.append(made(argument))
        return args, kwargs

    @property
    def key(self) -> str:
        """The same for calls that take the same time."""
        return f"{self.op}({', '.join(f'{name}={_said(a)}' for name, a in self.arguments.items())})"


Measure: TypeAlias = Callable[[OpCall], float]
"""How many seconds a call takes."""


def _said(argument: Any) -> str:
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(map(_said, argument))}]"
    return str(argument) if isinstance(argument, Operand) else repr(argument)

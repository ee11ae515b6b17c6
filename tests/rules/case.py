"""One call of an op, how many axes its rule must leave free, and operands for it.

Sizes are pairwise different, so that a swapped letter cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    op: Any
    args: tuple[Any, ...]
    free: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        namespace, _, name = str(self.op._schema.name).partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"

    @property
    def label(self) -> str:
        return (
            f"{self.op._schema.name.partition('::')[2]}.{self.op._overloadname}{'-' + self.note if self.note else ''}"
        )


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 values in (0.1, 0.9), where every function is defined."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1


def signed(*shape: int) -> torch.Tensor:
    return t(*shape) - 0.5


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def c(op: Any, *args: Any, free: int, note: str = "", **kwargs: Any) -> Case:
    return Case(op, args, free, kwargs, note)

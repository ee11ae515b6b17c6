"""What a model holds, by name and in torch's order, listed in one pass.

The generators of `nn.Module` say the same, but hand every item up through all levels above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def modules(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """Every module under its path, "" being the model; a shared one under the first of its paths, or under each."""
    found = [("", model)]
    seen = {id(model)}

    def visit(prefix: str, children: Mapping[str, nn.Module | None]) -> None:
        for name, child in children.items():
            if child is None or (remove_duplicate and id(child) in seen):
                continue
            seen.add(id(child))
            path = prefix + name
            found.append((path, child))
            if child._modules:
                visit(path + ".", child._modules)

    visit("", model._modules)
    return found


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names."""
    return _named((path, module._parameters) for path, module in modules(model, remove_duplicate=False))


def parameters_and_buffers(
    model: nn.Module,
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, torch.Tensor]]]:
    """Every parameter and every buffer under each of its names."""
    found = modules(model, remove_duplicate=False)
    return _named((path, m._parameters) for path, m in found), _named((path, m._buffers) for path, m in found)


def held(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter, then every buffer, under each of its names."""
    of_training, others = parameters_and_buffers(model)
    return [*of_training, *others]


def _named(tables: Iterable[tuple[str, Mapping[str, T | None]]]) -> list[tuple[str, T]]:
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, table in tables
        if table
        for name, tensor in table.items()
        if tensor is not None
    ]
